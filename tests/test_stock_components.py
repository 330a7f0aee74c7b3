"""Weight standardization in every part of Detectron2 that takes a norm option.

Which convolutions must be standardized is found by running the same part with plain GroupNorm and
watching which convolution's output tensor a normalization receives.
"""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ASPP, DepthwiseSeparableConv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_backbone
from detectron2.modeling.backbone import regnet, vit
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead, Res5ROIHeads
from detectron2_models import (
    an_image,
    logged,
    modules_of_type,
    randomize_norms,
    small_config,
    small_model,
)
from torch import nn
from torch.overrides import TorchFunctionMode

import wsbcn_d2
from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.layers import WeightStandardized

CONVS = (nn.Conv2d, nn.ConvTranspose2d)
STAGES = ["res2", "res3", "res4", "res5"]


class DataFlow(TorchFunctionMode):
    """Notes which weights belong to a convolution whose very output is normalized."""

    def __init__(self):
        super().__init__()
        self.convolved, self.normalized_weights = [], set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (F.conv2d, F.conv_transpose2d):
            self.convolved.append((out, args[1]))
        elif function is F.group_norm:
            self.normalized_weights.update(id(w) for y, w in self.convolved if y is args[0])
        return out


def convs_that_feed_norms(model, run):
    """Of a model whose norms are nn.GroupNorm."""
    with DataFlow() as flow, torch.no_grad():
        run(model.eval())
    return {
        n
        for n, m in modules_of_type(model, CONVS).items()
        if id(m.weight) in flow.normalized_weights
    }


def standardized(model):
    return set(modules_of_type(model, WeightStandardized))


def biases(model):
    return {name for name, m in modules_of_type(model, CONVS).items() if m.bias is not None}


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in flat(value)]


# ------------------------------------------------------------------------------------ components


def noise(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape) + 1.0


def pyramid(channels=32, first=32, levels=5):
    return [noise(1, channels, first >> i, first >> i) + i for i in range(levels)]


def slim_resnet(norm, OUT_FEATURES=("res3",), **resnets):
    changes = {f"RESNETS__{k}": v for k, v in resnets.items()}
    changes["RESNETS__OUT_FEATURES"] = list(OUT_FEATURES)
    cfg = small_config("Base-RCNN-FPN.yaml", norm, **changes)
    return BACKBONE_REGISTRY.get("build_resnet_backbone")(cfg, ShapeSpec(channels=3))


def fpn(norm, top_block):
    bottom_up = slim_resnet("GN", OUT_FEATURES=["res4", "res5"])
    return FPN(bottom_up, ["res4", "res5"], 32, norm=norm, top_block=top_block)


def res5_of_c4_head(norm):
    return Res5ROIHeads._build_res5_block(small_config("Base-RCNN-C4.yaml", norm))[0]


def dense_head(kind, norm, **kwargs):
    return kind(
        input_shape=[ShapeSpec(channels=32)] * 5,
        num_classes=3,
        conv_dims=[32, 32],
        norm=norm,
        **kwargs,
    )


def any_net(norm, stem, block, se_ratio=0.0):
    return regnet.AnyNet(
        stem_class=stem,
        stem_width=32,
        block_class=block,
        depths=[1, 2],
        widths=[32, 64],
        group_widths=[8, 8],
        strides=[2, 2],
        bottleneck_ratios=[1.0, 1.0],
        se_ratio=se_ratio,
        activation_class=lambda: nn.ReLU(inplace=True),
        norm=norm,
    )


class Features(Backbone):
    """The last feature map of some network."""

    def __init__(self):
        super().__init__()
        self._out_features = ["last"]
        self._out_feature_channels, self._out_feature_strides = {"last": 128}, {"last": 16}

    def forward(self, x):
        return {"last": x}


def simple_feature_pyramid(norm):
    kind = vit.SimpleFeaturePyramid
    return kind(
        Features(), "last", 32, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), norm=norm
    )


def deeplab_shapes():
    return {"res2": ShapeSpec(channels=64, stride=4), "res5": ShapeSpec(channels=96, stride=16)}


def deeplab_features():
    return {"res2": noise(1, 64, 16, 16), "res5": noise(1, 96, 4, 4)}


