"""wsbcn_d2.convert: compared with models that are built from norm options, and with formulas."""

import copy
import functools
import pickle

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d, batch_norm, get_norm
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from detectron2_models import (
    a_training_image,
    an_image,
    logged,
    modules_of_type,
    randomize_norms,
    small_model,
)
from oracles import channel_norm, estimated_bcn, standardized_weight
from torch import nn

from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d, WSConvTranspose2d, fold
from wsbcn_d2.conversion import convert
from wsbcn_d2.layers import WeightStandardized

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
LOGGER = "detectron2.wsbcn_d2"
C, EPS = 8, 1e-3  # an eps that is none of the defaults


def spread(module):
    """Gives all values of a layer that a norm can have others than the initial ones."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith(("weight", "running_var")):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(0.0, 0.3)
    return module


def layer(kind):
    """A norm layer of 8 channels, as if trained."""
    factories = {
        "torchvision": lambda: torchvision.ops.FrozenBatchNorm2d(C),
        "IN": lambda: nn.InstanceNorm2d(C, affine=True),
        "no affine": lambda: nn.BatchNorm2d(C, affine=False),
        "no statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    }
    norm = factories[kind]() if kind in factories else get_norm(kind, C)
    norm.eps = EPS
    return spread(norm)


def net(norm):
    """A convolution without norm, one with it beside, and another one without."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, C, 3), norm, nn.Conv2d(C, 2, 1))


