"""Statistics of channels against their definition in float64, on small models whose channels are
known and on Detectron2's own."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2_models import (
    a_training_image,
    modules_of_type,
    randomize_norms,
    small_config,
    small_model,
)
from matplotlib.text import Text
from torch import nn
from torchvision.ops import Conv2dNormActivation

from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d, add_wsbcn_config
from wsbcn_d2.analysis import analyze_layers, estimate_drift, filter_statistics
from wsbcn_d2.analysis.norm_analysis import load_analyses
from wsbcn_d2.analysis.norms_page import norms_page
from wsbcn_d2.analysis.page import Picture

ROOT = Path(__file__).parents[2]

RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


class OneLayer(nn.Module):
    """norm, then perhaps an addition and a ReLU, written in one of several ways."""

    def __init__(self, norm, after=F.relu):
        super().__init__()
        self.norm, self.after = norm, after

    def forward(self, x):
        return self.after(self.norm(x))


def batches(channels=8, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, channels, 6, 5 + i, generator=generator) * 2 + 1 for i in range(count)]


def pooled(outputs):
    """(C, values) in float64."""
    return torch.cat([y.detach().double().transpose(0, 1).flatten(1) for y in outputs], dim=1)


def analyze(model, data):
    [layer] = analyze_layers(model, data)
    return layer


def affine(norm):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in [*norm.named_parameters(), *norm.named_buffers()]:
        if name.split("_")[-1] in ("weight", "bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return norm


def test_bn_is_on_the_cross_and_gives_its_affine():
    """With the statistics of the images, each channel has mean 0 and std 1, and ReLU sees β and
    γ, up to eps."""
    data = batches()
    values = pooled(data)
    norm = affine(nn.BatchNorm2d(8, eps=1e-12))
    norm.running_mean.copy_(values.mean(1))
    norm.running_var.copy_(values.var(1, correction=0))
    layer = analyze(OneLayer(norm), data)
    torch.testing.assert_close(layer.normalized_mean, torch.zeros(8).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.normalized_std, torch.ones(8).double(), atol=1e-6, rtol=0)
    close = dict(atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.relu_mean, norm.bias.detach().double(), **close)
    torch.testing.assert_close(layer.relu_std, norm.weight.detach().double().abs(), **close)


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(4, 8),
        ChannelNorm(8, 4),
        BatchChannelNorm(8, 4),
        FrozenBatchNorm2d(8),
        CycleBatchNormList(1, num_features=8),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_normalized_is_without_the_last_affine(norm):
    data = batches()
    affine(norm)
    layer = analyze(OneLayer(norm), data)
    plain = copy.deepcopy(norm).double().eval()
    prefix = "group_" if isinstance(norm, BatchChannelNorm) else ""
    for name, neutral in (("weight", 1), ("bias", 0)):
        getattr(plain, prefix + name).data.fill_(neutral)
    normalized = pooled([plain(x.double()) for x in data])
    before_relu = pooled([copy.deepcopy(norm).eval()(x) for x in data])
    close = dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.normalized_mean, normalized.mean(1), **close)
    torch.testing.assert_close(layer.normalized_std, normalized.std(1, correction=0), **close)
    torch.testing.assert_close(layer.relu_mean, before_relu.mean(1), **close)
    torch.testing.assert_close(layer.relu_std, before_relu.std(1, correction=0), **close)
    torch.testing.assert_close(layer.active, (before_relu > 0).double().mean(1))


def test_a_channel_is_dead_if_no_image_passes():
    norm = nn.GroupNorm(4, 8)
    norm.bias.data[1], norm.bias.data[5] = -100.0, -100.0
    data = batches()
    layer = analyze(OneLayer(norm), data)
    assert (layer.active == 0).tolist() == [i in (1, 5) for i in range(8)]
    # one position of one image is enough to be alive
    data[-1][0, 5, 0, 0] = 1e6
    norm.bias.data[5] = -2.0
    assert analyze(OneLayer(norm), data).active[5] > 0


SHORTCUT = 3.0


def add_in_place(y):
    y += SHORTCUT
    return F.relu_(y)


@pytest.mark.parametrize(
    "after, offset",
    [
        (F.relu, 0.0),
        (F.relu_, 0.0),
        (torch.relu, 0.0),
        (nn.ReLU(inplace=True), 0.0),
        (lambda y: y.relu(), 0.0),
        (lambda y: (y + SHORTCUT).relu_(), SHORTCUT),
        (lambda y: F.relu(torch.add(SHORTCUT * torch.ones_like(y), y)), SHORTCUT),
        (add_in_place, SHORTCUT),
    ],
)
def test_relu_is_found_however_it_is_written(after, offset):
    norm = nn.GroupNorm(4, 8)
    data = batches()
    layer = analyze(OneLayer(norm, after), data)
    expected = pooled([norm(x) + offset for x in data])
    torch.testing.assert_close(layer.relu_mean, expected.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.active, (expected > 0).double().mean(1))


@pytest.mark.parametrize("after", [F.gelu, nn.Identity(), lambda y: F.relu(2 * y)])
def test_no_relu(after):
    layer = analyze(OneLayer(nn.GroupNorm(4, 8), after), batches())
    assert layer.active is None and layer.relu_mean is None


def test_relu_of_an_activation_is_not_counted_again():
    model = nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    data = batches()
    [layer] = analyze_layers(model, data)
    expected = pooled([model[0](x) for x in data])
    torch.testing.assert_close(layer.relu_mean, expected.mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["build_resnet_fpn_backbone", "build_wsbcn_resnet_fpn_backbone"])
def test_detectron2_model(name):
    """Stock and fused blocks alike: ReLU after every norm but those of shortcuts and the FPN."""
    cfg = small_config(RCNN, "BCN+WS")
    add_wsbcn_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    model = randomize_norms(build_model(cfg)).train()
    before = copy.deepcopy(model.state_dict())
    data = [[a_training_image()]]
    layers = {layer.name: layer for layer in analyze_layers(model, data)}
    norms = modules_of_type(model, BatchChannelNorm)
    assert set(layers) == set(norms)
    without = {name for name, layer in layers.items() if layer.active is None}
    assert without == {name for name in norms if "shortcut" in name or "fpn" in name}
    assert list(layers)[0] == "backbone.bottom_up.stem.conv1.norm"
    assert model.training and all(norm.training for norm in norms.values())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(m._forward_hooks for m in model.modules())


def test_shared_layers_of_retinanet():
    model = small_model(RETINANET, "BCN").train()
    [*_, last] = analyze_layers(model, [[a_training_image()]])
    assert last.name.startswith("head.") and last.active is not None
    drift = estimate_drift(model, [[a_training_image()]])
    assert drift["head.cls_subnet.1"].mean.shape == (5 * 32,)


def test_drift_of_bcn():
    """Against the float64 statistics of the images."""
    data = batches()
    norm = BatchChannelNorm(8, 4, eps=0.0)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = OneLayer(norm)
    before = copy.deepcopy(model.state_dict())
    drift = estimate_drift(model, data)["norm"]
    assert_drift(drift, norm, pooled(data))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_drift_of_batch_norm_is_that_of_evaluation(kind):
    """The second layer sees what the first gives with its estimates, not with batch statistics."""
    model = nn.Sequential(kind(8, eps=1e-12), nn.ReLU(), kind(8, eps=1e-12))
    for norm in (model[0], model[2]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    data = batches()
    drift = estimate_drift(model, data)
    assert_drift(drift["0"], model[0], pooled(data))
    reference = copy.deepcopy(model).double().eval()
    assert_drift(drift["2"], model[2], pooled([reference[:2](x.double()) for x in data]))


def assert_drift(drift, norm, values):
    std = norm.running_var.double().sqrt()
    mean = (values.mean(1) - norm.running_mean).abs() / std
    torch.testing.assert_close(drift.mean, mean, atol=1e-5, rtol=1e-5)
    log_std = (values.std(1, correction=0) / std).log()
    torch.testing.assert_close(drift.log_std, log_std, atol=1e-5, rtol=1e-5)


def test_no_estimates_no_drift():
    """Nor for norms that are not of images, as in a fully connected head."""
    model = nn.Sequential(
        nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8)
    )
    assert list(estimate_drift(model, batches())) == ["0"]
    assert estimate_drift(OneLayer(nn.GroupNorm(4, 8)), batches()) == {}


def test_block_that_has_norm_in_its_name():
    """Its layer of normalization is measured, and the ReLU after that."""
    block = Conv2dNormActivation(8, 8, 1)
    layer = analyze(block, batches())
    assert layer.name == "1" and layer.active is not None


def test_filters_are_measured_before_standardization():
    model = nn.Sequential(WSConv2d(4, 6, 3, groups=2), Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1))
    found = filter_statistics(model)
    assert [f.standardized for f in found.values()] == [True, False, False]
    for name, conv in model.named_children():
        weight = conv.weight.detach().double().flatten(1)
        torch.testing.assert_close(found[name].mean, weight.mean(1))
        torch.testing.assert_close(found[name].std, weight.std(1, correction=0))


def test_nothing_to_analyze():
    with pytest.raises(ValueError, match="there are no batches"):
        analyze_layers(OneLayer(nn.GroupNorm(4, 8)), [])
    with pytest.raises(ValueError, match="Sequential has no normalization layers"):
        analyze_layers(nn.Sequential(nn.ReLU()), batches())


def test_model_that_is_not_finite():
    analyses = load_analyses(ROOT / "docs" / "results" / "norms.json")
    layer = next(iter(analyses[0]["layers"]))
    for key in ("normalized_mean", "normalized_std", "drift_mean"):
        if layer.get(key):
            layer[key] = [None] * len(layer[key])
    if analyses[0]["probe"]:
        analyses[0]["probe"]["weight_norm"] = None
    for block in norms_page(analyses).blocks:
        if isinstance(block, Picture):
            block.figure.draw_without_rendering()


def test_pictures_show_numbers_where_formulas_are_off():
    """Logarithmic axes of matplotlib write formulas."""
    page = norms_page(load_analyses(ROOT / "docs" / "results" / "norms.json"))
    figures = [block.figure for block in page.blocks if isinstance(block, Picture)]
    assert len(figures) == 3
    for figure in figures:
        figure.draw_without_rendering()
        assert not [text for text in figure.findobj(Text) if "\\math" in text.get_text()]
