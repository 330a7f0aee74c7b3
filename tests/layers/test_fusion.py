"""Normalization with what follows it: fused or not, the results are the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d
from wsbcn_d2.layers import is_hooked, normalize

ACTIVATIONS = [None, F.relu, F.relu_, torch.relu, torch.relu_, nn.ReLU(), nn.ReLU(inplace=True)]
ACTIVATIONS += [F.gelu, nn.SiLU(), lambda x: 2 * x]


def norms():
    layers = [BatchChannelNorm(8, 2, mode=mode) for mode in ("estimate", "batch")]
    layers += [ChannelNorm(8, 2), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), None]
    for norm in layers[:-1]:
        for p in norm.parameters():
            nn.init.normal_(p, 1.0, 0.5)
    return [norm if norm is None else norm.double() for norm in layers]


def outcome(function, norm, x, residual):
    """Output, gradients and buffers."""
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    y = function(*leaves)
    leaves += [] if norm is None else list(norm.parameters())
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    buffers = [] if norm is None else [b.clone() for b in norm.buffers()]
    return [y.detach(), [g for g in grads if g is not None], buffers]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", norms())
def test_same_as_one_after_the_other(norm, activation):
    other = copy.deepcopy(norm)
    x, residual = torch.randn(2, 2, 8, 5, 4, dtype=torch.float64)

    def stock(x, r):
        y = x if other is None else other(x)
        y = y + r if with_residual else y
        return y if activation is None else activation(y.clone())

    def ours(x, r):
        # an activation in place must not change the input, which is nobody's temporary here
        x = x.clone() if norm is None and not with_residual else x
        return normalize(x, norm, r if with_residual else None, activation)

    for with_residual in (False, True):
        torch.testing.assert_close(
            outcome(ours, norm, x, residual), outcome(stock, other, x, residual)
        )


def test_in_one_pass(monkeypatch):
    """The output of the norm layer is already that of what follows."""
    norm = BatchChannelNorm(8, 2)
    calls = []
    forward = BatchChannelNorm.forward
    monkeypatch.setattr(
        BatchChannelNorm,
        "forward",
        lambda *args, **kwargs: calls.append(kwargs) or forward(*args, **kwargs),
    )
    x, residual = torch.randn(2, 2, 8, 5, 4)
    y = normalize(x, norm, residual, F.relu_)
    assert calls[0]["activation"] == "relu" and calls[0]["residual"] is residual and (y >= 0).all()
    conv = WSConv2d(8, 8, 1, norm=norm, activation=nn.ReLU())
    assert (
        (conv(x) >= 0).all() and calls[1]["activation"] == "relu" and calls[1]["residual"] is None
    )
    normalize(x, norm, None, F.gelu)
    assert not calls[2]


def test_replaced_forward_is_what_the_layer_does():
    norm = BatchChannelNorm(8, 2)
    norm.forward = lambda x: x - 1
    x, residual = torch.randn(2, 2, 8, 5, 4)
    torch.testing.assert_close(normalize(x, norm, residual, F.relu), F.relu(x - 1 + residual))


HOOKS = {
    "forward": lambda m, see: m.register_forward_hook(lambda m, x, y: see(y)),
    "forward_pre": lambda m, see: m.register_forward_pre_hook(lambda m, x: None),
    "backward": lambda m, see: m.register_full_backward_hook(lambda m, x, y: None),
    "backward_pre": lambda m, see: m.register_full_backward_pre_hook(lambda m, y: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_norm_see_what_it_alone_computes(kind):
    norm, x = BatchChannelNorm(8, 2).eval(), torch.randn(1, 8, 5, 4)
    conv = WSConv2d(8, 8, 1, norm=norm, activation=F.relu)
    expected = conv(x)
    alone = norm(conv._conv_forward(x, conv.standardized_weight(), conv.bias))
    assert not is_hooked(norm)
    seen = []
    handle = HOOKS[kind](norm, lambda y: seen.append(y.detach().clone()))
    assert is_hooked(norm)
    torch.testing.assert_close(conv(x), expected)
    if kind == "forward":
        torch.testing.assert_close(seen, [alone])
    handle.remove()
    assert not is_hooked(norm)


def test_hook_may_replace_the_output():
    conv = WSConv2d(8, 8, 1, norm=BatchChannelNorm(8, 2), activation=F.relu)
    conv.norm.register_forward_hook(lambda m, x, y: torch.full_like(y, -1.0))
    assert not conv(torch.randn(1, 8, 5, 4)).any()


def test_hooks_of_the_activation_are_called():
    conv = WSConv2d(8, 8, 1, norm=BatchChannelNorm(8, 2), activation=nn.ReLU())
    x, seen = torch.randn(1, 8, 5, 4), []
    expected = conv(x)
    conv.activation.register_forward_hook(lambda m, x, y: seen.append(y))
    torch.testing.assert_close(conv.eval()(x), conv.train(False)(x))
    assert len(seen) == 2 and (seen[0] >= 0).all() and expected.shape == seen[0].shape


@pytest.mark.parametrize("activation", [F.relu_, nn.ReLU()])
def test_convolutions_of_heads(activation):
    """As the stock convolution with the same filters, also for an empty input."""
    conv = WSConv2d(4, 8, 3, padding=1, norm=BatchChannelNorm(8, 2), activation=activation)
    stock = Conv2d(4, 8, 3, padding=1, norm=copy.deepcopy(conv.norm), activation=activation)
    stock.weight = nn.Parameter(conv.standardized_weight().detach().clone())
    stock.bias = conv.bias
    for n in (2, 0):
        x = torch.randn(n, 4, 6, 5)
        ours, theirs = conv(x), stock(x)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        assert conv.norm.weight.grad is not None
    torch.testing.assert_close(dict(conv.norm.named_buffers()), dict(stock.norm.named_buffers()))


class Alone(BatchChannelNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_subclass_that_takes_the_input_alone():
    norm, x, residual = Alone(8, 2), torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    expected = F.relu(copy.deepcopy(norm)(x) + residual)
    torch.testing.assert_close(normalize(x, norm, residual, F.relu), expected)


@pytest.mark.parametrize("wrong", [(1, 8, 1, 4), (2, 8, 5, 1), (2, 1, 5, 4), (2, 8, 5, 5)])
def test_residual_of_another_shape(wrong):
    """Kernels would read beyond it."""
    with pytest.raises(ValueError, match="residual"):
        BatchChannelNorm(8, 2)(torch.randn(2, 8, 5, 4), residual=torch.randn(wrong))
