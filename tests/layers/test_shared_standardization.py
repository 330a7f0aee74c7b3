"""Filters are standardized once for a step of the optimizer, and never out of date.

Whatever is shared, results are those of plain convolutions whose weights go through the formula at
every call, with gradients by autograd (:func:`plain`).
"""

import contextlib
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
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.layers import Conv2d
from detectron2.utils.events import EventStorage
from detectron2_models import a_training_image, an_image, small_model
from engine.two_ranks import run_two_ranks
from oracles import standardized_weight
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from versions import (
    KEEPS_NO_FILTERS,
    keeps_no_filters,
    needs_assign,
    needs_cpu_half,
    needs_cpu_processes,
)

from wsbcn_d2 import BatchChannelNorm, WSConv2d, WSConvTranspose2d
from wsbcn_d2.engine import accumulate_gradients
from wsbcn_d2.layers import StandardizeOnce, standardize_together

# ------------------------------------------------------------------------------------------ helpers


class Count(TorchDispatchMode):
    """How many weights each operation on filters was given.

    Attributes:
        forward, again: of standardizations, outside of backward passes and in them.
        backward: of the gradients.
    """

    def __init__(self):
        super().__init__()
        self.forward, self.again, self.backward = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.wsbcn_d2.standardize.default:
            in_backward = torch._C._current_graph_task_id() != -1
            (self.again if in_backward else self.forward).append(len(args[0]))
        if func is torch.ops.wsbcn_d2.standardize_backward.default:
            self.backward.append(len(args[0]))
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Convolutions of several kinds: one called twice, one on request, one not standardized."""

    def __init__(self, together=True):
        super().__init__()
        self.stem = WSConv2d(3, 8, 3, padding=1, norm=nn.GroupNorm(2, 8))
        self.twice = WSConv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.extra = WSConv2d(8, 8, 1, eps=1e-2)
        self.last = nn.Conv2d(8, 4, 1)
        if together:
            standardize_together(convolutions(self))

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


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, WSConv2d)]


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs).double()


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


def plain_gradients(model, loss, **options):
    leaves, call = plain(model)
    trainable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss(call), list(trainable.values()), allow_unused=True, **options)
    return {**dict.fromkeys(leaves), **dict(zip(trainable, grads))}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(model, expected, **close):
    """None, which is that of a parameter without part in the loss, is not the same as zero."""
    for name, grad in gradients(model).items():
        if expected[name] is None:
            assert grad is None, name
        else:
            assert grad is not None and not grad.requires_grad, name
            torch.testing.assert_close(grad, expected[name], msg=lambda m: f"{name}: {m}", **close)


def assert_current(model, x=None):
    """The model computes with the weights it has, in training and with gradients too."""
    x = images() if x is None else x
    _, call = plain(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), call(x))
    torch.testing.assert_close(model(x), call(x))


def loss_of(x, **kwargs):
    return lambda call: call(x, **kwargs).square().mean()


def backward(model, loss, **options):
    model.zero_grad(set_to_none=True)
    loss(model).backward(**options)


def warmed_up(model, steps=2):
    """After some steps, in which the convolutions find which of them share a graph."""
    for _ in range(steps):
        backward(model, loss_of(images()))
    model.zero_grad(set_to_none=True)
    return model


# ---------------------------------------------------------------------------- once, and all at once


MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.mark.parametrize("base", [MASK_RCNN, RETINANET])
def test_once_a_step_in_a_real_model(base):
    """RetinaNet calls the convolutions of its heads five times."""
    model = small_model(base, "GN+WS")
    convs = convolutions(model)
    calls = []
    convs[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    image = a_training_image(160)
    for step in range(3):
        optimizer.zero_grad()
        with EventStorage(), Count() as count:
            sum(model([image]).values()).backward()
        assert count.forward == [len(convs)]
        assert count.again == ([len(convs)] if step and KEEPS_NO_FILTERS else [])
        if step:  # the first finds out which convolutions a pass uses
            assert count.backward == [len(convs)]
        optimizer.step()
    assert len(calls) == 3 * (5 if base == RETINANET else 1)

    with torch.no_grad():
        for _ in range(2):
            model.eval()
            with Count() as count:
                model([an_image(160)])
                model([an_image(160)])
            assert count.forward == [len(convs)]
            model.train()


def test_gradients_of_a_real_model():
    """RetinaNet, whose loss samples nothing."""
    model = small_model(RETINANET, "GN+WS").double()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        image = a_training_image(160)

        def loss(call):
            with EventStorage():
                return sum(call([image]).values())

        expected = plain_gradients(model, loss)
        backward(model, loss)
        assert_same_gradients(model, expected, rtol=1e-6, atol=1e-9)
        optimizer.step()


def test_large_models_are_divided():
    convs = [WSConv2d(300, 300, 3) for _ in range(16)]  # 0.8 million values each
    standardize_together(convs)
    with Count() as count:
        for conv in convs:
            conv.standardized_weight()
    assert count.forward == [8, 8]


def test_transposed_convolutions_work_on_their_own():
    """Their filters are another dimension of the weight."""
    model = nn.Sequential(WSConv2d(3, 4, 3), WSConvTranspose2d(4, 3, 3))
    standardize_together(model)
    with Count() as count:
        model(torch.randn(1, 3, 6, 6))
    assert count.forward == [1]


def test_different_dtypes_are_not_mixed():
    model = net()
    model.extra.float()
    with Count() as count:
        x = model.stage(model.stem(images()))
        model.extra(x.float()).sum().backward()
    assert sorted(count.forward) == [1, 2]
    assert model.extra.weight.grad.dtype == torch.float32
    assert model.stem.weight.grad.dtype == torch.float64


def test_frozen_convolution_is_standardized_once():
    model = net()
    model.stem.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sizes = []
    for _ in range(3):
        loss = loss_of(images())
        expected = plain_gradients(model, loss)
        with Count() as count:
            backward(model, loss)
        assert_same_gradients(model, expected)
        sizes.append(count.forward)
        optimizer.step()
    assert sizes == [[1, 2], [2], [2]]  # apart from the others, whose memory would stay with it


def test_frozen_between_two_calls():
    conv = net().stem
    assert conv(images()).requires_grad
    conv.requires_grad_(False)
    assert not conv(images()).requires_grad


# ------------------------------------------------------------------------------ training, gradients

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_optimizers(name, set_to_none):
    """With gradients of zero, momentum moves the weights of what a step does not use."""
    model = net()
    try:
        optimizer = OPTIMIZERS[name](model.parameters())
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no such optimizer on CPU: {error}")
    for extra in (True, True, False, False, False, True):
        loss = loss_of(images(), extra=extra)
        expected = plain_gradients(model, loss)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss(model).backward()
        if not set_to_none:
            for p, (key, grad) in zip(model.parameters(), expected.items()):
                expected[key] = torch.zeros_like(p) if grad is None and p.grad is not None else grad
        assert_same_gradients(model, expected)
        optimizer.step()


def test_unused_convolution_has_no_gradient():
    model = warmed_up(net())
    for extra in (True, False, False, True):
        loss = loss_of(images(), extra=extra)
        backward(model, loss)
        assert (model.extra.weight.grad is None) == (not extra)
        assert_same_gradients(model, plain_gradients(model, loss))


def test_two_forward_passes_before_two_backward_passes():
    """The first time, the second comes unexpected, when filters have been let go."""
    model = warmed_up(net())
    a, b = loss_of(images()), loss_of(images(2), extra=False)
    for first in (True, False):
        model.zero_grad()
        with Count() as count:
            losses = [a(model), b(model)]
            for loss in losses:
                loss.backward()
        assert count.forward == ([3, 3] if first and KEEPS_NO_FILTERS else [3])
        assert_same_gradients(model, plain_gradients(model, lambda call: a(call) + b(call)))


def test_backward_passes_of_several_losses():
    """The first reaches one convolution of the group, the last all."""
    model = warmed_up(net())
    x = images()
    features = model.stem(x)
    losses = [features.square().mean(), features.abs().mean(), loss_of(x)(model)]
    losses[0].backward(retain_graph=True)
    assert model.twice.weight.grad is None and model.extra.weight.grad is None
    losses[1].backward()
    losses[2].backward()
    leaves, call = plain(model)
    # the stem of the plain model is a model itself
    stem_leaves, stem = plain(model.stem)
    first = torch.autograd.grad(
        stem(x).square().mean() + stem(x).abs().mean(), stem_leaves.values()
    )
    expected = plain_gradients(model, loss_of(x))
    for key, grad in zip(stem_leaves, first):
        expected[f"stem.{key}"] = expected[f"stem.{key}"] + grad
    assert_same_gradients(model, expected)


def test_the_same_graph_twice():
    model = warmed_up(net())
    loss = loss_of(images())
    expected = plain_gradients(model, loss)
    value = loss(model)
    value.backward(retain_graph=True)
    value.backward()
    assert_same_gradients(model, {k: 2 * grad for k, grad in expected.items()})


def test_some_of_the_gradients():
    model = warmed_up(net())
    loss = loss_of(images())
    expected = plain_gradients(model, loss)
    (grad,) = torch.autograd.grad(loss(model), [model.twice.weight])
    torch.testing.assert_close(grad, expected["twice.weight"])
    loss(model).backward(inputs=[model.stem.weight])
    assert_same_gradients(
        model, {k: grad if k == "stem.weight" else None for k, grad in expected.items()}
    )


def test_gradient_of_a_gradient():
    model = warmed_up(net())

    def penalty(call, leaves):
        grads = torch.autograd.grad(loss_of(x)(call), leaves, create_graph=True)
        return sum(g.square().sum() for g in grads)

    x = images()
    leaves, call = plain(model)
    expected = torch.autograd.grad(penalty(call, list(leaves.values())), list(leaves.values()))
    penalty(model, list(model.parameters())).backward()
    assert_same_gradients(model, dict(zip(leaves, expected)))


def test_gradcheck():
    conv = WSConv2d(2, 3, 2).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(weight, bias, x):
        conv.forget_standardized_weight()  # gradcheck changes its inputs through `data`
        return functional_call(conv, {"weight": weight, "bias": bias}, x)

    inputs = [*(p.detach().clone().requires_grad_() for p in conv.parameters()), x]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, each):
    model = warmed_up(net())
    for _ in range(3):
        x = images()
        with Count() as count:
            backward(model, loss_of(x, use_reentrant=use_reentrant, each=each))
        assert count.forward == [3]
        assert count.again == ([3] if KEEPS_NO_FILTERS else [])
        assert_same_gradients(model, plain_gradients(model, loss_of(x)))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


def test_one_weight_of_two_convolutions():
    model = net()
    model.extra = WSConv2d(8, 8, 3, padding=1, groups=2, bias=False).double()
    model.extra.weight = model.twice.weight
    standardize_together(convolutions(model))
    for _ in range(2):
        loss = loss_of(images())
        stock = copy.deepcopy(model)  # keeps the weight common
        weight = stock.twice.weight.detach().clone().requires_grad_()
        for conv in (stock.twice, stock.extra):
            conv.__class__ = Conv2d
            del conv.weight
            conv.weight = standardized_weight(weight)
        (expected,) = torch.autograd.grad(loss(stock), weight)
        backward(model, loss)
        torch.testing.assert_close(model.twice.weight.grad, expected)


def test_change_between_forward_and_backward_is_an_error():
    """As for any weight that a backward pass needs."""
    model = net()
    loss = loss_of(images())(model)
    with torch.no_grad():
        model.stem.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place|modified by an inplace operation"):
        loss.backward()


# -------------------------------------------------------------------------------- never out of date


def in_place(model):
    with torch.no_grad():
        model.stem.weight.mul_(-1.5).add_(torch.rand_like(model.stem.weight))


def in_place_in_inference_mode(model):
    with torch.inference_mode():
        model.stem.weight.neg_()


def initialization(model):
    nn.init.normal_(model.twice.weight)


def load(model):
    model.load_state_dict(Net().double().state_dict())


def load_by_assignment(model):
    model.load_state_dict(Net().double().state_dict(), assign=True)


def load_one(model):
    model.twice.load_state_dict({"weight": torch.rand_like(model.twice.weight)}, strict=False)


def step(model):
    model.stem.weight.grad = torch.rand_like(model.stem.weight)
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad(set_to_none=True)


def step_by_hand(model):
    """By an optimizer that PyTorch knows nothing of."""
    loss_of(images())(model).backward()
    for p in model.parameters():
        p.data -= p.grad.sign()
    model.zero_grad(set_to_none=True)


def replacement(model):
    model.extra.weight = nn.Parameter(torch.rand_like(model.extra.weight))


def exchange_of_data(model):
    """As by means that average weights: the tensors stay, their storage is another."""
    for p in model.parameters():
        p.data = torch.rand_like(p)


def average_and_change_of_mode(model):
    for p in model.parameters():
        p.data.copy_(torch.rand_like(p))
    model.train(not model.training)


def forgotten(model):
    model.stem.weight.data.copy_(torch.rand_like(model.stem.weight))
    model.stem.forget_standardized_weight()


def other_eps(model):
    model.stem.eps = 0.1


def to_another_dtype_and_back(model):
    model.half().double()


def swap_module(model):
    model.stem = copy.deepcopy(model.stem)
    in_place(model)


CHANGES = [
    in_place,
    in_place_in_inference_mode,
    initialization,
    load,
    pytest.param(load_by_assignment, marks=needs_assign),
    load_one,
    step,
    step_by_hand,
    replacement,
    exchange_of_data,
    average_and_change_of_mode,
    forgotten,
    other_eps,
    to_another_dtype_and_back,
    swap_module,
]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_change(change, train):
    model = net().train(train)
    x = images()
    with torch.no_grad():
        before = model(x)
    assert_current(model, x)
    change(model)
    assert_current(model, x)
    assert not torch.allclose(model(x), before)
    loss = loss_of(x)
    backward(model, loss)
    assert_same_gradients(model, plain_gradients(model, loss))


def test_average_weights_for_an_evaluation():
    """A training that evaluates the average of its weights now and then."""
    model = net()
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = images()
    for _ in range(3):
        loss = loss_of(images())
        expected = plain_gradients(model, loss)
        backward(model, loss)
        assert_same_gradients(model, expected)
        optimizer.step()
        for mean, p in zip(average.parameters(), model.parameters()):
            mean.data.lerp_(p.data, 0.5)
        average.train().eval()  # it is never trained, so nothing else tells of the change
        backup = copy.deepcopy(model.state_dict())
        model.eval()
        assert_current(model, x)
        model.load_state_dict(average.state_dict())
        assert_current(model, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), average(x))
        model.load_state_dict(backup)
        assert_current(model, x)
        model.train()


def test_copies_are_independent():
    model = warmed_up(net())
    model(images())  # with a graph, which no copy takes along
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    x = images()
    before = model(x).detach()
    for other in copies:
        torch.testing.assert_close(other(x), before)
        in_place(other)
        for loss in (loss_of(x), loss_of(images())):
            backward(other, loss)
            assert_same_gradients(other, plain_gradients(other, loss))
        torch.testing.assert_close(model(x), before)
        assert all(p.grad is None for p in model.parameters())


def test_returned_filters_may_be_overwritten():
    conv = WSConv2d(3, 4, 3)
    expected = standardized_weight(conv.weight.detach())
    for _ in range(2):
        with torch.no_grad():
            filters = conv.standardized_weight()
            torch.testing.assert_close(filters, expected)
            filters.mul_(2)
            conv.standardized_weight().detach().add_(1)
        torch.testing.assert_close(conv.standardized_weight().detach(), expected)


# ---------------------------------------------------------------------- modes of PyTorch and others


def test_inference_mode_and_training():
    model = net()
    x = images()
    with torch.inference_mode():
        model(x)
    loss = loss_of(x)
    backward(model, loss)
    assert_same_gradients(model, plain_gradients(model, loss))
    with torch.inference_mode():
        y = model(x)
    torch.testing.assert_close(y, plain(model)[1](x))
    with torch.inference_mode():
        made_there = net()
        for _ in range(2):
            torch.testing.assert_close(made_there(x), plain(made_there)[1](x))
            made_there.stem.weight.neg_()  # such a tensor has no version


def test_requires_grad_may_change():
    model = warmed_up(net())
    loss = loss_of(images())
    for trainable in (False, True, False, True):
        model.twice.requires_grad_(trainable)
        with torch.no_grad():
            model(images())
        backward(model, loss)
        assert (model.twice.weight.grad is not None) == trainable
        assert_same_gradients(model, plain_gradients(model, loss))


@needs_cpu_half
def test_autocast_on_and_off():
    model = net().float()
    x = images().float()
    for dtype in (torch.bfloat16, None, torch.bfloat16, torch.float16, None):
        _, call = plain(model)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            ours, theirs = model(x), call(x)
        assert ours.dtype == theirs.dtype == (dtype or torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for enabled in (True, False):

        def loss(call):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return loss_of(x)(call).float()

        expected = plain_gradients(model, loss)
        with Count() as count:
            backward(model, loss)
        assert count.forward == [3]
        for name, p in model.named_parameters():
            assert p.grad.dtype == torch.float32
            top = expected[name].abs().max()
            tolerance = 0.05 if enabled else 1e-4
            torch.testing.assert_close(p.grad / top, expected[name] / top, rtol=0, atol=tolerance)


def test_autocast_leaves_float64_alone():
    """As it does with a plain convolution."""
    model = net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(images())
    assert y.dtype == torch.float64


def test_functional_call():
    model = warmed_up(net())
    x = images()
    model(x)
    other = {name: torch.rand_like(p, requires_grad=True) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, value in other.items():
            value.add_(model.get_parameter(name))
    changed = copy.deepcopy(model)
    changed.load_state_dict(other, strict=False)
    y = functional_call(model, other, x)
    torch.testing.assert_close(y, plain(changed)[1](x))
    expected = plain_gradients(changed, loss_of(x))
    grads = torch.autograd.grad(y.square().mean(), list(other.values()))
    torch.testing.assert_close(dict(zip(other, grads)), expected)
    assert_current(model, x)


@pytest.mark.parametrize(
    "names", [("stem.weight", "twice.weight", "extra.weight"), ("twice.weight",)]
)
def test_function_transforms(names):
    """Of all weights, and of one in a group whose others are ordinary tensors."""
    model = net()
    x = images()
    weights = {name: model.get_parameter(name).detach() for name in names}
    grads = torch.func.grad(lambda values: functional_call(model, values, x).square().mean())(
        weights
    )
    expected = plain_gradients(model, loss_of(x))
    torch.testing.assert_close(grads, {name: expected[name] for name in names})
    assert_current(model, x)


def test_tensors_without_data():
    """Neither are they remembered, nor do they need memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = net()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(images()))
    assert y.shape == (1, 4, 7, 6)
    assert_current(model)
    for dtype in (torch.float64, torch.float32, torch.float16):
        without = copy.deepcopy(model).to("meta", dtype)
        assert without(images().to("meta", dtype)).shape == (1, 4, 7, 6)