def deeplab_arguments(norm, depthwise):
    return dict(
        project_channels=[32],
        aspp_dilations=[1, 2, 3],
        aspp_dropout=0.1,
        decoder_channels=[64, 64],
        common_stride=4,
        norm=norm,
        train_size=None,
        use_depthwise_separable_conv=depthwise,
    )


def deeplab_v3_plus(norm, depthwise=False):
    deeplab = pytest.importorskip("detectron2.projects.deeplab")
    return deeplab.DeepLabV3PlusHead(
        deeplab_shapes(), num_classes=4, ignore_value=255, **deeplab_arguments(norm, depthwise)
    )


def deeplab_v3(norm):
    deeplab = pytest.importorskip("detectron2.projects.deeplab")
    cfg = get_cfg()
    deeplab.add_deeplab_config(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.IN_FEATURES, head.ASPP_CHANNELS, head.CONVS_DIM, head.NUM_CLASSES = ["res5"], 64, 64, 4
    head.ASPP_DILATIONS, head.NORM, head.LOSS_TYPE = [1, 2, 3], norm, "hard_pixel_mining"
    return deeplab.DeepLabV3Head(cfg, deeplab_shapes())


def panoptic_deeplab(kind, norm, depthwise):
    # Importing it needs panopticapi, which Detectron2 does not install.
    pytest.importorskip("panopticapi", reason="detectron2.projects.panoptic_deeplab needs it")
    from detectron2.projects import panoptic_deeplab

    extra = {
        "PanopticDeepLabSemSegHead": dict(
            loss_weight=1.0,
            loss_type="cross_entropy",
            loss_top_k=0.2,
            ignore_value=255,
            num_classes=4,
        ),
        "PanopticDeepLabInsEmbedHead": dict(center_loss_weight=1.0, offset_loss_weight=1.0),
    }[kind]
    return getattr(panoptic_deeplab.panoptic_seg, kind)(
        deeplab_shapes(), head_channels=32, **extra, **deeplab_arguments(norm, depthwise)
    )


def on_image(model):
    return model(noise(1, 3, 64, 64))


def on_small_image(model):
    return model(noise(1, 3, 32, 32))


def on_features(channels, size=8):
    return lambda model: model(noise(2, channels, size, size))


def on_pyramid(model):
    return model(pyramid())


def on_named_pyramid(model):
    return model(dict(zip(["p2", "p3", "p4", "p5"], pyramid(levels=4))))


def on_deeplab_features(model):
    return model(deeplab_features())


# name -> (build from a norm option, run)
COMPONENTS = {
    "ResNet-18": (lambda n: slim_resnet(n, DEPTH=18, STEM_OUT_CHANNELS=64), on_small_image),
    "ResNet-50": (slim_resnet, on_small_image),
    "ResNeXt-50 32x4d": (
        lambda n: slim_resnet(n, NUM_GROUPS=32, WIDTH_PER_GROUP=4, STRIDE_IN_1X1=False),
        on_small_image,
    ),
    "DC5": (lambda n: slim_resnet(n, RES5_DILATION=2, OUT_FEATURES=["res5"]), on_small_image),
    "C4's res5": (res5_of_c4_head, on_features(256, 4)),
    "FPN": (lambda n: fpn(n, LastLevelMaxPool()), on_image),
    "FPN with p6 and p7": (lambda n: fpn(n, LastLevelP6P7(512, 32)), on_image),
    "box head": (
        lambda n: FastRCNNConvFCHead(
            ShapeSpec(channels=32, height=8, width=8), conv_dims=[32, 32], fc_dims=[16], conv_norm=n
        ),
        on_features(32),
    ),
    "mask head": (
        lambda n: MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=32), num_classes=3, conv_dims=[32, 32, 32], conv_norm=n
        ),
        lambda model: model.layers(noise(2, 32, 8, 8)),
    ),
    "RetinaNet head": (lambda n: dense_head(RetinaNetHead, n, num_anchors=2), on_pyramid),
    "FCOS head": (lambda n: dense_head(FCOSHead, n), on_pyramid),
    "semantic FPN head": (
        lambda n: SemSegFPNHead(
            {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 6)},
            num_classes=4,
            conv_dims=32,
            common_stride=4,
            norm=n,
        ),
        on_named_pyramid,
    ),
    "ASPP": (lambda n: ASPP(32, 64, [1, 2, 3], norm=n, activation=F.relu), on_features(32)),
    "separable conv": (
        lambda n: DepthwiseSeparableConv2d(32, 64, norm1=n, norm2=n, activation1=F.relu),
        on_features(32),
    ),
    "separable conv, one norm": (
        lambda n: DepthwiseSeparableConv2d(32, 64, norm2=n),
        on_features(32),
    ),
    "DeepLabV3 head": (deeplab_v3, on_deeplab_features),
    "DeepLabV3+ head": (deeplab_v3_plus, on_deeplab_features),
    "DeepLabV3+ head, separable": (lambda n: deeplab_v3_plus(n, True), on_deeplab_features),
    **{
        f"{kind}{', separable' if separable else ''}": (
            lambda n, kind=kind, separable=separable: panoptic_deeplab(kind, n, separable),
            on_deeplab_features,
        )
        for kind in ("PanopticDeepLabSemSegHead", "PanopticDeepLabInsEmbedHead")
        for separable in (False, True)
    },
    "RegNetX": (lambda n: any_net(n, regnet.SimpleStem, regnet.ResBottleneckBlock), on_image),
    "RegNetY": (lambda n: any_net(n, regnet.ResStem, regnet.ResBottleneckBlock, 0.25), on_image),
    "AnyNet, basic": (lambda n: any_net(n, regnet.SimpleStem, regnet.ResBasicBlock), on_image),
    "AnyNet, vanilla": (lambda n: any_net(n, regnet.SimpleStem, regnet.VanillaBlock), on_image),
    "ViT's residual block": (
        lambda n: vit.ResBottleneckBlock(64, 64, 32, norm=n),
        on_features(64),
    ),
    "simple feature pyramid": (simple_feature_pyramid, on_features(128, 4)),
}

