"""BCN in training mode within ``torch.func`` and forward-mode differentiation."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jacrev, jvp, stack_module_state, vmap

from wsbcn_d2 import BatchChannelNorm

MODES = pytest.mark.parametrize("mode", ["estimate", "batch"])


def net(mode, seed=0):
    torch.manual_seed(seed)
    norm = BatchChannelNorm(4, 2, mode=mode)
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    norm.running_mean.normal_()
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm).double()


def image():
    return torch.randn(2, 2, 5, 6, dtype=torch.float64)


def call(model, values, x):
    """With buffers of its own."""
    return functional_call(model, {**dict(copy.deepcopy(model).named_buffers()), **values}, (x,))


@MODES
@pytest.mark.parametrize("frozen", [False, True])
def test_several_models_at_once(mode, frozen):
    models, x = [net(mode, seed).train() for seed in range(3)], image()
    for model in models:
        model[1].requires_grad_(not frozen)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))
    expected = stack_module_state(models)[1]
    torch.testing.assert_close(buffers, expected)
    assert bool(expected["1.seen_elements"].any()) != frozen


@MODES
@pytest.mark.parametrize("detached", [False, True])
def test_forward_mode_is_what_reverse_mode_is(mode, detached):
    model, x = net(mode), image()
    values = {n: p.detach() if detached else p for n, p in model.named_parameters()}
    directions = {n: torch.randn_like(p) for n, p in values.items()}
    y, tangent = jvp(lambda values: call(model, values, x), (values,), (directions,))
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    twin = copy.deepcopy(model)
    grads = torch.autograd.grad((twin(x) * weights).sum(), list(twin.parameters()))
    by_reverse = sum((g * d).sum() for g, d in zip(grads, directions.values()))
    torch.testing.assert_close((tangent * weights).sum(), by_reverse)


@MODES
def test_estimates_have_no_tangent(mode):
    model, x = net(mode), image()
    expected = copy.deepcopy(model)
    expected(x)
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(model[1].running_mean).tangent is None
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()))


@MODES
def test_jacobians(mode):
    model, x = net(mode), image()
    weights = torch.randn(2, 4, 3, 4, dtype=torch.float64)

    def loss(scale):
        return (call(model, {"1.weight": scale}, x) * weights).sum((1, 2, 3))

    scale = model[1].weight.detach()
    torch.testing.assert_close(jacfwd(loss)(scale), jacrev(loss)(scale))
