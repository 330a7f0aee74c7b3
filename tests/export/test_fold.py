"""Folding. In float64, so that what is not exact cannot hide behind rounding."""

import copy
import pickle

import oracles
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, CycleBatchNormList, DeformConv, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, DeformBottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver.build import get_default_optimizer_params
from detectron2_models import an_image, modules_of_type, randomize_norms, small_model
from test_stock_components import COMPONENTS, dense_head, flat, noise, pyramid
from torch import nn
from torch.nn.utils import prune

import wsbcn_d2
from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d, WSConvTranspose2d
from wsbcn_d2.export import fold


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float32(float64):
    """For Detectron2's boxes, which are always float32."""
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def settled(model, run):
    """Every affine and estimate with a value of its own, but stock BN layers with the statistics of
    a batch: with others, activations explode."""
    for norm in modules_of_type(model.eval(), nn.BatchNorm2d).values():
        norm.momentum = None  # a plain average
        norm.train()
    run(model)
    estimates = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if isinstance(model.get_submodule(key.rpartition(".")[0]), nn.BatchNorm2d)
    }
    randomize_norms(model)
    model.load_state_dict(estimates, strict=False)
    return model.eval()


def assert_stock(model):
    """Nothing of the package is left: not a class, a hook, nor an attribute."""
    assert b"wsbcn_d2" not in pickle.dumps(model)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def assert_same_outputs(before, after):
    assert len(before) == len(after) > 0
    for x, y in zip(before, after):
        assert x.dtype == y.dtype
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9 * x.abs().max().item())


def kinds(model):
    return [type(m) for m in model.modules()]


# ------------------------------------------------------------------------------------- convolutions

CONVS = {
    "plain": dict(kernel_size=1),
    "padded, with bias": dict(kernel_size=3, padding=2, stride=2, bias=True),
    "grouped": dict(kernel_size=3, padding=1, groups=4),
    "depthwise": dict(kernel_size=3, padding=1, groups=8),
    "dilated, padding by name": dict(kernel_size=3, padding="same", dilation=2),
}


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("conv", CONVS)
def test_convolution_with_bcn(conv, standardized):
    arguments = {"bias": False, **CONVS[conv]}
    norm = BatchChannelNorm(16, num_groups=4)
    layer = (WSConv2d if standardized else Conv2d)(8, 16, norm=norm, activation=F.relu, **arguments)
    randomize_norms(layer).eval()
    x = torch.randn(2, 8, 9, 7)

    weight = oracles.standardized_weight(layer.weight) if standardized else layer.weight
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    z = F.conv2d(x, weight, layer.bias, stride, padding, dilation, layer.groups)
    affine = (norm.weight, norm.bias, norm.group_weight, norm.group_bias)
    expected = oracles.estimated_bcn(z, *affine, norm.running_mean, norm.running_var, None).y.relu()

    folded = fold(layer)
    assert kinds(folded) == [Conv2d, nn.GroupNorm]
    assert set(folded.state_dict()) == {"weight", "bias", "norm.weight", "norm.bias"}
    assert_same_outputs([expected], [folded(x)])
    assert_stock(folded)


@pytest.mark.parametrize("standardized", [False, True])
def test_transposed_convolution(standardized):
    kind = WSConvTranspose2d if standardized else nn.ConvTranspose2d
    conv = kind(8, 12, 3, stride=2, padding=1, output_padding=1, groups=4)
    model = randomize_norms(nn.Sequential(conv, BatchChannelNorm(12, num_groups=2)).eval())
    folded = fold(model)
    assert kinds(folded) == [nn.Sequential, nn.ConvTranspose2d, nn.GroupNorm]
    x = torch.randn(2, 8, 5, 6)
    assert_same_outputs([model(x)], [folded(x)])


def test_channel_norm():
    norm = randomize_norms(ChannelNorm(12, num_groups=3, eps=0.1))
    x = torch.randn(2, 12, 5, 6)
    expected = oracles.channel_norm(x, norm.weight, norm.bias, 0.1)
    folded = fold(norm)
    assert kinds(folded) == [nn.GroupNorm]
    assert_same_outputs([expected], [folded(x)])