# Convolutions that predict, or that nothing normalizes.
NEVER_STANDARDIZED = {
    "FPN with p6 and p7": {"top_block.p6", "top_block.p7"},
    "mask head": {"deconv", "predictor"},
    "RetinaNet head": {"cls_score", "bbox_pred"},
    "FCOS head": {"cls_score", "bbox_pred", "ctrness"},
    "semantic FPN head": {"predictor"},
    "ASPP": {"convs.4.1"},
    "separable conv, one norm": {"depthwise"},
    "DeepLabV3 head": {"predictor", "aspp.convs.4.1"},
    "DeepLabV3+ head": {"predictor", "decoder.res5.project_conv.convs.4.1"},
    "DeepLabV3+ head, separable": {"predictor", "decoder.res5.project_conv.convs.4.1"},
    "PanopticDeepLabSemSegHead": {"predictor", "decoder.res5.project_conv.convs.4.1"},
    "PanopticDeepLabSemSegHead, separable": {"predictor", "decoder.res5.project_conv.convs.4.1"},
    "PanopticDeepLabInsEmbedHead": {
        "center_predictor",
        "offset_predictor",
        "decoder.res5.project_conv.convs.4.1",
    },
    "PanopticDeepLabInsEmbedHead, separable": {
        "center_predictor",
        "offset_predictor",
        "decoder.res5.project_conv.convs.4.1",
    },
    "RegNetY": {f"{block}.f.se.f_ex.{i}" for block in ("s1.b1", "s2.b1", "s2.b2") for i in (0, 2)},
    "simple feature pyramid": {"simfp_2.3", "simfp_3.0"},
}


def build(name, norm):
    torch.manual_seed(0)
    return COMPONENTS[name][0](norm)


def is_in_bottom_up(name):
    """The ResNet below the FPN under test, which has a norm of its own."""
    return name.startswith("bottom_up.")


def reinitialize(conv):
    """Gives every filter another scale and offset."""
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    scale = torch.linspace(2.0, 4.0, conv.out_channels).view(shape)
    offset = torch.linspace(-1.0, 1.0, conv.out_channels).view(shape)
    with torch.no_grad():
        conv.weight.mul_(scale).add_(offset * conv.weight.std())


