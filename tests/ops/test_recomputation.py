"""Activation checkpointing of layers that are called several times before one backward pass."""

import copy
import weakref

import pytest
import torch
from ops.cases import make_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint
from versions import needs_newer_torch

from wsbcn_d2 import BatchChannelNorm, WSConv2d
from wsbcn_d2.ops import recomputation

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


def make_norm(**kwargs):
    norm = BatchChannelNorm(6, 3, update_rate=0.3, **kwargs).double()
    for tensor, value in zip(norm.parameters(), make_inputs((1, 6, 1, 1), 3)[1:5]):
        tensor.data.copy_(value)
    return norm


def make_net():
    return nn.Sequential(
        WSConv2d(6, 6, 3, padding=1, norm=BatchChannelNorm(6, 3), activation=nn.ReLU()),
        WSConv2d(6, 6, 1, norm=BatchChannelNorm(6, 2, mode="batch")),
    ).double()


def views(count, shape=(1, 6, 4, 5)):
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(count)]


def gradients(module, inputs, run):
    """Of the inputs and parameters, of a loss of all outputs."""
    outputs = [run(module, x) for x in inputs]
    loss = sum((y * y.detach().roll(1)).sum() * (i + 1) for i, y in enumerate(outputs))
    return torch.autograd.grad(loss, [*inputs, *module.parameters()])


def plainly(module, x):
    return module(x)


def checkpointed(use_reentrant):
    return lambda module, x: checkpoint(module, x, use_reentrant=use_reentrant)


def by_backward(module, inputs, run):
    """As :func:`gradients`, for reentrant checkpointing, which wants ``backward``."""
    leaves = [*inputs, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    outputs = [run(module, x) for x in inputs]
    loss = sum((y * y.detach().roll(1)).sum() * (i + 1) for i, y in enumerate(outputs))
    loss.backward()
    return tuple(leaf.grad for leaf in leaves)


@REENTRANT
@pytest.mark.parametrize("make", [make_norm, make_net])
def test_several_calls_before_one_backward_pass(make, use_reentrant):
    """In three steps, as if nothing were checkpointed."""
    ours = make()
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        inputs = views(4)
        expected = gradients(theirs, inputs, plainly)
        found = by_backward(ours, inputs, checkpointed(use_reentrant))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@REENTRANT
def test_calls_within_one_checkpoint(use_reentrant):
    ours, theirs = make_norm(), make_norm()
    theirs.load_state_dict(ours.state_dict())

    def twice(norm, x):
        return norm(norm(x).sin() * 3 + 1)

    run = lambda norm, x: checkpoint(twice, norm, x, use_reentrant=use_reentrant)  # noqa: E731
    inputs = views(2)
    expected = gradients(theirs, inputs, twice)
    torch.testing.assert_close(by_backward(ours, inputs, run), expected)


@REENTRANT
def test_backward_passes_of_their_own_in_any_order(use_reentrant):
    ours, theirs = make_norm(), make_norm()
    theirs.load_state_dict(ours.state_dict())
    inputs = views(3)
    run = checkpointed(use_reentrant)
    outputs = [run(ours, x) for x in inputs]
    references = [theirs(x) for x in inputs]
    for i in (1, 0, 2):
        (expected,) = torch.autograd.grad(references[i].sin().sum(), inputs[i])
        outputs[i].sin().sum().backward()
        torch.testing.assert_close(inputs[i].grad, expected)


def test_the_same_graph_twice():
    norm, (x,) = make_norm(), views(1)
    y = checkpoint(norm, x, use_reentrant=False)
    first = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x), first)


@REENTRANT
def test_equal_inputs_cannot_be_told_apart(use_reentrant):
    """Nor need they be where they were normalized by the same estimates."""
    norm, (x,) = make_norm(), views(1)
    outputs = [checkpoint(norm, x, use_reentrant=use_reentrant) for _ in range(2)]
    with pytest.raises(RuntimeError, match="2 calls had equal inputs, and different estimates"):
        sum(outputs).sum().backward()
    norm, (x,) = make_norm(), views(1)
    norm.update_rate = 0.0
    outputs = [checkpoint(norm, x, use_reentrant=use_reentrant) for _ in range(2)]
    sum(outputs).sin().sum().backward()
    (expected,) = torch.autograd.grad((2 * norm(x)).sin().sum(), x)
    torch.testing.assert_close(x.grad, expected)