@pytest.mark.parametrize("kind", [WSConv2d, WSConvTranspose2d])
def test_adapted_standardization(kind):
    """Filters that were trained without standardization, with their scale and mean kept."""
    conv = kind(8, 12, 3, groups=2)
    adapted = {"ws_scale": torch.rand(12) + 0.5, "ws_shift": torch.randn(12)}
    conv.load_state_dict({**conv.state_dict(), **adapted})
    x = torch.randn(1, 8, 5, 5)
    folded = fold(conv)
    assert set(folded.state_dict()) == {"weight", "bias"}
    assert_same_outputs([conv(x)], [folded(x)])
    flat_filters = folded.weight.transpose(0, 1) if kind is WSConvTranspose2d else folded.weight
    assert flat_filters.flatten(1).mean(1).abs().max() > 0.05  # the shift is there


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_padding_mode(mode):
    conv = WSConv2d(4, 8, 3, padding=1, padding_mode=mode)
    model = randomize_norms(nn.Sequential(conv, BatchChannelNorm(8, num_groups=2)).eval())
    x = torch.randn(1, 4, 6, 5)
    assert_same_outputs([model(x)], [fold(model)(x)])


def test_padding_mode_that_the_stock_layer_ignores():
    conv = WSConv2d(4, 8, 3, padding=1, padding_mode="reflect", norm=nn.GroupNorm(2, 8))
    with pytest.raises(TypeError, match="padding_mode='reflect'.*pads with zeros only"):
        fold(conv)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_block(modulated):
    if not issubclass(DeformConv, nn.Module):
        pytest.skip("Detectron2 is installed without compiled ops")
    if modulated and not torch.cuda.is_available():
        pytest.skip("Detectron2's modulated deformable convolution needs a GPU")
    block = DeformBottleneckBlock(
        32, 64, bottleneck_channels=32, norm="BCN+WS", deform_modulated=modulated
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    randomize_norms(block).eval().to(device, torch.float32)
    folded = fold(block)
    assert_stock(folded)
    # DeformConv has no bias
    assert kinds(folded).count(FrozenBatchNorm2d) == (0 if modulated else 1)
    x = torch.randn(1, 32, 8, 8, device=device, dtype=torch.float32)
    torch.testing.assert_close(folded(x), block(x), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------- Detectron2's components

# Of few groups: where a group is a single channel, the estimates do not matter.
NORMS = ["BCN(groups=8)+WS", "BCN(groups=4)", "BN+WS"]
MORE_NORMS = ["BatchBCN(groups=8)+WS", "SyncBCN(groups=8)", "CN(groups=8)+WS", "CN"]
MORE_NORMS += ["GN+WS", "FrozenBN+WS"]


@pytest.mark.parametrize(
    "name,norm",
    [
        *((name, norm) for name in COMPONENTS for norm in NORMS),
        *(("ResNet-50", norm) for norm in MORE_NORMS),
        ("ResNet-50", "LN+WS"),
    ],
)
def test_component(name, norm):
    build, run = COMPONENTS[name]
    model = settled(build(norm), run)
    with torch.no_grad():
        before = flat(run(model))
        folded = fold(model)
        assert_same_outputs(before, flat(run(folded)))
        assert_same_outputs(before, flat(run(folded)))  # levels start anew
    assert_stock(folded)
    # all of it went into the convolutions
    assert kinds(folded).count(FrozenBatchNorm2d) == kinds(model).count(FrozenBatchNorm2d)


@pytest.mark.parametrize("base", ["Base-RCNN-FPN.yaml", "Base-RCNN-C4.yaml", "Base-RetinaNet.yaml"])
def test_whole_model(base, float32):
    changes = {"RETINANET__SCORE_THRESH_TEST": 0.0, "ROI_HEADS__SCORE_THRESH_TEST": 0.0}
    if "RetinaNet" in base:
        changes["FPN__OUT_CHANNELS"] = 64
    model = randomize_norms(small_model(base, "BCN(groups=8)+WS", **changes))  # in training mode
    before = copy.deepcopy(model.state_dict())
    types, trainable = kinds(model), [p.requires_grad for p in model.parameters()]
    folded = fold(model)

    # the argument is as it was
    assert model.training and kinds(model) == types
    assert [p.requires_grad for p in model.parameters()] == trainable
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    assert_stock(folded)
    inputs = [an_image(), {**an_image(), "image": torch.rand(3, 64, 96) * 255}]
    with torch.no_grad():
        expected, found = model.eval()(inputs), folded(inputs)
    for x, y in zip(expected, found):
        x, y = x["instances"], y["instances"]
        assert len(x) == len(y) > 0
        torch.testing.assert_close(y.pred_boxes.tensor, x.pred_boxes.tensor, rtol=0, atol=0.01)
        torch.testing.assert_close(y.scores, x.scores, rtol=1e-4, atol=0)
        assert torch.equal(x.pred_classes, y.pred_classes)
        if x.has("pred_masks"):  # which are cut at a threshold that rounding may cross
            assert (x.pred_masks != y.pred_masks).float().mean() < 1e-3


def test_nothing_is_detected(float32):
    model = small_model("Base-RCNN-FPN.yaml", "BCN+WS", ROI_HEADS__SCORE_THRESH_TEST=1.1)
    with torch.no_grad():
        instances = fold(model)([an_image()])[0]["instances"]
    assert instances.pred_masks.shape == (0, 64, 64)


def test_levels():
    """Each has estimates of its own, without the hook that starts a pass at the first."""
    head = randomize_norms(dense_head(RetinaNetHead, "BCN(groups=8)+WS", num_anchors=2)).eval()
    assert head._forward_pre_hooks
    head.cls_subnet[1].level = 3  # a pass that ended halfway
    folded = fold(head)
    assert not folded._forward_pre_hooks
    cycles = modules_of_type(folded, CycleBatchNormList)
    assert set(cycles) == {
        f"{subnet}.{i}.0" for subnet in ("cls_subnet", "bbox_subnet") for i in (1, 4)
    }
    assert {len(cycle) for cycle in cycles.values()} == {5}
    features = pyramid()
    with torch.no_grad():
        expected = flat(head(features))
        for _ in range(3):
            assert_same_outputs(expected, flat(folded(features)))
        for cycle in cycles.values():
            cycle._pos = 1
        found = flat(folded(features))
        assert not torch.allclose(found[5], expected[5], rtol=0.01)  # the levels do differ


def test_checkpointed_blocks():
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_wsbcn_resnet_backbone"
    cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS = "backbone"
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.DEPTH = "BCN+WS", 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2"]
    backbone = randomize_norms(build_backbone(cfg)).eval()
    folded = fold(backbone)
    assert type(folded.res2[0]) is BasicBlock
    assert_stock(folded)
    x = noise(1, 3, 32, 32)
    with torch.no_grad():
        assert_same_outputs([backbone(x)["res2"]], [folded(x)["res2"]])


# ---------------------------------------------------- where BCN cannot become part of a convolution


class PreActivation(nn.Module):
    """A class that is not Detectron2's: only it knows in which order it calls its parts."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = BatchChannelNorm(32, 8)

    def forward(self, x):
        return self.conv(F.relu(self.norm(x)))


class Shared(nn.Module):
    """One convolution and two norms, or two convolutions and one norm."""

    def __init__(self, share_conv):
        super().__init__()
        convs = [nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)]
        norms = [BatchChannelNorm(32, 8), BatchChannelNorm(32, 8)]
        (convs if share_conv else norms).pop()
        self.first = nn.Sequential(convs[0], norms[0])
        self.second = nn.Sequential(convs[-1], norms[-1])

    def forward(self, x):
        return self.second(self.first(x))


def with_hook():
    conv = nn.Conv2d(32, 32, 1)
    conv.register_forward_hook(double_output)
    return nn.Sequential(conv, BatchChannelNorm(32, 8))


def double_output(module, inputs, output):
    return 2 * output


UNFOLDABLE = {
    "norm first": lambda: nn.Sequential(BatchChannelNorm(32, 8), nn.Conv2d(32, 32, 1)),
    "activation between": lambda: nn.Sequential(
        nn.Conv2d(32, 32, 1), nn.ReLU(), BatchChannelNorm(32, 8)
    ),
    "activation of the conv": lambda: nn.Sequential(
        Conv2d(32, 32, 1, activation=F.relu), BatchChannelNorm(32, 8)
    ),
    "another class": PreActivation,
    "shared conv": lambda: Shared(True),
    "shared norm": lambda: Shared(False),
    "hook of the user": with_hook,
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_frozen_batch_norm_before_group_norm(name):
    model = randomize_norms(UNFOLDABLE[name]()).eval()
    folded = fold(model)
    assert FrozenBatchNorm2d in kinds(folded)
    assert b"wsbcn_d2" not in pickle.dumps(folded)
    x = torch.randn(2, 32, 5, 4)
    assert_same_outputs([model(x)], [folded(x)])


# --------------------------------------------------------------------------- precision and refusals


@pytest.mark.parametrize("standardized", [False, True])
def test_float32(standardized):
    kind = WSConv2d if standardized else Conv2d
    model = randomize_norms(kind(64, 64, 3, bias=False, norm=BatchChannelNorm(64, 8))).eval()
    x = torch.randn(1, 64, 20, 20)
    exact = model(x)
    found = fold(model.float())(x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_estimates_keep_their_precision():
    """A variance beyond the range of float16, in a layer that is not folded into a convolution."""
    norm = BatchChannelNorm(32).half().eval()
    norm.running_var.fill_(1e6)
    folded = fold(norm)
    assert folded[0].running_var.dtype == torch.float32 and folded[1].weight.dtype == torch.float16


def test_folded_model_cannot_be_trained(float32):
    folded = fold(small_model("Base-RCNN-FPN.yaml", "BCN+WS"))
    parameters = get_default_optimizer_params(folded)
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(parameters, 0.1)


class DerivedConv(WSConv2d):
    pass


class DerivedNorm(BatchChannelNorm):
    pass


@pytest.mark.parametrize(
    "module,message",
    [
        (DerivedConv(4, 8, 1), "cannot fold 0, a .*DerivedConv: .*WSConv2d, and there is no stock"),
        (DerivedNorm(32), "cannot fold 0, a .*DerivedNorm: .*BatchChannelNorm, and there is no"),
    ],
)
def test_derived_classes(module, message):
    with pytest.raises(TypeError, match=message):
        fold(nn.Sequential(module))


def test_hooked_norm_keeps_its_input():
    """The convolution before it is not scaled, as it is not what the norm normalizes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BatchChannelNorm(8, 2)).eval()
    model[1].running_mean.normal_()
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(min=0),))
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(fold(model)(x), model(x))


