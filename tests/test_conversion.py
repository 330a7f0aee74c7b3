"""wsbcn_d2.convert: compared with models that are built from norm options, and with formulas."""

import copy
import functools
import pickle

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d, get_norm
from detectron2.layers.batch_norm import LayerNorm
from detectron2.utils.events import EventStorage
from detectron2_models import a_training_image, logged, modules_of_type, small_model
from oracles import channel_norm, estimated_bcn, standardized_weight
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d, WSConvTranspose2d, fold
from wsbcn_d2.conversion import convert
from wsbcn_d2.layers import WeightStandardized

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
NORMS = (nn.GroupNorm, nn.InstanceNorm2d, FrozenBatchNorm2d, CycleBatchNormList)
NORMS += (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d, LayerNorm)
LOGGER = "detectron2.wsbcn_d2"
C, EPS = 8, 1e-3  # an eps that is none of the defaults


@torch.no_grad()
def as_if_trained(model):
    """Gives everything in norm layers a value of its own, so that none goes unnoticed."""
    for module in model.modules():
        if isinstance(module, NORMS):
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                if name.endswith(("weight", "running_var")):
                    value.uniform_(0.5, 1.5)
                elif name.endswith(("bias", "running_mean")):
                    value.normal_(0.0, 0.3)
    return model


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
    return as_if_trained(norm)


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
    maps = list(model.backbone(torch.randn(2, 3, 64, 64)).values())
    return maps + [t for out in model.head(maps) for t in out] if hasattr(model, "head") else maps


def assert_all_close(xs, ys, **tolerance):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        torch.testing.assert_close(x, y, **tolerance)


# ---------------------------------------------------------------------------- models of Detectron2


def test_model_is_what_its_config_would_have_built():
    source = as_if_trained(small_model(MASK_RCNN, "BN")).eval()
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
    return as_if_trained(small_model(MASK_RCNN, "GN"))


def test_converted_model_trains_saves_and_folds():
    source = as_if_trained(small_model(MASK_RCNN, "BN"))
    model = convert(source, "BCN+WS", keep_function=True)
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


def test_features_do_not_change_where_only_filters_do(trained):
    model = convert(copy.deepcopy(trained).eval(), "GN+WS", keep_function=True)
    assert len(modules_of_type(model, WSConv2d)) == len(modules_of_type(model, nn.GroupNorm))
    assert_all_close(features(model), features(trained.eval()), rtol=1e-3, atol=1e-4)