# --------------------------------------------------------------------------- several batches a step


def trainer_of(model, data, steps, lr=0.1):
    trainer = nn.Module()  # anything that delegates its steps
    trainer._trainer = SimpleTrainer(model, iter(data), torch.optim.SGD(model.parameters(), lr))
    accumulate_gradients(trainer, steps)
    return trainer._trainer


class WithLoss(Net):
    """Takes an image and whether to use the extra convolution."""

    def forward(self, data):
        x, extra = data
        return {"loss": super().forward(x, extra=extra).square().mean()}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("used", [(True, True, True), (True, False, False), (False, True, False)])
def test_accumulation(used, together):
    """Also of a convolution that the last batch does not use."""
    torch.manual_seed(0)
    model = WithLoss(together=together).double()
    for iteration in range(3):
        data = [(images(), extra) for extra in used]
        expected = plain_gradients(model, lambda call: sum(call(d)["loss"] for d in data) / 3)
        trainer = trainer_of(model, data, 3)
        with Count() as count:
            trainer.train(0, 1)
        if together:
            assert count.forward == [3]
        assert_same_gradients(model, expected)


def test_accumulation_in_mixed_precision():
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch < 2.3 has no GradScaler on CPU")
    torch.manual_seed(0)
    model = WithLoss()
    data = [(images().float(), extra) for extra in (True, True, False)]

    def loss(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sum(call(d)["loss"].float() for d in data) / 3

    expected = plain_gradients(model, loss)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = AMPTrainer(model, iter(data), optimizer, grad_scaler=scaler, precision=torch.bfloat16)
    holder = nn.Module()
    holder._trainer = trainer
    accumulate_gradients(holder, 3)
    with Count() as count:
        trainer.train(0, 1)
    assert count.forward == [3]
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and not p.grad.requires_grad
        top = expected[name].abs().max()
        torch.testing.assert_close(p.grad / top, expected[name] / top, rtol=0, atol=0.05)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_accumulation_with_checkpointing(use_reentrant):
    model = warmed_up(net())
    data = [images() for _ in range(3)]
    with Count() as count, StandardizeOnce() as once:
        for x in data:
            once.last = x is data[-1]
            loss_of(x, use_reentrant=use_reentrant)(model).backward()
    assert count.forward == [3]
    assert_same_gradients(
        model, plain_gradients(model, lambda call: sum(loss_of(x)(call) for x in data))
    )


def test_an_error_between_batches_leaves_no_trace():
    model = net()
    with pytest.raises(KeyboardInterrupt):
        with StandardizeOnce():
            loss_of(images())(model).backward()
            raise KeyboardInterrupt
    assert model.stem.weight.grad is None
    loss = loss_of(images())
    backward(model, loss)
    assert_same_gradients(model, plain_gradients(model, loss))
    with pytest.raises(RuntimeError, match="cannot be nested"):
        with StandardizeOnce(), StandardizeOnce():
            pass
    with StandardizeOnce():
        pass


# ------------------------------------------------------------------------------------------- memory


@pytest.fixture
def no_collector():
    """What is in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_nothing_of_a_step_is_kept(no_collector):
    """Neither activations and the graph, nor the filters of the step before."""
    model = warmed_up(net())
    x = images().requires_grad_()
    activation = model.stem(x)
    loss = loss_of(x)(model)
    in_graph = activation.grad_fn.metadata["kept"] = nn.Identity()  # a node has no weak references
    kept = [weakref.ref(t) for t in (activation, x, in_graph)]
    with torch.no_grad():
        filters = weakref.ref(model.stem.standardized_weight())
    loss.backward()
    del loss, activation, x, in_graph
    assert [ref() for ref in kept] == [None] * 3
    backward(model, loss_of(images()))
    assert filters() is None


def test_nothing_of_several_batches_is_kept(no_collector):
    model = warmed_up(net())
    filters = []
    for _ in range(3):
        with StandardizeOnce() as once:
            for i in range(2):
                once.last = i == 1
                loss_of(images(), extra=False)(model).backward()
            with torch.no_grad():
                filters.append(weakref.ref(model.stem.standardized_weight()))
        del once
    backward(model, loss_of(images()))
    assert [ref() for ref in filters] == [None] * 3


def test_model_is_freed(no_collector):
    model = warmed_up(net())
    y = model(images())
    extra = weakref.ref(model.extra)
    model.extra = None  # its neighbours remain
    gc.collect()
    assert extra() is None
    kept = [weakref.ref(model.stem), weakref.ref(model.stem.weight)]
    del y, model
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_saves_no_filters_for_the_backward_pass():
    """Of several calls of a convolution, one tensor of its standardized filters."""
    conv = WSConv2d(4, 4, 3, padding=1)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
    ):
        conv(conv(conv(torch.randn(1, 4, 5, 5))))
    filters = [t for t in saved.values() if t.shape == conv.weight.shape]
    assert len(filters) == 1


def filters_in_memory(convs):
    """A function: indices of the convolutions whose standardized filters are still in memory."""
    storages = [StorageWeakRef(c._standardized.value.untyped_storage()) for c in convs]
    return lambda: [i for i, storage in enumerate(storages) if not storage.expired()]


@keeps_no_filters
@pytest.mark.parametrize("steps", [0, 2])
def test_filters_are_not_kept_for_the_backward_pass(steps, no_collector):
    """They go with the last call of the forward pass or, in the first step, when the backward pass
    begins; and again after their use."""
    model = warmed_up(net(together=False), steps)  # those together would go together
    convs = convolutions(model)
    seen = []
    x = images()
    for conv in convs:
        conv.standardized_weight()
    alive = filters_in_memory(convs)
    hidden = model.stem(x).relu()
    hidden.register_hook(lambda _: seen.append(alive()))
    y = model.extra(model.stage(hidden)).tanh()
    y.register_hook(lambda _: seen.append(alive()))
    loss = model.last(y).square().mean()
    with Count() as count:
        loss.backward()
    # of stem, twice and extra: before the backward pass of `extra`, and before that of the stem
    assert seen == ([[], []] if steps else [[0, 1, 2], []])
    assert count.again == ([1, 1, 1] if steps else [1, 1])
    assert_same_gradients(model, plain_gradients(model, loss_of(x)))


@keeps_no_filters
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_filters_are_not_kept_by_activation_checkpointing(use_reentrant, no_collector):
    model = warmed_up(net())
    x = images()
    for conv in convolutions(model):
        conv.standardized_weight()
    alive = filters_in_memory(convolutions(model))
    loss = loss_of(x, use_reentrant=use_reentrant)(model)
    assert alive() == []
    loss.backward()
    assert [c._standardized.value for c in convolutions(model)] == [None] * 3


@keeps_no_filters
def test_passes_without_gradient_between_steps():
    """As for a loss on images for validation: they do not standardize again and again, and after
    them it is found out anew when filters may go."""
    model = warmed_up(net())
    for _ in range(2):
        with torch.no_grad(), Count() as count:
            for _ in range(9):
                loss_of(images())(model)
        assert count.forward in ([3], [3, 3])  # the second came unexpected
        for _ in range(2):
            x = images()
            backward(model, loss_of(x))
            assert_same_gradients(model, plain_gradients(model, loss_of(x)))
            with torch.no_grad():
                for conv in convolutions(model):
                    conv.weight.mul_(1.1)
        loss_of(images())(model)
        assert [c._standardized.value for c in convolutions(model)] == [None] * 3


@keeps_no_filters
def test_a_pass_without_gradient_before_each_step():
    """As of a model that makes its own targets."""
    model = warmed_up(net())
    for step in range(4):
        x = images()
        with Count() as count:
            with torch.no_grad():
                target = model(x)
            backward(model, lambda call: (call(x) - target - 1).square().mean())
        if step > 1:
            assert (count.forward, count.backward) == ([3], [3])
        expected = plain_gradients(model, lambda call: (call(x) - target - 1).square().mean())
        assert_same_gradients(model, expected)
        with torch.no_grad():
            for conv in convolutions(model):
                conv.weight.mul_(1.1)


@keeps_no_filters
def test_step_of_another_optimizer_before_the_backward_pass():
    model = warmed_up(net())
    other = nn.Linear(1, 1)
    other(torch.ones(1, 1)).sum().backward()
    x = images()
    model.zero_grad()
    loss = loss_of(x)(model)
    torch.optim.SGD(other.parameters(), 0.1).step()
    with Count() as count:
        loss.backward()
    assert count.again == [3]
    assert_same_gradients(model, plain_gradients(model, loss_of(x)))


def test_graph_of_before_an_accumulation():
    model = warmed_up(net())
    a, b, c = loss_of(images()), loss_of(images()), loss_of(images())
    model.zero_grad()
    before = a(model)
    with StandardizeOnce() as once:
        b(model).backward()
        before.backward()
        once.last = True
        c(model).backward()
    expected = plain_gradients(model, lambda call: a(call) + b(call) + c(call))
    assert_same_gradients(model, expected)


@pytest.mark.parametrize("steps", [0, 2])
def test_filters_changed_before_the_backward_pass_are_an_error(steps):
    conv = warmed_up(net(), steps).stem
    x = images().requires_grad_()
    y = conv(x)
    with torch.no_grad():
        filters = conv._standardized.value
        if filters is not None:
            filters.mul_(2)
    if filters is None:  # they are made again, so nothing can have happened to them
        assert steps and KEEPS_NO_FILTERS
    else:
        with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
            torch.autograd.grad(y.sum(), x)


@keeps_no_filters
def test_weight_exchanged_before_the_backward_pass_is_an_error():
    model = warmed_up(net())
    loss = loss_of(images())(model)
    model.stem.weight.data = torch.randn_like(model.stem.weight)
    with pytest.raises(RuntimeError, match="its data exchanged"):
        loss.backward()


def test_parametrized_weight_is_made_once_a_call():
    calls = []

    class Half(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight / 2

    conv = WSConv2d(3, 8, 3).double()
    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Half())
    calls.clear()
    conv(images())
    plain_calls = len(calls)
    calls.clear()
    F.conv2d(images(), conv.standardized_weight(), conv.bias)
    assert plain_calls == len(calls)


@keeps_no_filters
def test_filters_that_are_used_otherwise_say_nothing_of_the_next_step():
    model = warmed_up(net())
    for conv in convolutions(model):
        conv.standardized_weight().sum().backward()
        with torch.no_grad():
            conv.weight.mul_(1.1)
    loss_of(images())(model)
    assert [c._standardized.value for c in convolutions(model)] == [None] * 3


@keeps_no_filters
def test_filters_are_made_again_together():
    """Those of a group at a time; a convolution called twice has them once."""
    model = warmed_up(net())
    later = warmed_up(net())
    x = images()
    loss = loss_of(x)(lambda x: later(model(x).mean(1, keepdim=True).expand(-1, 3, -1, -1)))
    model.zero_grad(), later.zero_grad()
    with Count() as count:
        loss.backward()
    assert count.again == [3, 3]
    stock, stock_later = plain(model), plain(later)
    expected = torch.autograd.grad(
        loss_of(x)(
            lambda x: stock_later[1](stock[1](x).mean(1, keepdim=True).expand(-1, 3, -1, -1))
        ),
        list(stock[0].values()),
    )
    assert_same_gradients(model, dict(zip(stock[0], expected)))


@keeps_no_filters
def test_filters_are_the_same_when_made_again():
    """To the last bit, in every dtype that autocast computes in."""
    convs = [WSConv2d(8, 8, 3, padding=1) for _ in range(2)]
    x = torch.randn(2, 8, 9, 9)
    for autocast in (False, True):
        gradients = []
        for kept in (False, True):
            for conv in convs:
                conv.zero_grad()
                conv.forget_standardized_weight()
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            with hooks if kept else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = convs[1](convs[0](x)).float().square().mean()
            loss.backward()
            gradients.append([conv.weight.grad for conv in convs])
        for again, once in zip(*gradients):
            assert torch.equal(again, once)


def test_input_changed_before_the_backward_pass_is_an_error():
    conv = WSConv2d(3, 8, 3)
    x = images().float()
    y = conv(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ----------------------------------------------------------------- filters that keep scale and mean


def adapted(model):
    """Its state dict with random scales and shifts, and the filters that these make."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    filters = {}
    for name, conv in model.named_modules():
        if isinstance(conv, WSConv2d):
            scale, shift = torch.rand(2, conv.out_channels, dtype=torch.float64) + 0.5
            state[f"{name}.ws_scale"], state[f"{name}.ws_shift"] = scale, shift
            filters[name] = (scale.view(-1, 1, 1, 1), shift.view(-1, 1, 1, 1))
    return state, filters


def test_scale_and_shift():
    model = net()
    state, filters = adapted(model)
    for key in list(state):  # as of a model that was never told of them
        assert key in model.state_dict() or key.endswith(("ws_scale", "ws_shift"))
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
    assert saved.keys() == state.keys()
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


@needs_cpu_processes
def test_two_ranks(tmp_path):
    output = run_two_ranks(__file__, tmp_path)
    functions = [name for name in globals() if name.startswith("ranks_")]
    assert functions and all(f"{name}: passed" in output for name in functions)


def data_of(rank, iteration):
    generator = torch.Generator().manual_seed(10 * iteration + rank)
    return torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=generator)


