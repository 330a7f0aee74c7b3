"""The backbones under PyTorch's and fvcore's tools."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from fvcore.nn import FlopCountAnalysis, parameter_count
from torch import nn
from torch._dynamo.testing import CompileCounter
from versions import needs_compile, needs_newer_torch

from wsbcn_d2 import WSConv2d, add_wsbcn_config


def resnet18_fpn(norm, *opts):
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_wsbcn_resnet_fpn_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.DEPTH", "18"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.NORM", norm),
            *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']"),
            *("MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4', 'res5']"),
            *("MODEL.FPN.NORM", norm, "MODEL.FPN.OUT_CHANNELS", "32", *opts),
        ]
    )
    torch.manual_seed(0)
    return build_backbone(cfg, ShapeSpec(channels=3))


def test_fvcore_counts():
    """Those of the same backbone with group normalization, and what BCN and WS add."""
    x = torch.randn(1, 3, 64, 64)
    models = {norm: resnet18_fpn(norm).eval() for norm in ("GN", "BCN+WS")}
    flops = {}
    for norm, model in models.items():
        flops[norm] = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
    # For each value fvcore counts 4 in a layer normalization, which standardizes filters, and
    # nothing in the map by the estimates that BCN begins with.
    convs = [m for m in models["BCN+WS"].modules() if isinstance(m, WSConv2d)]
    assert flops["BCN+WS"].pop("layer_norm") == 4 * sum(c.weight.numel() for c in convs)
    assert flops["BCN+WS"] == flops["GN"] and flops["GN"]["conv"] > 1e8

    bcn, gn = parameter_count(models["BCN+WS"]), parameter_count(models["GN"])
    norms = sum(isinstance(m, nn.GroupNorm) for m in models["GN"].modules())
    assert bcn[""] == gn[""] + 2 * 32 * norms  # the affine of the groups
    # in training mode it counts less, but works
    FlopCountAnalysis(models["BCN+WS"].train(), x).unsupported_ops_warnings(False).total()


def block():
    """The residual block of the backbone: convolutions, norms, in-place ReLU and addition."""
    return resnet18_fpn("BCN+WS").bottom_up.res3[0]


@needs_compile
@pytest.mark.parametrize("train", [True, False])
def test_compile_without_graph_break(train):
    torch._dynamo.reset()
    model = block().conv1.train(train)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 64, 12, 10)
    for m in (model, compiled):
        m(x).square().mean().backward()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))
    for a, b in zip(other.parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@needs_compile
@needs_newer_torch
def test_update_rate_schedule_does_not_compile_again():
    torch._dynamo.reset()
    model = block().conv1
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(12):
        model.norm.update_rate = 0.1 / (i + 1)
        compiled(torch.randn(1, 64, 6, 5))
    assert counter.frame_count <= 2  # once more when it is found to vary


def test_torchscript_of_evaluation():
    """A trace must hold for images of another size."""
    model = block().eval()
    model(torch.randn(1, 64, 8, 8))
    x = torch.randn(2, 64, 12, 10)
    with torch.no_grad():
        expected = model(x)
        traced = torch.jit.trace(model, torch.randn(1, 64, 8, 8), check_trace=False)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
        for exported in (torch.jit.freeze(traced), torch.jit.script(model)):
            torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
