"""The fused blocks of ResNets against Detectron2's own."""

import copy
import functools

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2_models import randomize_norms
from torch import nn

from wsbcn_d2 import BatchChannelNorm, add_wsbcn_config, convert
from wsbcn_d2.modeling import fuse_
from wsbcn_d2.modeling.backbone import build_wsbcn_resnet_backbone
from wsbcn_d2.modeling.blocks import FusedBasicBlock, FusedBasicStem, FusedBottleneckBlock

STOCK = {FusedBasicStem: BasicStem, FusedBasicBlock: BasicBlock}
STOCK[FusedBottleneckBlock] = BottleneckBlock


def config(depth, norm, *opts):
    """A narrow ResNet; 32 groups need 32 channels."""
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0"),
            *("MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.NORM", norm),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"),
            *("MODEL.RESNETS.OUT_FEATURES", "['stem', 'res2', 'res3', 'res4']"),
            *opts,
        ]
    )
    return cfg


def pair(depth, norm, *opts):
    """The registered backbone and Detectron2's, with the same random weights, in float64."""
    if depth < 50:  # Detectron2 knows no narrower ones
        opts = ("MODEL.RESNETS.STEM_OUT_CHANNELS", "64", *opts)
    cfg = config(depth, norm, *opts)
    models = [
        f(cfg, ShapeSpec(channels=3)) for f in (build_wsbcn_resnet_backbone, build_resnet_backbone)
    ]
    for module in models[1].modules():
        module.__class__ = STOCK.get(type(module), type(module))
    randomize_norms(models[1])
    models[0].load_state_dict(models[1].state_dict())
    return [m.double() for m in models]