def ranks_data_parallel(rank):
    """Gradients are the averages of those of one process, also with checkpointing."""
    for use_reentrant in (None, False, True):
        model = net()
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for iteration in range(3):

            def both(call):
                return sum(loss_of(data_of(r, iteration))(call) / 2 for r in range(2))

            expected = plain_gradients(model, both)
            optimizer.zero_grad()
            x = data_of(rank, iteration)
            loss_of(x, use_reentrant=use_reentrant)(parallel).backward()
            assert_same_gradients(model, expected)
            optimizer.step()


def ranks_data_parallel_with_unused_convolutions(rank):
    """Ranks may use different ones; none of them is what it is without data parallelism."""
    model = net()
    parallel = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    uses = [(True, True), (True, False), (False, False), (False, True), (False, False)]
    for iteration, extra in enumerate(uses):

        def both(call):
            return sum(loss_of(data_of(r, iteration), extra=extra[r])(call) / 2 for r in range(2))

        expected = plain_gradients(model, both)
        optimizer.zero_grad()
        loss_of(data_of(rank, iteration), extra=extra[rank])(parallel).backward()
        assert_same_gradients(model, expected)
        optimizer.step()


def ranks_accumulation(rank):
    """Ranks stay equal though the last batch does not use one of the convolutions."""
    for together in (True, False):
        torch.manual_seed(0)
        model = WithLoss(together=together).double()
        parallel = DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True
        )
        for iteration in range(2):
            extras = (iteration == 0 or rank == 0, True, False)
            data = [
                [
                    (data_of(r, 3 * iteration + i), extras[i] if r == rank else None)
                    for i in range(3)
                ]
                for r in range(2)
            ]
            for i in range(3):
                used = iteration == 0 or rank == 1 or i  # of the other rank
                other = data[1 - rank][i][0]
                data[1 - rank][i] = (other, bool(used) and i != 2)

            def both(call):
                return sum(call(d)["loss"] for batches in data for d in batches) / 6

            expected = plain_gradients(model, both)
            trainer_of(parallel, data[rank], 3).train(0, 1)
            assert_same_gradients(model, expected)
            weights = [torch.empty_like(model.extra.weight) for _ in range(2)]
            dist.all_gather(weights, model.extra.weight.detach())
            assert torch.equal(*weights)