def change(before, after):
    """The largest change of any output, in units of its standard deviation."""
    return max(float((x - y).abs().max() / x.std()) for x, y in zip(before, after))


@pytest.mark.parametrize("name", COMPONENTS)
def test_exactly_the_convs_that_feed_a_norm_are_standardized(name):
    run = COMPONENTS[name][1]
    stock = build(name, "GN")
    expected = {n for n in convs_that_feed_norms(stock, run) if not is_in_bottom_up(n)}
    rest = {n for n in modules_of_type(stock, CONVS) if not is_in_bottom_up(n)} - expected
    assert rest == NEVER_STANDARDIZED.get(name, set()) and expected
    for norm in ("GN+WS", "BCN+WS"):
        with logged("detectron2.wsbcn_d2") as messages:
            model = build(name, norm)
        assert standardized(model) == expected
        assert not messages
        assert biases(model) == biases(stock)
    assert not standardized(build(name, "BCN")) and not standardized(stock)


@pytest.mark.parametrize("name", COMPONENTS)
def test_offset_and_scale_of_a_filter_matter_only_without_standardization(name):
    """What weight standardization does, seen from outside the component."""
    run = COMPONENTS[name][1]
    model = randomize_norms(build(name, "BCN+WS")).eval()
    plain = randomize_norms(build(name, "BCN")).eval()
    with torch.no_grad():
        for n in standardized(model):
            model.get_submodule(n).weight.mul_(100.0)  # so that eps is negligible
        before, before_plain = flat(run(model)), flat(run(plain))
        for n in standardized(model):
            reinitialize(model.get_submodule(n))
            reinitialize(plain.get_submodule(n))
        after = flat(run(model))
        difference = change(before, after)
        assert difference < 1e-3
        difference = change(before_plain, flat(run(plain)))
        assert difference > 0.1  # a norm alone does not hide it
        for n in NEVER_STANDARDIZED.get(name, ()):
            conv = model.get_submodule(n)
            weight = conv.weight.clone()
            reinitialize(conv)
            difference = change(after, flat(run(model)))
            assert difference > 0.02, n
            conv.weight.copy_(weight)


# ------------------------------------------------------------------------------------- whole models

META_ARCHITECTURES = {
    "Mask R-CNN FPN": ("Base-RCNN-FPN.yaml", {}),
    "C4": ("Base-RCNN-C4.yaml", {}),
    "DC5": ("Base-RCNN-DilatedC5.yaml", {}),
    "RetinaNet": ("Base-RetinaNet.yaml", dict(FPN__OUT_CHANNELS=64)),
    "Panoptic FPN": (
        "Base-RCNN-FPN.yaml",
        dict(META_ARCHITECTURE="PanopticFPN", SEM_SEG_HEAD__NAME="SemSegFPNHead"),
    ),
    "semantic FPN": ("Base-RCNN-FPN.yaml", dict(META_ARCHITECTURE="SemanticSegmentor")),
}


@pytest.mark.parametrize("name", META_ARCHITECTURES)
def test_whole_model_from_yaml(name):
    base, changes = META_ARCHITECTURES[name]
    changes = {"RETINANET__SCORE_THRESH_TEST": 0.0, "ROI_HEADS__SCORE_THRESH_TEST": 0.0, **changes}
    stock = small_model(base, "GN", **changes)
    expected = convs_that_feed_norms(stock, lambda model: model([an_image()]))
    model = small_model(base, "BCN+WS", **changes)
    assert standardized(model) == expected
    norms = {n for n, m in stock.named_modules() if type(m) is nn.GroupNorm}
    assert set(modules_of_type(model, BatchChannelNorm)) == norms and norms
    predictors = ("predictor", "score", "pred", "logits", "deltas", "offset", "rpn_head")
    assert not [n for n in standardized(model) if any(p in n for p in predictors)]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@pytest.mark.parametrize("backbone", ["", "_fpn", "retinanet"])
