"""Which convolutions a branch takes as one operation, and that results are the same if not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from oracles import standardized_weight
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import BatchChannelNorm, WSConv2d
from wsbcn_d2.layers import run_branch


def make_convs(conv=WSConv2d, **kwargs):
    convs = [
        conv(6, 8, 1, bias=False, norm=BatchChannelNorm(8, 2, **kwargs)),
        conv(8, 8, 3, padding=1, groups=2, bias=False, norm=BatchChannelNorm(8, 4, **kwargs)),
        conv(8, 12, 1, stride=2, bias=False, norm=BatchChannelNorm(12, 3, **kwargs)),
    ]
    for p in (p for c in convs for p in c.norm.parameters()):
        nn.init.normal_(p, 1.0, 0.5)
    return nn.ModuleList(convs).double()


def stock(convs, x, residual, activation):
    """The same layers one after the other, with filters standardized by the formula."""
    for conv in convs:
        weight = standardized_weight(conv.weight) if type(conv) is WSConv2d else conv.weight
        x = conv.norm(F.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups))
        x = x if conv is convs[-1] else F.relu(x)
    x = x if residual is None else x + residual
    return F.relu(x) if activation else x


def inputs(dtype=torch.float64):
    return torch.randn(2, 6, 7, 9, dtype=dtype), torch.randn(2, 12, 4, 5, dtype=dtype)


def outcome(function, convs, x, residual, activation="relu"):
    x, residual = (t if t is None else t.detach().requires_grad_() for t in (x, residual))
    y = function(convs, x, residual, activation)
    leaves = [t for t in (x, residual) if t is not None]
    leaves += [p for p in convs.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [y.detach(), grads, [b.clone() for b in convs.buffers()]]


def is_one(convs, x, residual=None):
    """Whether all of a branch is one operation."""
    return "Branch" in type(run_branch(convs, x, residual).grad_fn).__name__


@pytest.mark.parametrize("conv", [WSConv2d, Conv2d])
@pytest.mark.parametrize("mode", ["estimate", "batch"])
@pytest.mark.parametrize("has_residual,activation", [(True, "relu"), (False, "relu"), (False, "")])
def test_same_as_single_layers(conv, mode, has_residual, activation):
    """In three steps of training and in evaluation."""
    ours = make_convs(conv, mode=mode)
    theirs = copy.deepcopy(ours)
    for step in range(4):
        x, residual = inputs()
        residual = residual if has_residual else None
        assert is_one(copy.deepcopy(ours), x, residual)
        torch.testing.assert_close(
            outcome(run_branch, ours, x, residual, activation),
            outcome(stock, theirs, x, residual, activation),
        )
        with torch.no_grad():
            for p, q in zip(ours.parameters(), theirs.parameters()):
                q.copy_(p.mul_(1.1))
        if step == 2:
            ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            run_branch(ours, x, residual, activation), stock(theirs, x, residual, activation)
        )


class Own(BatchChannelNorm):
    def forward(self, x, residual=None, activation=""):
        return 2 * super().forward(x, residual, activation)


def circular(convs):
    convs[1] = WSConv2d(
        8, 8, 3, padding=1, padding_mode="circular", bias=False, norm=convs[1].norm
    ).double()


SINGLE = {
    "hook of a convolution": lambda c: c[1].register_forward_hook(lambda m, x, y: None),
    "hook of a norm": lambda c: c[0].norm.register_forward_hook(lambda m, x, y: y + 1),
    "another forward": lambda c: setattr(c[0].norm, "forward", lambda x: x * 2),
    "bias": lambda c: setattr(c[2], "bias", nn.Parameter(torch.randn(12).double())),
    "another norm": lambda c: setattr(c[1], "norm", nn.GroupNorm(2, 8).double()),
    "norm of an own class": lambda c: setattr(c[1].norm, "__class__", Own),
    "padding with values": circular,
}


@pytest.mark.parametrize("what", SINGLE)
def test_single_operations_where_needed(what):
    convs = make_convs().eval()
    x, residual = inputs()
    assert is_one(convs, x, residual)
    SINGLE[what](convs)
    assert not is_one(convs, x, residual)
    torch.testing.assert_close(
        outcome(run_branch, convs, x, residual), outcome(single_layers, convs, x, residual)
    )


def single_layers(convs, x, residual, activation):
    for conv in convs[:-1]:
        x = F.relu(conv(x))
    return F.relu(convs[-1](x) + residual)


class Half(nn.Module):
    def forward(self, x):
        return x * x.mean(dim=(2, 3), keepdim=True).sigmoid() - 0.5


ACTIVATIONS = {"another": Half, "ReLU": nn.ReLU, "leaky": nn.LeakyReLU}


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("own", ACTIVATIONS)
@pytest.mark.parametrize("has_residual,activation", [(True, "relu"), (False, "relu"), (False, "")])
@pytest.mark.parametrize("conv", [WSConv2d, Conv2d])
def test_activations_of_the_convolutions_come_first(conv, index, own, has_residual, activation):
    convs = make_convs(conv)
    convs[index].activation = ACTIVATIONS[own]()
    theirs = copy.deepcopy(convs)

    def layers(convs, x, residual, activation):
        for layer in convs[:-1]:
            x = F.relu(layer(x))
        x = convs[-1](x)
        x = x if residual is None else x + residual
        return F.relu(x) if activation else x

    x, residual = inputs()
    case = (x, residual if has_residual else None, activation)
    torch.testing.assert_close(outcome(run_branch, convs, *case), outcome(layers, theirs, *case))


def test_geometry_in_single_numbers():
    convs = make_convs()
    theirs = copy.deepcopy(convs)
    convs[1].dilation = convs[1].stride = 1
    case = (*inputs(), "relu")
    torch.testing.assert_close(outcome(run_branch, convs, *case), outcome(stock, theirs, *case))


def test_plain_convolution_pads_with_zeros():
    """Whatever its padding_mode, as Detectron2's does by itself."""
    convs = make_convs(Conv2d)
    convs[1].padding_mode = "circular"
    theirs = copy.deepcopy(convs)
    x, residual = inputs()
    torch.testing.assert_close(
        outcome(run_branch, convs, x, residual), outcome(single_layers, theirs, x, residual)
    )


