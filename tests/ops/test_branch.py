"""Branches of residual blocks against the single operations, and those against the formulas."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.cases import DEVICE
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from wsbcn_d2.ops import (
    Link,
    Normalization,
    batch_channel_norm,
    branch,
    standardize_weight,
    standardized_conv2d,
)

NCHW, LAST = torch.contiguous_format, torch.channels_last
pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


# Filters (C_out, C_in / groups, kh, kw), and stride, padding, dilation and groups.
CONVOLUTIONS = [
    ((8, 6, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((8, 4, 3, 3), (2, 2), (2, 2), (2, 2), 2),
    ((12, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def make_links(count, dtype=torch.float64, batch=False, parameters=None, eps=1e-5):
    links = []
    for shape, *geometry in CONVOLUTIONS[:count]:
        weight = torch.randn(shape).to(DEVICE, dtype).requires_grad_()
        affine = [
            (torch.randn(n) + 1).to(DEVICE, parameters or dtype).requires_grad_()
            for n in (shape[0], shape[0], 4, 4)
        ]
        wide = torch.promote_types(dtype, torch.float32)
        norm = Normalization(
            *affine,
            torch.zeros(shape[0], dtype=wide, device=DEVICE),
            torch.ones(shape[0], dtype=wide, device=DEVICE),
            use_batch_statistics=batch,
            update_rate=0.3,
            skipped_updates=torch.tensor(0, device=DEVICE),
            seen_elements=torch.tensor(0.0, device=DEVICE),
        )
        links.append(Link(weight, eps, geometry, norm))
    return links


STATE = ("running_mean", "running_var", "skipped_updates", "seen_elements")


def with_own_state(links):
    return [
        link._replace(
            norm=link.norm._replace(**{name: getattr(link.norm, name).clone() for name in STATE})
        )
        for link in links
    ]


def leaves_of(links):
    return [t for link in links for t in (link.weight, *link.norm.parameters)]


def convolved(x, link):
    filters = link.weight
    if link.eps is not None:
        filters = standardize_weight(filters, link.eps)
    return F.conv2d(x, filters, None, *link.geometry)


def convolved_by_kernels(x, link):
    return standardized_conv2d(x, link.weight, None, link.eps, link.geometry)


def one_by_one(x, links, residual, activation, convolved=convolved):
    for link in links:
        last = link is links[-1]
        z = convolved(x, link)
        after = activation if last else "relu"
        x = batch_channel_norm(z, link.norm, residual if last else None, after)
    return x


def outcome(function, x, links, residual, activation):
    """Output, gradients and estimates."""
    links = with_own_state(links)
    x = x.detach().requires_grad_()
    leaves = [x, *leaves_of(links)]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves.append(residual)
    y = function(x, links, residual, activation)
    grads = torch.autograd.grad(
        (y * torch.linspace(0, 1, y.numel()).to(y).view_as(y)).sum(), leaves
    )
    return [y.detach(), grads, [[getattr(link.norm, n) for n in STATE] for link in links]]


def inputs(count, dtype=torch.float64, memory_format=NCHW, images=2):
    x = torch.randn(images, 6, 7, 9).to(DEVICE, dtype).contiguous(memory_format=memory_format)
    size = (7, 9) if count == 1 else (4, 5)
    residual = torch.randn(images, CONVOLUTIONS[count - 1][0][0], *size).to(x)
    return x, residual


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("has_residual,relu", [(0, 1), (1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_same_as_one_by_one(count, has_residual, relu, batch, eps):
    """Also with filters that are not standardized."""
    x, residual = inputs(count)
    links = make_links(count, batch=batch, eps=eps)
    case = (residual if has_residual else None, "relu" * relu)
    expected = outcome(one_by_one, x, links, *case)
    torch.testing.assert_close(outcome(branch, x, links, *case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [NCHW, LAST])
def test_dtypes_and_memory_formats(dtype, memory_format):
    """To the last bit: what is made again is what it was. Parameters stay in float32."""
    x, residual = inputs(3, dtype, memory_format)
    links = make_links(3, dtype, parameters=torch.float32)
    ours = outcome(branch, x, links, residual, "relu")
    theirs = partial(one_by_one, convolved=convolved_by_kernels)
    theirs = outcome(theirs, x, links, residual, "relu")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert {g.dtype for g in ours[1]} == {dtype, torch.float32}


def test_empty():
    x, residual = inputs(3, images=0)
    links = make_links(3)
    case = (x, links, residual, "relu")
    torch.testing.assert_close(outcome(branch, *case), outcome(one_by_one, *case))


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "observer",
    [Looks, lambda: profile(activities=[ProfilerActivity.CPU])],
    ids=["mode", "profiler"],
)
def test_same_whether_or_not_something_looks(observer):
    x, residual = inputs(3)
    links = make_links(3)
    with observer():
        watched = outcome(branch, x, links, residual, "relu")
    unseen = outcome(branch, x, links, residual, "relu")
    torch.testing.assert_close(watched, unseen, rtol=0, atol=0)


def test_saves_no_output_between_two_convolutions(backend):
    """But the input, the outputs of the convolutions, small tables, weights (not the filters made
    of them), and the result, which what follows saves too."""
    x, residual = inputs(3)
    links, saved = make_links(3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = branch(x.requires_grad_(), links, residual)
    activations = [t for t in saved if t.dim() == 4 and t.shape[0] == 2]
    assert [t.shape[1] for t in activations] == [6, 12, 8, 8, 12]
    assert activations[0].data_ptr() == x.data_ptr()
    assert activations[1].data_ptr() == y.data_ptr()
    weights = [t.data_ptr() for t in saved if t.dim() == 4 and t.shape[0] != 2]
    assert weights == [link.weight.data_ptr() for link in links]
    assert sum(t.dim() == 1 for t in saved) == 15 and len(saved) == 23


class Notes(TorchDispatchMode):
    """Calls a function after each operation of a name."""

    def __init__(self, name, function):
        super().__init__()
        self.name, self.function = name, function

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == self.name:
            self.function(result)
        return result


def test_what_has_been_used_is_freed(backend):
    """While the backward pass goes on, as if the operations had been single ones."""
    x, residual = inputs(3)
    links, saved, alive = make_links(3), [], []

    def pack(t):
        if t.dim() == 4 and t.shape[0] == 2:
            saved.append(StorageWeakRef(t.untyped_storage()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = branch(x.requires_grad_(), links, residual)

    def note(_):
        gc.collect()  # the interpreter leaves cycles behind
        alive.append([not ref.expired() for ref in saved])

    with Notes("aten::convolution_backward", note):
        y.sum().backward()
    # x, y (which is not ours to free) and the outputs of the three convolutions
    assert alive[-1] == [True, True, False, False, False]


def test_nothing_is_kept_without_gradient():
    x, residual = inputs(3)
    links = make_links(3)
    for grad in (False, True):
        alive, outputs = [], []

        def note(result, alive=alive, outputs=outputs):
            outputs.append(StorageWeakRef(result.untyped_storage()))
            gc.collect()  # the interpreter leaves cycles behind
            alive.append(sum(not ref.expired() for ref in outputs))

        with torch.set_grad_enabled(grad), Notes("aten::convolution", note):
            branch(x, links, residual)
        # of a convolution's output the next one needs only what was made of it
        assert alive == ([1, 2, 3] if grad else [1, 1, 1])


def test_result_is_freed_with_its_last_use(backend):
    x, residual = inputs(3)
    y = branch(x.requires_grad_(), make_links(3), residual)
    loss = y * torch.ones_like(y)
    result = StorageWeakRef(y.untyped_storage())
    del y
    alive = []

    def note(_):
        gc.collect()  # the interpreter leaves cycles behind
        alive.append(not result.expired())

    with Notes("aten::convolution_backward", note):
        loss.sum().backward()
    assert alive == [False] * 3


def test_some_of_the_gradients():
    """Images need none, nor do frozen filters or parameters."""
    x, residual = inputs(2)
    links = make_links(2)
    links[0].weight.requires_grad_(False)
    links[1].norm.group_weight.requires_grad_(False)
    leaves = [t for t in leaves_of(links) if t.requires_grad]
    results = []
    for function in (branch, one_by_one):
        y = function(x, with_own_state(links), residual, "relu")
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.testing.assert_close(*results)
    assert len(leaves) == 8


def test_the_same_graph_twice():
    x, residual = inputs(3)
    links = make_links(3)
    y = branch(x.requires_grad_(), links, residual)
    leaves = [x, links[0].weight, links[1].norm.weight]
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("batch", [False, True])
def test_second_derivatives(batch):
    x, residual = inputs(3)
    x, residual = x[:, :, :3, :3], residual[:, :, :2, :2]
    links, case = make_links(3, batch=batch), (residual.requires_grad_(), "relu")
    leaves = [x.requires_grad_(), residual, *leaves_of(links)]
    results = []
    for function in (branch, one_by_one):
        y = function(x, with_own_state(links), *case)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append(torch.autograd.grad(penalty, leaves))
    torch.testing.assert_close(*results)


def test_many_gradients_at_once():
    x, residual = inputs(2)
    links = make_links(2)
    y = branch(x.requires_grad_(), links, residual)
    leaves = [x, *leaves_of(links)]
    grads = torch.randn(3, *y.shape).to(y)
    together = torch.autograd.grad(y, leaves, grads, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    torch.testing.assert_close(together, tuple(torch.stack(g) for g in zip(*single)))


def test_change_before_the_backward_pass_is_an_error():
    x, residual = inputs(3)
    x.requires_grad_()
    hidden = x * 2
    y = branch(hidden, make_links(3), residual)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_residual_of_another_shape():
    """Kernels would read beyond it."""
    x, residual = inputs(2)
    with pytest.raises(ValueError, match="residual"):
        branch(x, make_links(2), residual[:, :, :1])