def test_norm_options_of_the_folded_model():
    """What the request for standardization leaves on a stock layer goes, too."""
    conv = Conv2d(4, 32, 1, norm=get_norm("GN+WS", 32))
    assert b"wsbcn_d2" in pickle.dumps(conv.norm)
    assert_stock(fold(conv))


# ------------------------------------------------------------ tools that fold BatchNorm themselves


def by_torch(conv, norm):
    return torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm, isinstance(conv, nn.ConvTranspose2d))


def by_hand(conv, norm):
    """As toolboxes do it, in place."""
    factors = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shape = [1, -1, 1, 1] if isinstance(conv, nn.ConvTranspose2d) else [-1, 1, 1, 1]
    conv.weight = nn.Parameter(conv.weight * factors.view(shape))
    conv.bias = nn.Parameter((conv.bias - norm.running_mean) * factors + norm.bias)
    return conv


@pytest.mark.parametrize("fuse", [by_torch, by_hand])
@pytest.mark.parametrize("kind", [WSConv2d, WSConvTranspose2d])
def test_folding_by_other_tools(fuse, kind):
    """They know nothing of standardization, which would undo what they do to the filters."""
    model = randomize_norms(nn.Sequential(kind(4, 8, 3), nn.BatchNorm2d(8))).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    x = torch.randn(1, 4, 9, 9)
    expected = model(x)
    with pytest.raises(TypeError, match=r"wsbcn_d2\.fold\(model\) first"):
        fuse(*model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fuse(*fold(model))(x), expected)