def test_hooks_of_all_modules_are_called():
    convs, (x, residual) = make_convs().eval(), inputs()
    expected = run_branch(convs, x, residual)
    seen = []
    handle = register_module_forward_hook(lambda m, x, y: seen.append(type(m)))
    try:
        torch.testing.assert_close(run_branch(convs, x, residual), expected)
    finally:
        handle.remove()
    assert seen == [BatchChannelNorm, WSConv2d] * 3
    assert is_one(convs, x, residual)


def test_inference_mode():
    convs, (x, residual) = make_convs(), inputs()
    for training in (True, False):
        theirs = copy.deepcopy(convs.train(training))
        with torch.inference_mode():
            ours = run_branch(convs, x, residual)
            torch.testing.assert_close(ours, stock(theirs, x, residual, "relu"))
    torch.testing.assert_close(outcome(run_branch, convs, x, residual)[0], ours.clone())


@pytest.mark.parametrize("conv", [WSConv2d, Conv2d])
def test_autocast(conv):
    """Convolutions in bfloat16, normalization of that, and parameters in float32: as exact as
    single layers."""
    convs = make_convs(conv).float()
    x, residual = inputs(torch.bfloat16)
    exact = outcome(run_branch, copy.deepcopy(convs).double(), x.double(), residual.double())
    errors = []
    with torch.autocast("cpu", torch.bfloat16):
        assert is_one(copy.deepcopy(convs), x, residual)
        assert is_one(copy.deepcopy(convs), x.float(), residual)  # casts it by itself
        for function in (run_branch, single_layers):
            y, grads, _ = outcome(function, copy.deepcopy(convs), x, residual)
            assert [t.dtype for t in (y, *grads[:2])] == [torch.bfloat16] * 3
            assert {g.dtype for g in grads[2:]} == {torch.float32}
            pairs = zip([y, *grads], [exact[0], *exact[1]])
            errors.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    assert all(ours < 2 * theirs + 0.01 for ours, theirs in zip(*errors))
    assert max(errors[0]) < 0.2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    ours, x, residual = make_convs(), *inputs()
    theirs = copy.deepcopy(ours)

    def checkpointed(convs, x, residual, activation):
        run = lambda x, residual: run_branch(convs, x, residual, activation)  # noqa: E731
        return checkpoint(run, x, residual, use_reentrant=use_reentrant)

    results = []
    for function, convs in ((checkpointed, ours), (stock, theirs)):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        for _ in range(2):
            y = function(convs, x, residual, "relu")
            y.square().sum().backward()
        grads = [t.grad for t in (x, residual, *convs.parameters())]
        results.append([y.detach(), grads, list(convs.buffers())])
    torch.testing.assert_close(*results)


def test_levels_take_turns():
    """Estimates of a norm that several feature levels share."""
    ours = make_convs()
    ours[1].norm.set_num_levels(3)
    theirs = copy.deepcopy(ours)
    for _ in range(4):
        x, residual = inputs()
        torch.testing.assert_close(
            outcome(run_branch, ours, x, residual), outcome(stock, theirs, x, residual)
        )
    assert ours[1].norm.level == 1


def test_scale_and_shift_of_converted_filters():
    ours = make_convs()
    state = ours.state_dict()
    for i, n in enumerate((8, 8, 12)):
        state[f"{i}.ws_scale"], state[f"{i}.ws_shift"] = torch.randn(2, n).double()
    ours.load_state_dict(state)

    def adapted(convs, x, residual, activation):
        for conv in convs:
            scale, shift = (t.view(-1, 1, 1, 1) for t in (conv.ws_scale, conv.ws_shift))
            weight = standardized_weight(conv.weight) * scale + shift
            x = conv.norm(F.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups))
            x = x + residual if conv is convs[-1] else x
            x = F.relu(x)
        return x

    x, residual = inputs()
    assert is_one(copy.deepcopy(ours), x, residual)
    theirs = copy.deepcopy(ours)
    torch.testing.assert_close(
        outcome(run_branch, ours, x, residual), outcome(adapted, theirs, x, residual)
    )