def test_levels_of_a_shared_head():
    """RetinaNet's BN has statistics for each level, in a CycleBatchNormList."""
    source = as_if_trained(small_model(RETINANET, "BN")).eval()
    original = copy.deepcopy(source)
    built = small_model(RETINANET, "BCN").eval()
    built.load_state_dict(source.state_dict(), strict=False)  # which takes them, level by level
    convert(source, "BCN")
    assert source.head.cls_subnet[1].running_mean.shape == (5, 32)
    assert same(source.state_dict(), built.state_dict())
    assert_all_close(features(source), features(built))

    # A forward pass that ends halfway does not shift the levels of the next.
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
    norm = layer(source)
    old = values(norm)
    model = net(norm).eval()
    convert(model, target)
    assert model[2] is norm
    frozen = source in FROZEN
    built = FrozenBatchNorm2d(C) if frozen and "BN" in target else get_norm(target, C)
    assert type(norm) is type(built) and norm.state_dict().keys() == built.state_dict().keys()
    assert all(p.requires_grad != frozen for p in norm.parameters())
    x = torch.randn(2, C, 5, 6, dtype=torch.float64) * 2 + 1
    y = norm(x.float()).double()
    torch.testing.assert_close(y, expected_output(source, old, target, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["no affine", "no statistics"])
@pytest.mark.parametrize("target", ["SyncBN", "BCN(groups=2)", "naiveSyncBN", "GN(groups=2)"])
def test_layers_without_affine_or_statistics(kind, target):
    norm = layer(kind)
    old = values(norm)
    convert(nn.Sequential(norm), target)
    new = values(norm)
    assert all(torch.equal(new[k], v) for k, v in old.items() if k in new)
    if target == "SyncBN":
        assert type(norm) is nn.SyncBatchNorm and new.keys() == old.keys()
    else:
        assert new.keys() == get_norm(target, C).state_dict().keys()
        norm.train()(torch.randn(2, C, 4, 4))


def test_arguments_of_the_option_are_taken_and_those_of_the_layer_kept():
    model = net(nn.BatchNorm2d(C, eps=EPS, momentum=0.3))
    norm = convert(model, "SyncBN")[2]
    assert (type(norm), norm.eps, norm.momentum) == (nn.SyncBatchNorm, EPS, 0.3)
    norm = convert(model, "SyncBCN(groups=2, update_rate=0.01)")[2]
    assert (norm.mode, norm.num_groups, norm.update_rate, norm.eps) == ("sync", 2, 0.01, EPS)
    norm = convert(model, "BCN(groups=4)")[2]
    assert (norm.mode, norm.num_groups, norm.update_rate, norm.eps) == ("estimate", 4, 0.1, EPS)


def test_what_is_converted_already_stays():
    model = as_if_trained(convert(net(nn.BatchNorm2d(C)), "BCN(groups=2)+WS", keep_function=True))
    model[2].skipped_updates.fill_(3)
    old, tensors = values(model), [*model.parameters(), *model.buffers()]
    convert(model, "BCN(groups=2)+WS")
    assert same(old, values(model))
    assert all(x is y for x, y in zip(tensors, [*model.parameters(), *model.buffers()]))


def test_converted_layer_can_be_put_elsewhere():
    model = convert(net(nn.BatchNorm2d(C)), "BCN(groups=2)+WS")
    nn.Sequential(nn.ReLU(), model[2])  # where a new layer with "+WS" is an error


def test_only_convolutions_that_feed_a_norm_are_standardized():
    model = nn.Sequential(
        nn.Conv2d(3, C, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(C, C, 2),
        nn.GroupNorm(2, C),
        Conv2d(C, C, 1, norm=nn.BatchNorm2d(C), activation=nn.ReLU()),
        nn.Conv2d(C, 4, 1),
        nn.LayerNorm(4),
    )
    convert(model, "BCN(groups=4)+WS")
    assert set(modules_of_type(model, WeightStandardized)) == {"2", "4"}
    assert type(model[2]) is WSConvTranspose2d and type(model[6]) is nn.LayerNorm
    x = torch.randn(1, 3, 4, 4)
    y = model[:6](x)
    with torch.no_grad():
        for m in (model[2], model[4]):
            w = m.weight.detach().transpose(0, 1) if m is model[2] else m.weight.detach()
            w = standardized_weight(w.double()).float()
            m.weight.copy_(w.transpose(0, 1) if m is model[2] else w)
            m.__class__ = nn.ConvTranspose2d if m is model[2] else Conv2d
        model[3].reset_parameters()
        model[4].norm.reset_parameters()
    torch.testing.assert_close(model[:6](x), y, rtol=1e-4, atol=1e-4)


def test_layer_in_two_places_standardizes_both_convolutions():
    norm = nn.BatchNorm2d(C)
    model = nn.Sequential(nn.Conv2d(3, C, 1), norm, nn.Conv2d(C, C, 1), norm)
    convert(model, "BN+WS")
    assert set(modules_of_type(model, WSConv2d)) == {"0", "2"} and model[1] is model[3]


def test_model_of_another_library():
    model = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)  # made too early, but has what it can
    convert(model, "BCN+WS")
    convolutions = modules_of_type(model, nn.Conv2d)
    assert set(modules_of_type(model, WSConv2d)) == set(convolutions) and len(convolutions) == 20
    assert len(modules_of_type(model, BatchChannelNorm)) == 20
    start = values(model)
    model(torch.randn(1, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    unchanged = {k for k, v in values(model).items() if torch.equal(v, start[k])}
    without = ("ws_eps", "skipped_updates", "group_weight", "group_bias")
    assert unchanged == {k for k in start if k.endswith(without)}


@pytest.mark.parametrize("norm", ["BCN+WS", "CN+WS", "GN+WS"])
@torch.no_grad()
def test_fx_traces_what_it_traces_unconverted(norm):
    model = torchvision.models.resnet18(num_classes=4).eval()
    model.conv1 = nn.Sequential(nn.ConvTranspose2d(3, 64, 2), nn.Conv2d(64, 64, 7, 4))
    stock = [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]
    convert(model, norm)
    as_if_trained(model)
    x = torch.randn(2, 3, 64, 64)
    outputs = {}
    for name in ("layer2.0.conv1", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
    logits, expected = model(x), dict(outputs)

    traced = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes] == stock
    assert torch.equal(traced(x), logits)
    assert traced.state_dict().keys() == model.state_dict().keys()
    features = create_feature_extractor(model, list(expected))(x)
    assert features.keys() == expected.keys()
    assert all(torch.equal(features[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------- keep_function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_filters_keep_what_they_are(dtype):
    convs = [nn.Conv2d(4, C, 3, groups=2), nn.ConvTranspose2d(4, C, 3, groups=2)]
    for conv in convs:
        nn.init.normal_(conv.weight, 0.02, 0.01)
        conv.weight.data[:, 1] = 0.5
        model = nn.Sequential(conv, nn.BatchNorm2d(C)).to(dtype)
        expected = conv.weight.detach().clone()
        convert(model, "BN+WS", keep_function=True)
        atol = 0.004 if dtype == torch.bfloat16 else 1e-7  # a digit of the largest weight, 0.5
        torch.testing.assert_close(
            conv.standardized_weight().detach(), expected, rtol=1e-6, atol=atol
        )
        with torch.no_grad():
            conv.weight.mul_(3).add_(1)  # which still is of no consequence, but for eps
        torch.testing.assert_close(
            conv.standardized_weight().detach(), expected, rtol=0.1, atol=0.01
        )


def test_detectron2_pads_with_zeros():
    model = nn.Sequential(Conv2d(4, C, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(C))
    x = torch.randn(2, 4, 6, 6)
    expected = model.eval()(x)
    convert(model, "BN+WS", keep_function=True)
    torch.testing.assert_close(model(x), expected)


class Factor(nn.Module):
    """As FCOS has one for each level."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def test_frozen_layers_of_levels_stay_frozen():
    """There is no frozen kind of the layers that "BN" means there."""
    head = nn.Module()
    head.scales = nn.ModuleList(Factor() for _ in range(3))
    head.norm = nn.GroupNorm(2, C).requires_grad_(False)
    with pytest.raises(ValueError, match="norm.*it is frozen, and BatchNorm2d for 3 feature lev"):
        convert(nn.Sequential(head), "BN")


def with_statistics(mean, std, images=2, size=6):
    """Images whose channels have these means and deviations, each of them."""
    x = torch.randn(images, len(mean), size, size)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), unbiased=False, keepdim=True)
    return x * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)


def test_bcn_has_the_scale_and_mean_of_the_old_layer():
    """Exact where images are as the statistics say."""
    norm = layer("BN").eval()
    x = with_statistics(norm.running_mean, norm.running_var.sqrt())
    expected = norm(x).detach()
    loaded = convert(nn.Sequential(copy.deepcopy(norm)), "BCN(groups=2)").eval()
    kept = convert(nn.Sequential(norm), "BCN(groups=2)", keep_function=True).eval()
    torch.testing.assert_close(kept(x).detach(), expected, rtol=1e-2, atol=1e-2)
    assert (loaded(x) - expected).abs().max() > 0.3


WITHOUT_STATISTICS = ["GN(groups=2)", "GN(groups=4)", "CN(groups=4)", "IN", "LN", "no statistics"]


@pytest.mark.parametrize("source", WITHOUT_STATISTICS)
@pytest.mark.parametrize("target", ["BCN(groups=2)", "BCN(groups=2)+WS", "naiveSyncBN", "FrozenBN"])
def test_function_that_cannot_be_kept_without_data(source, target):
    model = net(layer(source))
    state, kinds = values(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"keep_function: .*needs statistics.* 2\).*give data"):
        convert(model, target, keep_function=True)
    assert same(values(model), state) and [type(m) for m in model.modules()] == kinds
    convert(model, "CN(groups=2)", keep_function=True)  # which needs none


@pytest.mark.parametrize("source", [s for s in WITHOUT_STATISTICS if s != "LN"])
@pytest.mark.parametrize("target", ["BCN(groups=2)", "BatchBCN(groups=4)", "BN", "FrozenBN"])
def test_statistics_from_data_keep_the_function_of_a_typical_image(source, target):
    if source == "no statistics" and target == "BN":
        pytest.skip("BN without statistics stays so")
    norm = layer(source).eval()
    mean, std = torch.randn(C), torch.rand(C) + 0.5
    data = [with_statistics(mean, std, n) for n in (1, 3)]
    expected = [norm(x).detach() for x in data]
    model = convert(nn.Sequential(norm), target, keep_function=True, data=iter(data))
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, std**2, rtol=1e-4, atol=1e-4)
    for x, y in zip(data, expected):
        torch.testing.assert_close(model(x).detach(), y, rtol=2e-3, atol=2e-3)


def test_affine_per_group_is_kept_for_all_images():
    """Where it is the same for all channels of a group, BCN does what GN does."""
    norm = nn.GroupNorm(2, C).eval()
    norm.weight.data = torch.tensor([0.5, -2.0]).repeat_interleave(4)
    norm.bias.data = torch.tensor([1.0, 0.3]).repeat_interleave(4)
    x = with_statistics(torch.randn(C), torch.rand(C) + 1)
    y = torch.rand(2, C, 6, 6) * 3
    expected = norm(y).detach()
    model = convert(nn.Sequential(norm), "BCN(groups=2)", keep_function=True, data=[x])
    assert type(norm) is BatchChannelNorm
    torch.testing.assert_close(model(y).detach(), expected, rtol=1e-4, atol=1e-4)


def test_levels_get_statistics_of_their_own():
    model = as_if_trained(small_model(RETINANET, "GN", FPN__OUT_CHANNELS=64)).eval()
    inputs = []
    handle = model.head.cls_subnet[1].register_forward_pre_hook(lambda m, x: inputs.append(*x))
    images = [a_training_image() for _ in range(2)]
    model([images[0]]), model([images[1]])
    handle.remove()
    convert(model, "BCN", keep_function=True, data=[[image] for image in images])
    means = [torch.cat([inputs[i], inputs[i + 5]]).mean((0, 2, 3)) for i in range(5)]
    torch.testing.assert_close(model.head.cls_subnet[1].running_mean, torch.stack(means))


def test_data_that_do_not_fit():
    model = net(layer("GN(groups=2)"))
    for data, message in (
        ([], "data: there are no inputs in it"),
        ([torch.full((1, 3, 9, 9), float("inf"))], "data: the input of 2 has infinite or NaN val"),
        ([torch.randn(1, 4, 9, 9)], "data: the model cannot be called with them .RuntimeError: "),
        (torch.randn(1, 3, 9, 9), "data: expected an iterable of inputs, got a Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, "BCN(groups=2)", keep_function=True, data=data)
    assert type(model[2]) is nn.GroupNorm and model.training


def test_detector_with_group_norm_computes_nearly_what_it_did(trained):
    model = copy.deepcopy(trained).eval()
    expected = features(model)
    data = [torch.randn(8, 3, 64, 64)]
    kept, changed = copy.deepcopy(model), convert(copy.deepcopy(model), "BCN")
    convert(kept.backbone, "BCN+WS", keep_function=True, data=data)
    for x, y, z in zip(features(kept), features(changed), expected):
        assert (x - z).norm() < 0.5 * z.norm() < 0.5 * (y - z).norm()


def test_log_tells_of_a_changed_function():
    def messages(norm, option="BN+WS", **kwargs):
        with logged(LOGGER) as found:
            convert(net(norm), option, **kwargs)
        return [m for m in found if "seems to have been trained" in m]

    assert messages(layer("BN"))
    assert not messages(nn.BatchNorm2d(C))
    assert not messages(layer("BN"), "BN")
    assert not messages(layer("BN"), keep_function=True)


# ------------------------------------------------------------------------- what must stay as it is


def test_frozen_layers_stay_frozen():
    model = net(layer("FrozenBN"))
    old = values(model[2])
    with logged(LOGGER) as messages:
        convert(model, "BCN(groups=2)")
    assert any("1 of them are frozen" in m for m in messages)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[2].frozen and same({k: values(model[2])[k] for k in old}, old)

    model = net(nn.GroupNorm(2, C).requires_grad_(False))
    assert type(convert(model, "SyncBN")[2]) is FrozenBatchNorm2d
    model = net(nn.BatchNorm2d(C).requires_grad_(False))
    assert type(convert(model, "BN")[2]) is nn.BatchNorm2d  # not asked for anything else
    model = net(nn.InstanceNorm2d(C)).requires_grad_(False)
    assert convert(model, "BCN(groups=2)")[2].frozen
    assert not convert(net(nn.InstanceNorm2d(C)), "BCN(groups=2)")[2].frozen


def test_parameters_stay_the_same_objects():
    norm = layer("BN")
    norm.weight.requires_grad_(False)
    weight, bias = norm.weight, norm.bias
    convert(nn.Sequential(norm), "BCN(groups=2)")
    assert norm.weight is weight and norm.bias is bias
    assert not weight.requires_grad and bias.requires_grad and norm.group_weight.requires_grad
    assert {n for n, _ in norm.named_parameters()} >= {"weight", "bias", "group_weight"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtype(dtype):
    model = convert(net(layer("BN")).to(dtype), "BCN(groups=2)")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model[2].running_var.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(C), nn.InstanceNorm2d(C)])
def test_device(norm):
    model = convert(net(copy.deepcopy(norm)).to("meta"), "BCN(groups=2)+WS")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_modes():
    model = nn.Sequential(net(nn.BatchNorm2d(C)), net(nn.GroupNorm(2, C)).eval())
    modes = [m.training for m in model.modules()]
    convert(model, "BCN(groups=2)+WS")
    assert [m.training for m in model.modules()] == modes


def test_hooks():
    model, calls = net(nn.BatchNorm2d(C)), []
    handles = [
        model[2].register_forward_hook(lambda m, args, out: calls.append("forward")),
        model[2].register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True),
        model[2].register_full_backward_hook(lambda m, i, o: calls.append("backward")),
    ]
    convert(model, "BCN(groups=2)")
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "pre"]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert len(calls) == 3


def test_block_that_starts_as_the_identity():
    """With the zero in the weight of the batch normalization, a step would throw it far off."""
    norm = layer("BN")
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    model = net(norm)
    convert(model, "BCN(groups=2)", keep_function=True)
    assert (norm.weight == 1).all() and not norm.group_weight.any()
    y = norm(torch.randn(1, C, 4, 4))
    assert not y.any()
    y.backward(torch.randn(1, C, 4, 4))
    assert 0 < norm.group_weight.grad.abs().max() < 100


# ------------------------------------------------------------------------------------------ errors


class Swish(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).sigmoid() * x


def first(last):
    """A model whose last layer cannot be converted."""
    return nn.Sequential(net(nn.BatchNorm2d(C)), nn.Sequential(*last))


@pytest.mark.parametrize(
    "model, norm, error, message",
    [
        (first([]), "BNC+WS", ValueError, "unknown norm option 'BNC"),
        (first([]), "", ValueError, "unknown norm option ''"),
        (first([]), "BCN+WS", ValueError, r"0\.2: .*8 channels .*32 groups; 'BCN\(groups=8\)\+WS'"),
        (
            first([nn.Conv2d(C, 2 * C, 1), nn.BatchNorm2d(C)]),
            "GN(groups=2)+WS",
            ValueError,
            r"cannot convert 1\.1: it has 8 channels and follows a Conv2d, .* 16 output channels",
        ),
        (
            first([nn.Conv1d(C, C, 1), nn.GroupNorm(2, C)]),
            "CN(groups=2)",
            ValueError,
            r"cannot convert 1\.1: .*follows a Conv1d, and not feature maps",
        ),
        (
            first([nn.Conv3d(C, C, 1), nn.ReLU(), nn.Sequential(nn.GroupNorm(2, C))]),
            "CN(groups=2)",
            ValueError,
            r"cannot convert 1\.2\.0: .*follows a Conv3d, and not feature maps",
        ),
        (
            first([nn.Sequential(nn.Linear(C, C), nn.ReLU()), nn.GroupNorm(2, C)]),
            "CN(groups=2)",
            ValueError,
            r"cannot convert 1\.1: .*follows a Linear, and not feature maps",
        ),
        (first([Swish(C)]), "GN(groups=2)", TypeError, r"cannot convert 1\.0, .*Swish"),
        (
            first([nn.DataParallel(net(nn.BatchNorm2d(C)))]),
            "GN(groups=2)",
            TypeError,
            "within Data",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "BN", ValueError, "nothing to convert: none of Batch"),
        (nn.BatchNorm2d(C), "BN+WS", ValueError, "cannot convert the model: .*the layer only"),
    ],
)
def test_errors_leave_the_model_unchanged(model, norm, error, message):
    def everything():
        return [
            (
                m,
                type(m),
                m.training,
                [id(v) for v in [*m._parameters.values(), *m._buffers.values()]],
            )
            for m in model.modules()
        ]

    before, state = everything(), values(model)
    with pytest.raises(error, match=message):
        convert(model, norm, keep_function=True)
    assert everything() == before and same(values(model), state)


def test_group_norm_behind_a_layer_for_something_else():
    """The blocks of diffusion models embed the time step there."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.embed = nn.Conv2d(C, C, 1), nn.Linear(4, C)
            self.norm2 = nn.GroupNorm(2, C)

        def forward(self, x, t):
            return self.norm2(self.conv1(x) + self.embed(t)[..., None, None])

    model = convert(Block(), "CN(groups=2)")
    assert model(torch.randn(1, C, 4, 4), torch.randn(1, 4)).shape == (1, C, 4, 4)


def norm_act(name, base, act, *args, drop=None):
    """A layer with the structure of timm's."""

    def forward(self, x):
        return self.act(self.drop(base.forward(self, x)))

    kind = type(name, (base,), {"forward": forward, "__module__": "timm.layers.norm_act"})
    norm = kind(*args)
    norm.drop, norm.act = drop or nn.Identity(), act
    return norm


@pytest.mark.parametrize("target", ["BCN(groups=2)+WS", "GN(groups=2)", "BN+WS", "BN"])
@pytest.mark.parametrize("source", ["BatchNormAct2d", "GroupNormAct", "GroupNorm1Act"])
def test_layers_of_timm_keep_their_activation(source, target):
    torch.manual_seed(0)
    groups = {"GroupNormAct": 2, "GroupNorm1Act": 1}.get(source)
    arguments = (C,) if groups is None else (groups, C)
    base = nn.BatchNorm2d if groups is None else nn.GroupNorm
    norm = as_if_trained(norm_act(source, base, nn.SiLU(), *arguments, drop=nn.Dropout(0.5)))
    stock = base(*arguments)
    stock.load_state_dict(norm.state_dict())
    model = net(norm).eval()
    expected = nn.Sequential(*copy.deepcopy(model)[:2], stock, nn.Dropout(0.5), nn.SiLU(), model[3])
    convert(expected.eval(), target), convert(model, target)
    assert model[2] is norm and type(norm) is nn.Sequential
    assert [type(m) for m in norm][1:] == [nn.Dropout, nn.SiLU]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(fold(model)(x), expected(x), rtol=1e-4, atol=1e-5)


def test_layers_of_timm_without_activation():
    norm = norm_act("GroupNorm1", nn.GroupNorm, nn.Identity(), 1, C)
    model = convert(net(norm), "BCN(groups=2)+WS")
    assert type(model[2]) is BatchChannelNorm and type(model[1]) is WSConv2d


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "resnetv2_50"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    convert(model, "BN+WS", keep_function=True, example_inputs=x)
    assert modules_of_type(model, WSConv2d)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_a_layer_alone():
    norm = nn.BatchNorm2d(C)
    assert convert(norm, "CN(groups=2)") is norm and type(norm) is ChannelNorm