def test_models_in_several_threads():
    """Each trains as it does alone."""

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            x = torch.randn(1, 4, 2, 2, generator=generator)
            model(model(x)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build():
        torch.manual_seed(0)
        convs = [WSConv2d(4, 4, 1, bias=False, norm=BatchChannelNorm(4, 4)) for _ in range(20)]
        standardize_together(convs)
        return nn.Sequential(*convs)

    alone, models, errors = build(), [build() for _ in range(4)], []
    train(alone)

    def run(model):
        try:
            train(model)
        except Exception as error:
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


def test_forward_mode_derivative():
    conv = WSConv2d(3, 4, 3, bias=False)
    x, weight = torch.randn(1, 3, 6, 6), conv.weight.detach()
    conv(x)
    direction = torch.randn_like(weight)

    def function(weight):
        return functional_call(conv, {"weight": weight}, (x,))

    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(weight, direction))
        found = forward_ad.unpack_dual(y).tangent
    step = 1e-4
    points = [
        F.conv2d(x.double(), standardized_weight(w, conv.eps))
        for w in (
            weight.double() + step * direction.double(),
            weight.double() - step * direction.double(),
        )
    ]
    torch.testing.assert_close(
        found.double(), (points[0] - points[1]) / (2 * step), rtol=1e-3, atol=1e-3
    )