def test_registered_backbones_have_the_parameters_of_the_stock_ones(backbone, depth):
    """Built on the meta device: nothing is computed."""
    suffix = {"": "resnet", "_fpn": "resnet_fpn", "retinanet": "retinanet_resnet_fpn"}[backbone]
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "BCN+WS"
    with torch.device("meta"):
        cfg.MODEL.BACKBONE.NAME = f"build_wsbcn_{suffix}_backbone"
        model = build_backbone(cfg)
        cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
        cfg.MODEL.BACKBONE.NAME = f"build_{suffix}_backbone"
        stock = build_backbone(cfg)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in stock.state_dict().items()}.items() <= shapes.items()
    has_norm = {n for n, m in modules_of_type(stock, nn.Conv2d).items() if getattr(m, "norm", None)}
    assert standardized(model) == has_norm
    added = {key.rpartition(".")[2] for key in shapes.keys() - stock.state_dict().keys()}
    assert added == {"ws_eps", "running_mean", "running_var", "group_weight", "group_bias"}
    assert model.output_shape() == stock.output_shape()


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_block(modulated):
    """The deformable convolution is standardized; the zero-initialized one that predicts its
    offsets is not, and neither class of Detectron2 is a torch.nn.Conv2d."""
    pytest.importorskip("detectron2._C", reason="Detectron2 is installed without compiled ops")
    from wsbcn_d2.layers.weight_standardization import WSDeformConv, WSModulatedDeformConv

    block = DeformBottleneckBlock(
        32, 64, bottleneck_channels=32, norm="BCN+WS", deform_modulated=modulated
    )
    assert type(block.conv2) is (WSModulatedDeformConv if modulated else WSDeformConv)
    assert standardized(block) == {"conv1", "conv2", "conv3", "shortcut"}
    assert not block.conv2_offset.weight.any()
    block.conv2.weight.data.normal_()
    plain = BottleneckBlock(32, 64, bottleneck_channels=32, norm="BCN+WS")
    torch.testing.assert_close(
        block.conv2.standardized_weight().flatten(1).std(1, unbiased=False),
        torch.ones(32),
        rtol=1e-4,
        atol=0,
    )
    if torch.cuda.is_available():  # with offsets 0 and masks 0.5, a plain convolution
        if modulated:
            block.conv2_offset.bias.data[-9:] = 30.0  # masks 1
        block, plain = block.cuda().eval(), plain.cuda().eval()
        state = {k: v for k, v in block.state_dict().items() if "offset" not in k}
        plain.load_state_dict(state)
        x = torch.randn(1, 32, 8, 8, device="cuda")
        torch.testing.assert_close(block(x), plain(x), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------- where it cannot have an effect


@pytest.mark.parametrize(
    "before",
    [
        [nn.ReLU()],
        [nn.Conv2d(3, 32, 3), nn.ReLU()],
        [nn.Linear(3, 32)],
        [nn.Conv2d(3, 32, 3), nn.Conv2d(32, 2, 1)],  # another layer's predictor
    ],
)
def test_norm_that_follows_no_convolution_is_an_error(before):
    found = type(before[-1]).__name__
    place = rf"Sequential.{len(before)} asks for weight standardization \('\+WS'\)"
    with pytest.raises(ValueError, match=f"{place}.*follows a {found},.*32 output channels"):
        nn.Sequential(*before, get_norm("GN+WS", 32))


def test_zero_initialized_block_of_vit_starts_as_the_identity_and_can_be_trained():
    """One step of SGD must not throw the block far from the identity: with the zero in the weight
    of BCN's first normalization, the second would divide by the deviation of zeros."""
    block = vit.ResBottleneckBlock
    movement = {}
    for norm in ("GN", "BCN"):
        torch.manual_seed(0)
        model = nn.ModuleList([block(64, 64, 32, norm=norm)])[0]
        x = torch.randn(1, 64, 10, 10)
        torch.testing.assert_close(model(x), x)
        model(x).backward(torch.randn(1, 64, 10, 10))
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
        movement[norm] = (model(x) - x).std().item()
    assert movement["GN"] > 0
    assert 0 < movement["BCN"] < 0.05  # 0.1 with the zero in the other weight


def test_backbone_without_the_keys_of_the_package():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_wsbcn_resnet_backbone"
    with pytest.raises(KeyError, match=r"call wsbcn_d2.add_wsbcn_config\(cfg\)"):
        build_backbone(cfg)
