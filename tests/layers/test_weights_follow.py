"""A standardized convolution computes with the weight that it has, and its graph holds that weight
and no other.

Everything is compared with plain convolutions whose weights go through the formula at every call,
with gradients by autograd (:func:`plain`).
"""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.layers import Conv2d
from engine.two_ranks import run_two_ranks
from oracles import standardized_weight
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import BatchChannelNorm, WSConv2d

# ------------------------------------------------------------------------------------------ helpers


class Net(nn.Module):
    """Convolutions of several kinds: one called twice, one on request, one not standardized."""

    def __init__(self):
        super().__init__()
        self.stem = WSConv2d(3, 8, 3, padding=1, norm=nn.GroupNorm(2, 8))
        self.twice = WSConv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.extra = WSConv2d(8, 8, 1, eps=1e-2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x, extra=True, use_reentrant=None, each=False):
        x = self.stem(x).relu()
        if use_reentrant is None:
            x = self.stage(x)
        elif each:  # the second to be recomputed comes after gradients of the first
            x = checkpoint(self.twice, x, use_reentrant=use_reentrant).relu()
            x = checkpoint(self.twice, x, use_reentrant=use_reentrant)
        else:
            x = checkpoint(self.stage, x, use_reentrant=use_reentrant)
        if extra:
            x = self.extra(x).tanh()
        return self.last(x)

    def stage(self, x):
        return self.twice(self.twice(x).relu())


def net():
    torch.manual_seed(0)
    return Net().double()


def images(n=1):
    return torch.randn(n, 3, 7, 6, dtype=torch.float64)


def plain(model):
    """The model as a function of its parameters: they, and a callable like the model."""
    stock = copy.deepcopy(model)
    leaves = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        leaves[name].requires_grad_(p.requires_grad)
    values = dict(leaves)
    for name, conv in stock.named_modules():
        if isinstance(conv, WSConv2d):
            conv.__class__ = Conv2d
            key = f"{name}.weight".lstrip(".")
            values[key] = standardized_weight(leaves[key], conv.eps)
    return leaves, lambda *args, **kwargs: functional_call(stock, values, args, kwargs)


def plain_gradients(model, loss):
    leaves, call = plain(model)
    trainable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss(call), list(trainable.values()), allow_unused=True)
    return {**dict.fromkeys(leaves), **dict(zip(trainable, grads))}


def assert_same_gradients(model, expected, **close):
    """None, which is that of a parameter without part in the loss, is not the same as zero."""
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None, name
        else:
            assert p.grad is not None and not p.grad.requires_grad, name
            torch.testing.assert_close(
                p.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}", **close
            )


def assert_current(model, x=None):
    """The model computes with the weights it has, in training and with gradients too."""
    x = images() if x is None else x
    _, call = plain(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), call(x))
    torch.testing.assert_close(model(x), call(x))


def loss_of(x, **kwargs):
    return lambda call: call(x, **kwargs).square().mean()


def backward(model, loss):
    model.zero_grad(set_to_none=True)
    loss(model).backward()


# ------------------------------------------------------------ whatever has changed a weight before


def in_place(model):
    with torch.no_grad():
        model.stem.weight.mul_(-1.5).add_(torch.rand_like(model.stem.weight))


def in_inference_mode(model):
    with torch.inference_mode():
        model.stem.weight.neg_()


def load(model):
    model.load_state_dict(Net().double().state_dict())


def load_by_assignment(model):
    model.load_state_dict(Net().double().state_dict(), assign=True)


def step_by_hand(model):
    loss_of(images())(model).backward()
    for p in model.parameters():
        p.data -= p.grad.sign()
    model.zero_grad(set_to_none=True)


def fused_step(model):
    loss_of(images())(model).backward()
    torch.optim.SGD(model.parameters(), 0.5, fused=True).step()
    model.zero_grad(set_to_none=True)


def replacement(model):
    model.extra.weight = nn.Parameter(torch.rand_like(model.extra.weight))


def data_mul(model):
    model.stem.weight.data.mul_(torch.rand_like(model.stem.weight))