def test_other_weights_can_be_assigned():
    conv = WSConv2d(4, 8, 3).eval()
    state = {**conv.state_dict(), "weight": torch.randn(8, 4, 3, 3)}
    conv.load_state_dict(state, assign=True)
    conv.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    conv.weight = nn.Parameter(conv.weight.detach().clone())
    conv.weight = nn.Parameter(torch.randn(8, 2, 1, 1))


# ------------------------------------------------------- weights that are computed; hooks of users


class Doubled(nn.Module):
    def forward(self, weight):
        return weight + weight.abs()


COMPUTED = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned, twice": lambda m: prune.random_unstructured(
        prune.ln_structured(m, "weight", 0.3, n=2, dim=0), "weight", 0.3
    ),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrized spectral_norm": nn.utils.parametrizations.spectral_norm,
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Doubled()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", [WSConv2d, nn.Conv2d, WSConvTranspose2d])
@pytest.mark.parametrize("compute", COMPUTED)
def test_computed_weights(compute, kind):
    model = randomize_norms(nn.Sequential(kind(4, 32, 3), BatchChannelNorm(32, 8)))
    COMPUTED[compute](model[0])
    x = torch.randn(2, 4, 6, 6)
    model(x)  # some compute their weights there, as part of a graph
    expected = model.eval()(x)
    folded = fold(model)
    if kind is not nn.Conv2d and compute != "parametrized weight_norm":  # which leaves a closure
        assert_stock(folded)
    assert_same_outputs([expected], [folded(x)])
    assert_same_outputs([expected], [model(x)])


