"""Layers of installed libraries, where there are any, as judges of the formulas."""

import pytest
import torch
from torch import nn

from wsbcn_d2.layers import WSConv2d
from wsbcn_d2.weights.formulas import rescaled_weight


def convolutions(theirs, formula, **options):
    """A library's standardized convolution, and ours with its converted weights."""
    theirs = theirs(16, 8, 3, bias=True, **options).double()
    nn.init.normal_(theirs.weight, 0.02, 0.05)
    nn.init.normal_(theirs.bias)
    ours = WSConv2d(16, 8, 3).double()
    ours.weight.data = rescaled_weight(theirs.weight.data, formula)
    ours.bias.data = theirs.bias.data
    return ours, theirs


def check(ours, theirs):
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
        ours.weight.mul_(1.01)  # so the comparison does notice a scale, through eps alone
        assert (ours(x) - theirs(x)).abs().max() > 1e-6


def test_mmcv():
    conv_ws = pytest.importorskip("mmcv.cnn.bricks.conv_ws", reason="mmcv is not installed")
    check(*convolutions(conv_ws.ConvWS2d, "gn"))


def test_timm():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    check(*convolutions(layers.StdConv2d, "paper", padding=0, eps=1e-5))