def data_copy(model):
    for p in model.parameters():
        p.data.copy_(torch.rand_like(p))


def data_twice(model):
    """The second storage may lie where the first did."""
    for _ in range(2):
        for p in model.parameters():
            p.data = torch.rand_like(p)


def set_storage(model):
    with torch.no_grad():
        model.twice.weight.set_(torch.rand_like(model.twice.weight))


def by_numpy(model):
    model.stem.weight.detach().numpy()[...] *= -2.0
    model.stem.weight.detach().numpy()[0, 0, 0, 0] = 3.0


def by_vector(model):
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector + torch.rand_like(vector), model.parameters())


def foreach_lerp(model):
    other = [torch.rand_like(p) for p in model.parameters()]
    torch._foreach_lerp_([p.data for p in model.parameters()], other, 0.5)


def swap_tensors(model):
    other = nn.Parameter(torch.rand_like(model.stem.weight))
    torch.utils.swap_tensors(model.stem.weight, other)


def other_eps(model):
    model.stem.eps = 0.1


CHANGES = [
    in_place,
    in_inference_mode,
    load,
    load_by_assignment,
    step_by_hand,
    fused_step,
    replacement,
    data_mul,
    data_copy,
    data_twice,
    set_storage,
    by_numpy,
    by_vector,
    foreach_lerp,
    swap_tensors,
    other_eps,
]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_change(change, train, trainable):
    if not trainable and change in (step_by_hand, fused_step):
        pytest.skip("there is no gradient to make a step with")
    model = net().train(train).requires_grad_(trainable)
    x = images()
    with torch.no_grad():
        before = model(x)
    change(model)
    assert not torch.allclose(model(x), before)
    assert_current(model, x)
    if trainable:
        loss = loss_of(x)
        expected = plain_gradients(model, loss)
        backward(model, loss)
        assert_same_gradients(model, expected)


def test_mean_teacher():
    """A frozen average of the weights, written through ``data``, is evaluated after each step."""
    model = net()
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        x = images()
        target = teacher(x)
        torch.testing.assert_close(target, plain(teacher)[1](x))

        def loss(call, x=x, target=target):
            return F.mse_loss(call(x), target + 1)

        expected = plain_gradients(model, loss)
        backward(model, loss)
        assert_same_gradients(model, expected)
        optimizer.step()
        for mean, p in zip(teacher.parameters(), model.parameters()):
            mean.data.mul_(0.5).add_(p.data, alpha=0.5)


def test_copies_are_independent():
    model = net()
    model(images())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(buffer, weights_only=False))
    x = images()
    before = model(x).detach()
    for other in copies:
        torch.testing.assert_close(other(x), before)
        in_place(other)
        assert_current(other, x)
        torch.testing.assert_close(model(x), before)


def test_change_between_forward_and_backward_is_an_error():
    """As for any weight that a backward pass needs."""
    model = net()
    loss = loss_of(images())(model)
    with torch.no_grad():
        model.stem.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------- what a graph contains


def test_gradient_of_one_weight_visits_no_other():
    """Hooks of the others are not called, and their graphs are not freed."""
    model, seen = net(), []
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: seen.append((name, grad)))
    loss = loss_of(images())(model)
    torch.autograd.grad(loss, model.last.weight, retain_graph=True)
    assert not [name for name, _ in seen if name != "last.weight"]
    torch.autograd.grad(loss, model.extra.weight, retain_graph=True)
    loss.backward()
    assert all(grad is not None for _, grad in seen)
    assert {name for name, _ in seen} == {name for name, _ in model.named_parameters()}


def test_partial_backward_passes():
    """Of a head, which frees its graph, and then of the body, of which part was not in it."""
    model, x = net(), images()
    features = model.stem(x).relu()
    head = model.extra(features.detach().requires_grad_()).square().mean()
    head.backward()
    assert model.stem.weight.grad is None
    model.stage(features).square().mean().backward()
    reference = net()
    reference.extra(reference.stem(x).relu().detach()).square().mean().backward()
    reference.stage(reference.stem(x).relu()).square().mean().backward()
    for a, b in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_activation_checkpointing(use_reentrant, each):
    model, x = net(), images()
    expected = plain_gradients(model, loss_of(x))
    for _ in range(2):
        backward(model, loss_of(x, use_reentrant=use_reentrant, each=each))
        assert_same_gradients(model, expected)