def test_pruned_norm():
    model = randomize_norms(nn.Sequential(nn.Conv2d(4, 32, 3), BatchChannelNorm(32, 8))).eval()
    prune.l1_unstructured(model[1], "weight", 0.5)
    prune.l1_unstructured(model[1], "group_weight", 2)
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert_same_outputs([expected], [fold(model)(x)])


def scaled(module, inputs, output):
    return output * module.my_scale + module.my_shift


def with_input(module, inputs, output):
    return output + inputs[0].mean()


def halved(module, inputs):
    return (inputs[0] * 0.5 + 1,)


HOOKS = {
    "own attribute of a conv": lambda conv, norm: conv.register_forward_hook(scaled),
    "own attribute of a norm": lambda conv, norm: norm.register_forward_hook(scaled),
    "input of a norm": lambda conv, norm: norm.register_forward_hook(with_input),
    "changed input of a norm": lambda conv, norm: norm.register_forward_pre_hook(halved),
}


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("norm", [BatchChannelNorm, ChannelNorm])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_users(hook, norm, owned):
    norm = norm(32, 8)
    conv = WSConv2d(4, 32, 3, norm=norm if owned else None)
    for module in (conv, norm):
        module.my_scale = 3.0
        module.register_buffer("my_shift", torch.tensor(0.7))
    model = randomize_norms(nn.Sequential(conv) if owned else nn.Sequential(conv, norm)).eval()
    HOOKS[hook](conv, norm)
    x = torch.randn(2, 4, 6, 6)
    assert_same_outputs([model(x)], [fold(model)(x)])


def masked(conv, inputs):
    conv.weight.data.copy_(conv.original * conv.mask)


def test_hook_that_writes_the_weight():
    for kind in (nn.Conv2d, WSConv2d):
        model = randomize_norms(nn.Sequential(kind(4, 32, 3), BatchChannelNorm(32, 8))).eval()
        conv = model[0]
        conv.original, conv.mask = conv.weight.detach().clone(), torch.rand_like(conv.weight)
        conv.register_forward_pre_hook(masked)
        if kind is WSConv2d:
            with pytest.raises(TypeError, match="cannot fold 0, a WSConv2d: its forward pre-hooks"):
                fold(model)
            continue
        x = torch.randn(2, 4, 6, 6)
        assert_same_outputs([model(x)], [fold(model)(x)])


@pytest.mark.parametrize(
    "index, kind, method",
    [
        (0, "WSConv2d", "forward"),
        (0, "WSConv2d", "standardized_weight"),
        (0, "WSConv2d", "_conv_forward"),
        (1, "BatchChannelNorm", "forward"),
        (1, "BatchChannelNorm", "normalization"),
    ],
)
def test_method_of_an_instance(index, kind, method):
    model = nn.Sequential(WSConv2d(4, 32, 3), BatchChannelNorm(32, 8))
    module = model[index]
    setattr(module, method, lambda *args: 2 * getattr(type(module), method)(module, *args))
    with pytest.raises(TypeError, match=f"cannot fold {index}, a {kind}: it has a {method} of its"):
        fold(model)


def test_method_of_a_plain_convolution():
    """It stays, and so does what follows it."""
    model = randomize_norms(nn.Sequential(nn.Conv2d(4, 8, 3), BatchChannelNorm(8, 2))).eval()
    model[0]._conv_forward = lambda *args: 2 * nn.functional.conv2d(*args)
    x = torch.randn(2, 4, 6, 6)
    assert_same_outputs([model(x)], [fold(model)(x)])


def test_weight_that_is_no_parameter():
    conv = WSConv2d(4, 8, 3)
    del conv.weight
    conv.weight = torch.randn(8, 4, 3, 3)
    with pytest.raises(TypeError, match="cannot fold the model, a WSConv2d: its weight is no par"):
        fold(conv)