def results(model, x):
    """Outputs, gradients (of the image too) and estimates."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    outputs = model(x)
    if x.numel():
        sum((i + 1) * y.square().mean() for i, y in enumerate(outputs.values())).backward()
    else:
        sum(y.sum() for y in outputs.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return [
        {name: y.detach() for name, y in outputs.items()},
        {"image": x.grad, **{name: grad for name, grad in grads.items() if grad is not None}},
        {name: b.clone() for name, b in model.named_buffers()},
    ]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BCN+WS", "BCN", "GN", "BatchBCN+WS", "CN", "FrozenBN"])
def test_same_as_the_stock_backbone(depth, norm):
    """Outputs, gradients and estimates, in training and evaluation, and for an empty batch."""
    ours, stock = pair(depth, norm)
    kinds = {type(m) for m in ours.modules()} & set(STOCK)
    assert len(kinds) == (2 if "BCN" in norm else 0) and not {
        type(m) for m in stock.modules()
    } & set(STOCK)
    assert [STOCK.get(type(m), type(m)) for m in ours.modules()] == [
        type(m) for m in stock.modules()
    ]
    ours.train()
    stock.train()
    close = dict(rtol=1e-6, atol=1e-8)
    for _ in range(2):
        x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
        torch.testing.assert_close(results(ours, x), results(stock, x), **close)
    torch.testing.assert_close(results(ours, x[:0]), results(stock, x[:0]), **close)
    torch.testing.assert_close(results(ours.eval(), x), results(stock.eval(), x), **close)


@pytest.mark.parametrize(
    "opts", [("MODEL.RESNETS.NUM_GROUPS", "2"), ("MODEL.BACKBONE.FREEZE_AT", "3")]
)
def test_variants(opts):
    """ResNeXt, and stages whose layers are frozen."""
    ours, stock = pair(50, "BCN+WS", "MODEL.RESNETS.STRIDE_IN_1X1", "False", *opts)
    assert any(isinstance(m, FusedBottleneckBlock) for m in ours.modules())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(results(ours, x), results(stock, x), rtol=1e-6, atol=1e-8)


def block(norm="BCN+WS"):
    """A block with a shortcut of its own, by itself, with estimates that are not (0, 1)."""
    model = build_wsbcn_resnet_backbone(config(50, norm), ShapeSpec(channels=3))
    return randomize_norms(model.res3[0])


def test_normalizations_are_fused():
    """Of a block with its shortcut two operations are in the graph."""
    x = torch.randn(1, 64, 8, 8)
    names = {}
    for kind in ("fused", "stock"):
        model = block()
        if kind == "stock":
            model.__class__ = BottleneckBlock
        y = model(x)
        nodes, names[kind] = [y.grad_fn], []
        while nodes:
            node = nodes.pop()
            name = node.name()
            if "AccumulateGrad" not in name and "Connect" not in name:
                names[kind].append(name)
                nodes += [following for following, _ in node.next_functions if following]
    assert len(names["fused"]) == 2 and all("Branch" in name for name in names["fused"])
    assert len(names["stock"]) == 4 * 2 + 4  # convolutions and their norms, 3 ReLU, 1 sum


@pytest.mark.parametrize("name", ["conv1", "conv3", "conv1.norm", "conv3.norm", "shortcut.norm"])
def test_hooks_see_what_they_see_in_the_stock_block(name):
    """The output of a convolution with its norm, before the addition and ReLU."""
    model = block().eval()
    stock = copy.deepcopy(model)
    stock.__class__ = BottleneckBlock
    x = torch.randn(2, 64, 8, 8)
    expected = model(x)
    seen = []
    for m in (model, stock):
        m.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append(y.detach().clone()))
        torch.testing.assert_close(m(x), expected)
    ours, theirs = seen
    torch.testing.assert_close(ours, theirs)
    assert (ours < 0).any()


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "shortcut"])
def test_another_module_in_place_of_a_convolution(name):
    """A shortcut with pooling, a convolution that someone else has made."""
    model = block()
    conv = getattr(model, name)
    other = nn.Sequential(
        nn.Conv2d(conv.in_channels, conv.out_channels, 1), nn.BatchNorm2d(conv.out_channels)
    )
    setattr(model, name, nn.Sequential(nn.AvgPool2d(2), other) if name == "shortcut" else other)
    if name == "conv1":  # which had the stride
        model.shortcut.stride = (1, 1)
    stock = copy.deepcopy(model)
    stock.__class__ = BottleneckBlock
    results = []
    for m in (model, stock):
        x = torch.linspace(-1, 1, 2 * 64 * 8 * 8).view(2, 64, 8, 8).requires_grad_()
        y = m(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_checkpointed_blocks():
    """See test_checkpointing.py for the whole."""
    ours, stock = pair(50, "BCN+WS", "MODEL.WSBCN.CHECKPOINT_ACTIVATIONS", "backbone")
    for _ in range(2):
        x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(results(ours, x), results(stock, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wrap", [False, True])
def test_forward_that_someone_gives_the_stock_class(monkeypatch, wrap):
    """After fusing, too."""
    block = convert(BottleneckBlock(64, 64, bottleneck_channels=32, norm="GN"), "BCN+WS")
    assert type(block) is FusedBottleneckBlock
    x, stock = torch.randn(1, 64, 4, 4), BottleneckBlock.forward

    def forward(self, x):
        return stock(self, x) + 1

    expected = block.eval()(x) + 1
    replacement = functools.wraps(stock)(forward) if wrap else forward
    monkeypatch.setattr(BottleneckBlock, "forward", replacement)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("depth", [18, 50])
def test_torchscript_of_evaluation(depth):
    """A trace must hold for images of another size."""
    ours, stock = (m.eval() for m in pair(depth, "BCN+WS"))
    small, x = torch.randn(1, 3, 32, 32).double(), torch.randn(2, 3, 64, 32).double()
    with torch.no_grad():
        ours(small)
        expected = stock(x)
        blocks = nn.Sequential(ours.stem, ours.res2, ours.res3, ours.res4).eval()
        traced = torch.jit.trace(blocks, small, check_trace=False)
        scripted = torch.jit.script(blocks)
        for exported in (traced, torch.jit.freeze(traced), scripted):
            torch.testing.assert_close(exported(x), expected["res4"])


def test_fuse_leaves_subclasses_alone():
    class Own(BottleneckBlock):
        pass

    own, stock = (c(64, 64, bottleneck_channels=32, norm="BCN") for c in (Own, BottleneckBlock))
    model = nn.ModuleList([own, stock])
    fuse_(model)
    fuse_(model)
    assert type(own) is Own and type(stock) is FusedBottleneckBlock and model[1] is stock
    assert isinstance(stock, BottleneckBlock)


def test_converted_to_another_norm_blocks_are_stock_again():
    model = nn.ModuleList([BottleneckBlock(64, 64, bottleneck_channels=32, norm="BN")])
    for norm, kind in (("BCN+WS", FusedBottleneckBlock), ("GN", BottleneckBlock)):
        convert(model, norm)
        assert type(model[0]) is kind


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BCN+WS", "CN", "GN+WS", "BN"])
def test_blocks_that_begin_as_the_identity(depth, norm):
    width = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "64"] if depth < 50 else []
    cfg = config(depth, norm, "MODEL.WSBCN.ZERO_INIT_RESIDUAL", "True", *width)
    model = build_wsbcn_resnet_backbone(cfg, ShapeSpec(channels=3))
    model.eval()  # the shortcut is called twice below, and each time would move its estimates
    blocks = [m for m in model.modules() if isinstance(m, (BasicBlock, BottleneckBlock))]
    assert len(blocks) == {18: 6, 50: 13}[depth]
    for block in blocks:
        x = torch.randn(2, block.in_channels, 6, 6)
        shortcut = x if block.shortcut is None else block.shortcut(x)
        y = block(x)
        torch.testing.assert_close(y, shortcut.relu())
        last = (block.conv3 if depth == 50 else block.conv2).norm
        factor = last.group_weight if isinstance(last, BatchChannelNorm) else last.weight
        (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), factor)
        assert gradient.isfinite().all() and gradient.count_nonzero() > 0.9 * gradient.numel()


@pytest.mark.parametrize("norm,freeze_at", [("FrozenBN", 0), ("BCN+WS", 2), ("", 0)])
def test_blocks_that_cannot_begin_as_the_identity(norm, freeze_at):
    opts = ["MODEL.WSBCN.ZERO_INIT_RESIDUAL", "True", "MODEL.BACKBONE.FREEZE_AT", str(freeze_at)]
    with pytest.raises(ValueError, match=r"last norm of res2.0 \(\w+\) has no trainable weight"):
        build_wsbcn_resnet_backbone(config(50, norm, *opts), ShapeSpec(channels=3))