def test_gradient_of_a_gradient():
    model, x = net(), images()

    def penalty(call, parameters):
        grads = torch.autograd.grad(call(x).square().mean(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    leaves, call = plain(model)
    torch.testing.assert_close(
        penalty(model, list(model.parameters())), penalty(call, list(leaves.values()))
    )


def test_many_gradients_at_once():
    model, x = net(), images()
    y = model(x)
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    weights = list(model.parameters())
    together = torch.autograd.grad(y, weights, grads, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, weights, grad, retain_graph=True) for grad in grads]
    torch.testing.assert_close(together, tuple(torch.stack(g) for g in zip(*single)))


def test_keeps_what_a_plain_convolution_keeps():
    """The input and the weight, in evaluation as in training; nothing outlives the graph."""
    conv, x = WSConv2d(3, 8, 3), torch.randn(1, 3, 9, 9, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv(x)
    assert {t.data_ptr() for t in saved} == {
        x.data_ptr(),
        conv.weight.data_ptr(),
        conv.bias.data_ptr(),
    }
    saved.clear()
    held = weakref.ref(y.grad_fn)
    del y
    gc.collect()
    assert held() is None
    assert not set(vars(conv)) - set(vars(Conv2d(3, 8, 3))) - {"eps"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_of_gradients(channels_last):
    conv, x = WSConv2d(4, 6, 3).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = plain_gradients(conv, loss_of(x))
    if channels_last:
        conv, x = (t.to(memory_format=torch.channels_last) for t in (conv, x))
    conv(x).square().mean().backward()
    assert conv.weight.grad.stride() == conv.weight.stride()
    assert_same_gradients(conv, expected)


# ---------------------------------------------------------------------- modes of PyTorch and others


def test_inference_mode():
    model, x = net(), images()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(model)[1](x))
        made_there = net()
        made_there.stem.weight.neg_()  # such a tensor has no version
        torch.testing.assert_close(made_there(x), plain(made_there)[1](x))
    assert_current(model, x)


def test_requires_grad_may_change():
    model, loss = net(), loss_of(images())
    for trainable in (False, True, False):
        model.twice.requires_grad_(trainable)
        expected = plain_gradients(model, loss)
        backward(model, loss)
        assert (model.twice.weight.grad is not None) == trainable
        assert_same_gradients(model, expected)


def test_autocast_on_and_off():
    model, x = net().float(), images().float()
    for dtype in (torch.bfloat16, None, torch.float16, None):
        _, call = plain(model)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            ours, theirs = model(x), call(x)
        assert ours.dtype == theirs.dtype == (dtype or torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)

    def loss(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(x)(call).float()

    expected = plain_gradients(model, loss)
    backward(model, loss)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        top = expected[name].abs().max()
        torch.testing.assert_close(p.grad / top, expected[name] / top, rtol=0, atol=0.05)


def test_autocast_leaves_float64_alone():
    """As it does with a plain convolution."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net()(images()).dtype == torch.float64


def test_functional_call():
    model, x = net(), images()
    other = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    changed = copy.deepcopy(model)
    changed.load_state_dict(other, strict=False)
    other = {name: value.requires_grad_() for name, value in other.items()}
    y = functional_call(model, other, x)
    torch.testing.assert_close(y, plain(changed)[1](x))
    grads = torch.autograd.grad(y.square().mean(), list(other.values()))
    torch.testing.assert_close(dict(zip(other, grads)), plain_gradients(changed, loss_of(x)))


@pytest.mark.parametrize(
    "names", [("stem.weight", "twice.weight", "extra.weight"), ("twice.weight",)]
)
def test_function_transforms(names):
    model, x = net(), images()
    weights = {name: model.get_parameter(name).detach() for name in names}
    grads = torch.func.grad(lambda values: functional_call(model, values, x).square().mean())(
        weights
    )
    expected = plain_gradients(model, loss_of(x))
    torch.testing.assert_close(grads, {name: expected[name] for name in names})


def test_forward_mode_derivative():
    conv, x = WSConv2d(3, 4, 3, bias=False).double(), images()
    weight, direction = conv.weight.detach(), torch.randn_like(conv.weight)
    with forward_ad.dual_level():
        y = functional_call(conv, {"weight": forward_ad.make_dual(weight, direction)}, (x,))
        found = forward_ad.unpack_dual(y).tangent
    ends = [
        F.conv2d(x, standardized_weight(weight + step * direction, conv.eps))
        for step in (1e-5, -1e-5)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-5)


def test_tensors_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = net()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(images())).shape == (1, 4, 7, 6)
    for dtype in (torch.float64, torch.float16):
        without = copy.deepcopy(model).to("meta", dtype)
        assert without(images().to("meta", dtype)).shape == (1, 4, 7, 6)


def test_several_threads():
    """First inference, and training, of one model each."""

    def build():
        torch.manual_seed(0)
        convs = [WSConv2d(4, 4, 1, bias=False, norm=BatchChannelNorm(4, 4)) for _ in range(10)]
        return nn.Sequential(*convs)

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            x = torch.randn(1, 4, 2, 2, generator=generator)
            model(model(x)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    alone, models, shared, errors = build(), [build() for _ in range(4)], build().eval(), []
    train(alone)
    x = torch.randn(1, 4, 2, 2)
    expected = copy.deepcopy(shared)(x)

    def run(model):
        try:
            torch.testing.assert_close(shared(x), expected)
            train(model)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    for model in models:
        for a, b in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------- filters of other models


def adapted(model):
    """A state dict with scale and shift for each standardized convolution, and these by name."""
    state, filters = model.state_dict(), {}
    for name, conv in model.named_modules():
        if isinstance(conv, WSConv2d):
            scale = torch.rand(conv.out_channels, dtype=torch.float64) + 0.5
            shift = torch.randn(conv.out_channels, dtype=torch.float64)
            state[f"{name}.ws_scale"], state[f"{name}.ws_shift"] = scale, shift
            filters[name] = (scale.view(-1, 1, 1, 1), shift.view(-1, 1, 1, 1))
    return state, filters


def test_scale_and_shift():
    model = net()
    state, filters = adapted(model)
    model.load_state_dict(state)
    x = images()
    for _ in range(2):
        stock = copy.deepcopy(model)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        values = dict(leaves)
        for name, (scale, shift) in filters.items():
            conv = stock.get_submodule(name)
            conv.__class__ = Conv2d
            standardized = standardized_weight(leaves[f"{name}.weight"], conv.eps)
            values[f"{name}.weight"] = scale * standardized + shift
        y = functional_call(stock, values, x)
        torch.testing.assert_close(model(x), y)
        grads = torch.autograd.grad(y.square().mean(), list(leaves.values()))
        backward(model, loss_of(x))
        assert_same_gradients(model, dict(zip(leaves, grads)))
        in_place(model)


def test_scale_and_shift_are_saved_and_loaded():
    model, other = net(), net()
    state, _ = adapted(model)
    model.load_state_dict(state)
    saved = model.state_dict()
    torch.testing.assert_close(dict(saved), state, rtol=0, atol=0)
    assert not {name for name, _ in model.named_parameters()} & {k for k in state if "ws_" in k}
    other.load_state_dict(saved)
    x = images()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(other)(x), model(x), rtol=0, atol=0)
    other.load_state_dict(net().state_dict())  # strict, and without them
    assert other.stem.ws_scale is None and other.state_dict().keys() == net().state_dict().keys()
    assert_current(other, x)


@pytest.mark.parametrize("missing", ["ws_scale", "ws_shift"])
def test_scale_without_shift_is_noticed(missing):
    model = net()
    state, _ = adapted(model)
    del state[f"twice.{missing}"]
    with pytest.raises(RuntimeError, match=missing):
        model.load_state_dict(state)


# ------------------------------------------------------------------------------------ two processes


def test_two_ranks(tmp_path):
    output = run_two_ranks(__file__, tmp_path)
    functions = [name for name in globals() if name.startswith("ranks_")]
    assert functions and all(f"{name}: passed" in output for name in functions)


def data_of(rank, iteration):
    generator = torch.Generator().manual_seed(10 * iteration + rank)
    return torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=generator)


def of_both(iteration, **kwargs):
    return lambda call: sum(loss_of(data_of(r, iteration), **kwargs)(call) / 2 for r in range(2))


def ranks_data_parallel(rank):
    """Gradients are the averages of those of one process, also with checkpointing."""
    cases = [
        ({}, {}),
        ({}, {"use_reentrant": False}),
        ({}, {"use_reentrant": True}),
        ({"gradient_as_bucket_view": True}, {}),
        ({"static_graph": True}, {}),
        ({"static_graph": True}, {"use_reentrant": True, "each": True}),
    ]
    for options, checkpointing in cases:
        model = net()
        parallel = DistributedDataParallel(model, broadcast_buffers=False, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for iteration in range(3):
            expected = plain_gradients(model, of_both(iteration))
            optimizer.zero_grad()
            loss_of(data_of(rank, iteration), **checkpointing)(parallel).backward()
            assert_same_gradients(model, expected)
            optimizer.step()


def ranks_data_parallel_with_unused_convolutions(rank):
    """Ranks may use different ones; none of them is what it is without data parallelism."""
    model = net()
    parallel = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    uses = [(True, True), (True, False), (False, False), (False, True)]
    for iteration, extra in enumerate(uses):

        def both(call):
            return sum(loss_of(data_of(r, iteration), extra=extra[r])(call) / 2 for r in range(2))

        expected = plain_gradients(model, both)
        optimizer.zero_grad()
        loss_of(data_of(rank, iteration), extra=extra[rank])(parallel).backward()
        assert_same_gradients(model, expected)
        optimizer.step()


def ranks_accumulation(rank):
    """By ``no_sync``; the last batch does not use one of the convolutions."""
    model = net()
    parallel = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)

    def both(call):
        return of_both(0)(call) + of_both(1, extra=False)(call)

    expected = plain_gradients(model, both)
    with parallel.no_sync():
        loss_of(data_of(rank, 0))(parallel).backward()
    loss_of(data_of(rank, 1), extra=False)(parallel).backward()
    for name, p in model.named_parameters():
        if name.startswith("extra"):  # DistributedDataParallel reduces what the last pass used
            dist.all_reduce(p.grad)
            p.grad /= 2
    assert_same_gradients(model, expected)


class WithBCN(nn.Module):
    """With estimates, which do not depend on how parameters are kept."""

    def __init__(self):
        super().__init__()
        self.stem = WSConv2d(3, 8, 3, padding=1, norm=BatchChannelNorm(8, 2))
        self.last = WSConv2d(8, 8, 1, bias=False, norm=BatchChannelNorm(8, 4))

    def forward(self, x):
        return self.last(self.stem(x).relu())


def losses_of_steps(model, rank, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for iteration in range(steps):
        optimizer.zero_grad()
        x = data_of(rank, iteration)
        loss = (model(x) * x.mean(1, keepdim=True)).mean() + model(x).square().mean()
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return losses


def ranks_fully_shard(rank):
    """The losses of one process, for both ranks the same data."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if not hasattr(fsdp, "fully_shard"):  # PyTorch 2.4
        return
    for each in (False, True):
        torch.manual_seed(0)
        model = WithBCN().double()
        expected = losses_of_steps(copy.deepcopy(model), 0)
        mesh = init_device_mesh("cpu", (2,))
        if each:
            fsdp.fully_shard(model.stem, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        torch.testing.assert_close(losses_of_steps(model, 0), expected)


def ranks_fsdp_with_frozen_units(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.manual_seed(0)
    model = WithBCN().double()
    model.stem.requires_grad_(False)
    expected = losses_of_steps(copy.deepcopy(model), 0)
    model.stem = FSDP(model.stem, device_id=torch.device("cpu"), use_orig_params=True)
    parallel = FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)
    torch.testing.assert_close(losses_of_steps(parallel, 0), expected)
