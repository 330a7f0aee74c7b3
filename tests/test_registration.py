"""What importing the package changes in Detectron2, for whom, and that it can be undone."""

import importlib
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d
from detectron2.layers import get_norm as detectron2_get_norm
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2_models import logged, small_config, small_model
from torch import nn
from torch.nn.modules import module as torch_module

import wsbcn_d2
from wsbcn_d2 import BatchChannelNorm, WSConv2d
from wsbcn_d2.engine import Trainer
from wsbcn_d2.export import fold

BACKBONES = {
    "build_wsbcn_resnet_backbone",
    "build_wsbcn_resnet_fpn_backbone",
    "build_wsbcn_retinanet_resnet_fpn_backbone",
}


def global_hooks():
    """Those of the package."""
    tables = (
        torch_module._global_module_registration_hooks,
        torch_module._global_buffer_registration_hooks,
        torch_module._global_parameter_registration_hooks,
    )
    hooks = [hook for table in tables for hook in table.values()]
    return [hook for hook in hooks if hook.__module__.startswith("wsbcn_d2")]


@pytest.fixture
def unregistered():
    wsbcn_d2.unregister()
    yield
    wsbcn_d2.register()


def run_python(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


IMPORT_ORDERS = {
    "Detectron2 and its users first": """
import detectron2.modeling
from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicStem, get_norm as resnet_get_norm
try:
    get_norm("BCN+WS", 64)
    raise SystemExit("stock Detectron2 knows BCN+WS")
except KeyError as error:
    assert error.args == ("BCN+WS",)
import wsbcn_d2
import wsbcn_d2 as again
""",
    "the package first": """
import sys
import wsbcn_d2
assert "detectron2.projects.deeplab" not in sys.modules
import detectron2.modeling
from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicStem, get_norm as resnet_get_norm
""",
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_modules_that_import_get_norm_before_and_after(order):
    """A module imports the function by name, so whoever has it must have the new one."""
    out = run_python(
        IMPORT_ORDERS[order]
        + """
from detectron2.projects.deeplab.resnet import DeepLabStem  # imported last in both orders
for norm in (get_norm("BCN(groups=16)+WS", 48), resnet_get_norm(norm="BCN", out_channels=64)):
    assert type(norm) is wsbcn_d2.BatchChannelNorm, norm
for stem in (BasicStem(norm="BCN+WS"), DeepLabStem(norm="BCN+WS")):
    assert type(stem.conv1) is wsbcn_d2.WSConv2d and type(stem.conv1.norm) is type(norm)
print("built")
"""
    )
    assert out.strip().endswith("built")


def test_every_module_of_detectron2_holds_the_same_function():
    holders = [
        m
        for name, m in list(sys.modules.items())
        if name.startswith("detectron2.") and hasattr(m, "get_norm")
    ]
    assert len(holders) >= 8
    assert all(type(m.get_norm("BCN+WS", 64)) is BatchChannelNorm for m in holders)


def test_importing_and_registering_again_changes_nothing():
    hooks = global_hooks()
    assert wsbcn_d2.is_registered() and hooks
    wsbcn_d2.register()
    importlib.reload(wsbcn_d2)
    assert global_hooks() == hooks
    wsbcn_d2.unregister()
    assert not global_hooks() and not wsbcn_d2.is_registered()  # once is enough
    wsbcn_d2.register()
    assert len(global_hooks()) == len(hooks)


class TestUnregistered:
    @pytest.fixture(autouse=True)
    def _unregistered(self, unregistered):
        pass

    @pytest.mark.parametrize("option", ["BCN", "BCN+WS", "GN+WS", "CN", "GN(groups=8)", "unknown"])
    def test_options_are_unknown_to_detectron2(self, option):
        with pytest.raises(KeyError) as error:
            detectron2_get_norm(option, 64)
        assert error.value.args == (option,)
        with pytest.raises(KeyError):
            build_model(small_config("Base-RCNN-FPN.yaml", option))

    def test_stock_options_are_stock(self):
        assert type(detectron2_get_norm("GN", 64)) is nn.GroupNorm
        with pytest.raises(ValueError, match="must be divisible by num_groups"):
            detectron2_get_norm("GN", 48)
        assert detectron2_get_norm("", 64) is None and detectron2_get_norm(None, 64) is None
        assert detectron2_get_norm.__code__.co_filename.endswith("batch_norm.py")

    def test_hooks_and_backbones_are_gone(self):
        assert not global_hooks()
        assert not BACKBONES & {name for name, _ in BACKBONE_REGISTRY}
        norm = wsbcn_d2.get_norm("BCN+WS", 64)
        assert type(Conv2d(3, 64, 3, norm=norm)) is Conv2d

    def test_again_does_nothing_and_registering_again_works(self):
        wsbcn_d2.unregister()
        wsbcn_d2.register()
        assert type(detectron2_get_norm("BCN+WS", 64)) is BatchChannelNorm
        assert type(Conv2d(3, 64, 3, norm=detectron2_get_norm("BCN+WS", 64))) is WSConv2d
        assert BACKBONES <= {name for name, _ in BACKBONE_REGISTRY}

    def test_a_model_built_before_remains_as_it_is(self):
        wsbcn_d2.register()
        conv = Conv2d(3, 64, 3, norm=detectron2_get_norm("BCN+WS", 64))
        x = torch.randn(1, 3, 8, 8)
        conv.eval()
        y = conv(x)
        wsbcn_d2.unregister()
        assert type(conv) is WSConv2d
        torch.testing.assert_close(conv(x), y)


def describe(model):
    return [
        (name, type(m), [*m._parameters], [*m._buffers], [*m._forward_pre_hooks])
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("base", ["Base-RCNN-FPN.yaml", "Base-RetinaNet.yaml"])
@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_models_with_stock_norms_are_those_of_stock_detectron2(base, norm):
    wsbcn_d2.unregister()
    try:
        stock = small_model(base, norm)
    finally:
        wsbcn_d2.register()
    with logged("detectron2.wsbcn_d2") as messages:
        model = small_model(base, norm)
    assert not messages
    assert describe(model) == describe(stock)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters()))


def test_plain_modules_register_as_ever():
    """None, replacement, buffers and containers of modules that are none of our business."""
    m = nn.Module()
    m.child = nn.Linear(2, 2)
    m.child = replacement = nn.Conv2d(2, 2, 1)
    m.add_module("none", None)
    m.register_buffer("pixel_mean", torch.zeros(3))
    m.register_buffer("empty", None)
    m.norm = nn.GroupNorm(1, 2)
    assert m.child is replacement and type(replacement) is nn.Conv2d
    assert list(m._modules) == ["child", "none", "norm"] and m.none is None
    assert list(m.state_dict()) == [
        "pixel_mean",
        "child.weight",
        "child.bias",
        "norm.weight",
        "norm.bias",
    ]


def test_config_keys_and_backbones_through_a_config():
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    small = small_config("Base-RCNN-FPN.yaml", "BCN+WS")
    small.MODEL.WSBCN = cfg.MODEL.WSBCN
    small.MODEL.BACKBONE.NAME = "build_wsbcn_resnet_fpn_backbone"
    stock = small_model("Base-RCNN-FPN.yaml", "BCN+WS")
    torch.manual_seed(0)
    assert describe(build_model(small)) == describe(stock)


@pytest.mark.parametrize("norm", ["BCN+WS", "GN+WS"])
def test_blocks_and_heads_with_bcn_get_faster_classes(norm):
    model = small_model("Base-RCNN-FPN.yaml", norm)
    ours = {type(m) for m in model.modules() if type(m).__module__.startswith("wsbcn_d2.modeling")}
    names = {"FusedBasicStem", "FusedBottleneckBlock", "FusedConvFCHead", "FusedConvUpsampleHead"}
    assert {kind.__name__ for kind in ours} == (names if norm == "BCN+WS" else set())
    folded = {type(m) for m in fold(model).modules()}
    assert {kind.__base__ for kind in ours} <= folded and not ours & folded


@pytest.mark.parametrize(
    "base, changes",
    [
        ("Base-RCNN-FPN.yaml", {}),
        ("Base-RCNN-C4.yaml", {}),
        ("Base-RetinaNet.yaml", {}),
        ("Base-RCNN-FPN.yaml", dict(META_ARCHITECTURE="SemanticSegmentor")),
        (
            "Base-RCNN-FPN.yaml",
            dict(META_ARCHITECTURE="PanopticFPN", SEM_SEG_HEAD__NAME="SemSegFPNHead"),
        ),
    ],
)
def test_the_trainer_says_once_what_was_standardized(base, changes):
    with logged("detectron2.wsbcn_d2") as messages:
        model = Trainer.build_model(small_config(base, "BCN+WS", **changes))
    (message,) = messages
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    standardized = [m for m in convs if type(m) is WSConv2d]
    norms = [m for m in model.modules() if isinstance(m, BatchChannelNorm)]
    assert message.startswith(type(model).__name__)
    assert f"{len(standardized)} of {len(convs)} convolutions" in message
    assert f"{len(norms)} BatchChannelNorm" in message
    for name, part in model.named_children():
        n = sum(type(m) is WSConv2d for m in part.modules())
        assert not n or f"{name} {n} of " in message


def test_norm_layer_of_a_built_model_can_be_put_anywhere():
    """Its convolution has been standardized; grouping layers must not look for another one."""
    conv = Conv2d(3, 32, 1, norm=detectron2_get_norm("GN+WS", 32))
    other = nn.Conv2d(32, 32, 1)
    nn.ModuleList([conv.norm])
    nn.Sequential(other, conv.norm)
    assert type(conv).__name__ == "WSConv2d" and type(other) is nn.Conv2d