@needs_newer_torch
def test_passes_that_leave_no_graph_are_not_repeated():
    """For a loss alone, or ended by an error: equal inputs, and estimates that moved."""
    ours, theirs = make_net(), make_net()
    theirs.load_state_dict(ours.state_dict())
    (x,) = views(1)
    for _ in range(3):
        for net in (ours, theirs):
            with torch.no_grad():
                net(x)
            handle = net[1].register_forward_pre_hook(fails)
            with pytest.raises(ArithmeticError):
                checkpoint(net, x, use_reentrant=False)
            handle.remove()
        expected = gradients(theirs, [x], plainly)
        found = by_backward(ours, [x], checkpointed(False))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def fails(*_):
    raise ArithmeticError


@needs_newer_torch
def test_reentrant_after_a_pass_that_was_recorded():
    ours, theirs = make_norm(), make_norm()
    theirs.load_state_dict(ours.state_dict())
    (x,) = views(1)
    kept = checkpoint(ours, x, use_reentrant=False)
    theirs(x)
    expected = gradients(theirs, [x], plainly)
    torch.testing.assert_close(by_backward(ours, [x], checkpointed(True)), expected)
    assert kept.requires_grad


@REENTRANT
def test_where_pytorch_does_not_say_what_is_checkpointed(use_reentrant, monkeypatch):
    """As 2.4 does not. What would have to be guessed is an error."""
    name = "_top_saved_tensors_default_hooks"
    monkeypatch.delattr(torch._C._autograd, name, raising=False)
    ours, inputs = make_norm(), views(3)
    theirs = copy.deepcopy(ours)
    expected = gradients(theirs, inputs, plainly)
    found = by_backward(ours, inputs, checkpointed(use_reentrant))
    torch.testing.assert_close(found, expected)
    kept = checkpoint(ours, inputs[0], use_reentrant=False)
    with pytest.raises(RuntimeError, match="cannot be told"):
        by_backward(ours, inputs[:1], checkpointed(use_reentrant))
    assert kept.requires_grad


class Repeats(torch.autograd.Function):
    """Calls a layer in its backward pass, for some other input."""

    @staticmethod
    def forward(ctx, x, norm, other):
        ctx.norm, ctx.other = norm, other
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.norm(ctx.other)
        return grad, None, None


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_call_that_there_was_not_is_an_error(calls):
    norm, (x, other, *earlier) = make_norm(), views(2 + calls)
    with torch.no_grad():
        for before in earlier:
            norm(before)
    message = "with another input" if calls else "the layer had none"
    with pytest.raises(RuntimeError, match=message):
        Repeats.apply(x, norm, other).sum().backward()
    with torch.no_grad():
        norm(other)
    Repeats.apply(x, norm, other).sum().backward()


@REENTRANT
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad, use_reentrant):
    """As mixed precision has them at times, whose scaler then skips the step."""
    norm, (x, other) = make_norm(), views(2)
    x.data[0, 1, 2, 3] = bad
    outputs = [checkpoint(norm, t, use_reentrant=use_reentrant) for t in (x, other)]
    sum(outputs).sum().backward()
    assert norm.skipped_updates == 1 and not x.grad.isfinite().all()


@REENTRANT
def test_empty_input(use_reentrant):
    norm, (x, empty) = make_norm(), views(2)
    empty = empty[:0].detach().requires_grad_()
    for t in (x, empty):
        checkpoint(norm, t, use_reentrant=use_reentrant).sum().backward()
    assert empty.grad.shape == empty.shape


@needs_newer_torch
def test_little_is_remembered():
    """Nothing without checkpointing, of a step what it needs, and no more than so many calls."""
    norm, inputs = make_norm(), views(3)
    layer = weakref.ref(norm.running_mean)
    remembered = lambda: len(recomputation._calls.get(layer(), []))  # noqa: E731
    norm(inputs[0]).sum().backward()
    assert remembered() == 0
    for x in inputs:
        checkpoint(norm, x, use_reentrant=False).sum().backward()
        assert remembered() == 1
    with torch.no_grad():
        for _ in range(2 * recomputation._MOST):
            norm(inputs[0])
    assert remembered() == recomputation._MOST
    before = len(recomputation._calls)
    del norm
    assert len(recomputation._calls) == before - 1


@needs_newer_torch
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_model_with_two_checkpointed_layers(dynamic):
    """Calls of a layer before one backward pass share buffers that change in place, which is
    PyTorch's error."""
    ours = make_net()
    theirs = copy.deepcopy(ours)

    def run(net, x):
        for layer in net:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    compiled = torch.compile(run, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 6, 4, 5), (2, 6, 6, 5)):
        inputs = views(1, shape)
        torch.testing.assert_close(
            gradients(ours, inputs, compiled), gradients(theirs, inputs, run)
        )
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(ours, views(2), compiled)