def values(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def features(model):
    """Outputs of the backbone, and of the head that follows it in RetinaNet."""
    torch.manual_seed(3)
    maps = list(model.backbone(torch.randn(1, 3, 64, 64)).values())
    return maps + [t for out in model.head(maps) for t in out] if hasattr(model, "head") else maps


def assert_all_close(xs, ys, **tolerance):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        torch.testing.assert_close(x, y, **tolerance)


# ---------------------------------------------------------------------------- models of Detectron2


def test_model_is_what_its_config_would_have_built():
    source = randomize_norms(small_model(MASK_RCNN, "BN")).eval()
    built = small_model(MASK_RCNN, "BCN+WS").eval()
    built.load_state_dict(source.state_dict(), strict=False)  # BN's keys are those of BCN
    objects = dict(source.named_modules())
    convolution = source.backbone.bottom_up.res3[0].conv2.weight

    assert convert(source, "BCN+WS") is source
    assert {k: id(m) for k, m in source.named_modules()} == {k: id(m) for k, m in objects.items()}
    assert source.backbone.bottom_up.res3[0].conv2.weight is convolution
    assert repr(source) == repr(built)
    assert same(source.state_dict(), built.state_dict())
    # FPN and ResNet keep their parts in plain lists: features say whether these were reached.
    assert all(type(conv) is WSConv2d for conv in source.backbone.lateral_convs)
    assert_all_close(features(source), features(built))


@pytest.fixture(scope="module")
def trained():
    return randomize_norms(small_model(MASK_RCNN, "GN"))


def test_converted_model_trains_saves_and_folds(trained):
    model = convert(copy.deepcopy(trained), "BCN+WS", keep_function=True)
    with EventStorage():
        sum(model([a_training_image()]).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(m.running_mean.any() for m in modules_of_type(model, BatchChannelNorm).values())

    expected = features(model.eval())
    built = small_model(MASK_RCNN, "BCN+WS").eval()
    built.load_state_dict(model.state_dict())  # with the scales of the filters
    assert_all_close(features(built), expected)
    assert_all_close(features(pickle.loads(pickle.dumps(model))), expected)
    assert_all_close(features(fold(model)), expected, rtol=1e-3, atol=1e-3)


def test_predictions_do_not_change_where_only_filters_do(trained):
    model = convert(copy.deepcopy(trained).eval(), "GN+WS", keep_function=True)
    assert len(modules_of_type(model, WSConv2d)) == len(modules_of_type(model, nn.GroupNorm))
    assert_all_close(features(model), features(trained.eval()), rtol=1e-3, atol=1e-4)
    image = an_image()
    (found,), (expected,) = model([image]), trained([image])
    torch.testing.assert_close(
        found["instances"].scores, expected["instances"].scores, rtol=1e-3, atol=1e-4
    )


def test_levels_of_a_shared_head():
    """RetinaNet's BN has statistics for each level, in a CycleBatchNormList."""
    source = randomize_norms(small_model(RETINANET, "BN")).eval()
    original = copy.deepcopy(source)
    built = small_model(RETINANET, "BCN").eval()
    built.load_state_dict(source.state_dict(), strict=False)  # which takes them, level by level
    convert(source, "BCN")
    assert source.head.cls_subnet[1].running_mean.shape == (5, 32)
    assert same(source.state_dict(), built.state_dict())
    assert_all_close(features(source), features(built))

    # A forward pass that ends halfway does not shift the levels of the next.
    with pytest.raises(AssertionError):
        source.head([torch.randn(1, 32, 4, 4)])
    with pytest.raises(RuntimeError):
        source.head([torch.randn(1, 32, 4, 4)] + [torch.randn(1, 3, 4, 4)] * 4)
    assert_all_close(features(source), features(built))

    # And back: the affine of the channel normalization, which has not been used, is lost.
    convert(source, "BN")
    assert isinstance(source.head.cls_subnet[1], CycleBatchNormList)
    assert_all_close(features(source), features(original))
    counters = {k for k in original.state_dict() if k.endswith("num_batches_tracked")}
    assert same(
        {k: v for k, v in source.state_dict().items() if k not in counters},
        {k: v for k, v in original.state_dict().items() if k not in counters},
    )
    with pytest.raises(ValueError, match="head.cls_subnet.1: .*5 feature levels"):
        convert(source, "FrozenBN")


@pytest.mark.parametrize("norm, kind", [("BCN+WS", BatchChannelNorm), ("BN", CycleBatchNormList)])
def test_shared_layers_get_levels(norm, kind):
    model = convert(small_model(RETINANET, "GN"), norm)
    built = small_model(RETINANET, norm)
    assert isinstance(model.head.cls_subnet[1], kind)
    assert repr(model.head) == repr(built.head)
    built.load_state_dict(model.state_dict())
    assert_all_close(features(model), features(built))  # in training mode, so estimates move
    assert same(model.state_dict(), built.state_dict())


# ------------------------------------------------------------------------------- layer for layer

SOURCES = (
    "BN",
    "SyncBN",
    "naiveSyncBN",
    "FrozenBN",
    "torchvision",
    "GN(groups=4)",
    "IN",
    "LN",
    "CN(groups=4)",
    "BCN(groups=4)",
)
TARGETS = ("BN", "SyncBN", "naiveSyncBN_N", "FrozenBN", "GN(groups=2)", "LN", "CN(groups=2)")
TARGETS += ("BCN(groups=2)", "BatchBCN(groups=2)")
FROZEN = ("FrozenBN", "torchvision")


def halves(value):
    """Mean of each of two groups, from one value per channel, or per group of two."""
    return torch.stack([value[: len(value) // 2].mean(), value[len(value) // 2 :].mean()])


def expected_output(source, old, target, x):
    """The new layer in evaluation, from the values of the old one; all in float64."""
    old = {k: v.double() for k, v in old.items()}
    column = functools.partial(torch.Tensor.view, size=(1, -1, 1, 1))
    per_channel = torch.ones(C // 4, dtype=torch.float64)
    weight, bias = old["weight"], old["bias"]
    if source.startswith("CN"):
        group = weight, bias
        weight, bias = torch.kron(weight, per_channel), torch.kron(bias, per_channel)
    if source.startswith("BCN"):
        group = old["group_weight"], old["group_bias"]
    mean = old.get("running_mean", torch.zeros(C, dtype=torch.float64))
    var = old.get("running_var", torch.ones(C, dtype=torch.float64))

    if "BCN" in target:
        if source.startswith("CN"):
            weight, bias = torch.ones_like(weight), torch.zeros_like(bias)
        if "CN" not in source:
            group = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        group = [halves(v) for v in group]
        return estimated_bcn(x, weight, bias, *group, mean, var, None, EPS).y
    if "BN" in target:
        return (x - column(mean)) / torch.sqrt(column(var) + EPS) * column(weight) + column(bias)
    if source.startswith("BCN"):
        weight, bias = torch.kron(group[0], per_channel), torch.kron(group[1], per_channel)
    groups = 2
    if target == "LN":
        var, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + EPS) * column(weight) + column(bias)
    if target.startswith("CN"):
        return channel_norm(x, halves(weight), halves(bias), EPS)
    ones = torch.ones(groups, dtype=torch.float64)
    return channel_norm(x, ones, 0 * ones, EPS) * column(weight) + column(bias)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_values_are_carried(source, target):
    if "LN" in (source, target) and not hasattr(batch_norm, "LayerNorm"):
        pytest.skip("Detectron2 0.6 has no LayerNorm")
    norm = layer(source)
    old = values(norm)
    model = net(norm).eval()
    convert(model, target)
    assert model[2] is norm
    frozen = source in FROZEN
    is_batch_norm = "BN" in target
    expected_type = FrozenBatchNorm2d if frozen and is_batch_norm else type(get_norm(target, C))
    assert type(norm) is expected_type
    assert all(p.requires_grad != frozen for p in norm.parameters())
    assert values(norm).keys() == values(expected_type(C) if frozen and is_batch_norm else get_norm(target, C)).keys()
    x = torch.randn(2, C, 5, 6, dtype=torch.float64) * 2 + 1
    torch.testing.assert_close(
        norm(x.float()).double(), expected_output(source, old, target, x), rtol=1e-4, atol=1e-4
    )
