"""The fused heads against Detectron2's own."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2_models import randomize_norms
from torch import nn

import wsbcn_d2  # noqa: F401  (registers the norm options)
from wsbcn_d2.modeling import fuse_
from wsbcn_d2.modeling.heads import HEADS

SHAPE = ShapeSpec(channels=8, height=6, width=6)


def box_head(norm):
    return FastRCNNConvFCHead(SHAPE, conv_dims=[32, 32, 64], fc_dims=[10, 12], conv_norm=norm)


def mask_head(norm):
    return MaskRCNNConvUpsampleHead(SHAPE, num_classes=3, conv_dims=[32, 32, 16], conv_norm=norm)


RUN = {box_head: lambda head, x: head(x), mask_head: lambda head, x: head.layers(x)}


def pair(make, norm):
    """The fused head and Detectron2's, with the same weights, in float64."""
    stock = randomize_norms(make(norm)).double()
    ours = copy.deepcopy(stock)
    fuse_(ours)
    assert type(ours) is HEADS[type(stock)]
    return ours, stock


def results(head, x, run):
    x = x.clone().requires_grad_()
    head.zero_grad(set_to_none=True)
    y = run(head, x)
    (y.square().sum() if y.numel() else y.sum()).backward()
    return [y.detach(), x.grad, [p.grad for p in head.parameters()], list(head.buffers())]


@pytest.mark.parametrize("make", RUN)
@pytest.mark.parametrize("norm", ["BCN+WS", "BCN", "BatchBCN+WS"])
def test_same_as_the_stock_head(make, norm):
    """In training and evaluation, and for no regions at all."""
    ours, stock = pair(make, norm)
    for _ in range(3):
        x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
        args = (x, RUN[make])
        torch.testing.assert_close(results(ours, *args), results(stock, *args))
        with torch.no_grad():
            for p, q in zip(ours.parameters(), stock.parameters()):
                q.copy_(p.mul_(1.01))
    args = (x[:0], RUN[make])
    torch.testing.assert_close(results(ours, *args), results(stock, *args))
    args = (x, RUN[make])
    torch.testing.assert_close(results(ours.eval(), *args), results(stock.eval(), *args))


@pytest.mark.parametrize("make", RUN)
def test_saves_no_output_between_two_convolutions(make):
    counts = []
    for head in pair(make, "BCN+WS"):
        x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
        ):
            RUN[make](head, x.requires_grad_())
        counts.append(sum(t.shape[0] == 4 and t.shape[2:] == (6, 6) for t in saved.values()))
    convolutions = len(head.conv_norm_relus)
    assert counts[1] - counts[0] == convolutions - 1


@pytest.mark.parametrize("make", RUN)
def test_hooks_are_called(make):
    ours, stock = pair(make, "BCN+WS")
    seen = []
    for head in (ours.eval(), stock.eval()):
        head.conv_norm_relus[1].register_forward_hook(lambda m, x, y: seen.append(y.detach()))
        RUN[make](head, torch.ones(2, 8, 6, 6, dtype=torch.float64))
    torch.testing.assert_close(*seen)


class Layers(nn.Module):
    """The layers of a mask head, whose own ``forward`` takes instances too."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head.layers(x)


@pytest.mark.parametrize("make", RUN)
def test_torchscript_of_evaluation(make):
    ours, stock = (head.eval() for head in pair(make, "BCN+WS"))
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    module = Layers(ours) if make is mask_head else ours
    with torch.no_grad():
        expected = RUN[make](stock, x)
        exported = [torch.jit.trace(module, x[:1], check_trace=False)]
        if make is box_head:  # the other needs Detectron2's own way to script instances
            exported.append(torch.jit.script(module))
        for function in exported:
            torch.testing.assert_close(function(x), expected)


@pytest.mark.parametrize("make", RUN)
@pytest.mark.parametrize("norm", ["", "GN", "CN+WS"])
def test_heads_without_bcn_are_left_alone(make, norm):
    head = make(norm)
    fuse_(head)
    assert type(head) in HEADS


def test_subclasses_are_left_alone():
    class Own(FastRCNNConvFCHead):
        pass

    head = Own(SHAPE, conv_dims=[32], fc_dims=[], conv_norm="BCN")
    fuse_(nn.ModuleList([head]))
    assert type(head) is Own
