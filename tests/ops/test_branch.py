"""Branches of residual blocks against the single operations, and those against the formulas."""

import gc

import pytest
import torch
import torch.nn.functional as F
from ops.cases import DEVICE
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from wsbcn_d2.ops import Link, batch_channel_norm, branch

NCHW, LAST = torch.contiguous_format, torch.channels_last
pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


class Again:
    """Filters that are not saved."""

    def __init__(self, filters):
        self.made_of = filters.detach().clone()
        self.calls = 0
        self.on_call = lambda: None

    def filters(self):
        self.calls += 1
        self.on_call()
        return self.made_of


# Filters (C_out, C_in / groups, kh, kw), and stride, padding, dilation and groups.
CONVOLUTIONS = [
    ((8, 6, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((8, 4, 3, 3), (2, 2), (2, 2), (2, 2), 2),
    ((12, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def make_links(count, dtype=torch.float64, batch=False, again=False, parameters=None):
    links = []
    for shape, *geometry in CONVOLUTIONS[:count]:
        filters = torch.randn(shape).to(DEVICE, dtype).requires_grad_()
        affine = [
            (torch.randn(n) + 1).to(DEVICE, parameters or dtype).requires_grad_()
            for n in (shape[0], shape[0], 4, 4)
        ]
        wide = torch.promote_types(dtype, torch.float32)
        state = [
            torch.zeros(shape[0], dtype=wide, device=DEVICE),
            torch.ones(shape[0], dtype=wide, device=DEVICE),
            torch.tensor(0, device=DEVICE),
            torch.tensor(0.0, device=DEVICE),
        ]
        remade = Again(filters) if again else None
        links.append(Link(filters, remade, geometry, affine, state, 0.3, 1e-5, batch, False))
    return links


def one_by_one(x, links, residual, relu):
    for link in links:
        last = link is links[-1]
        mean, var, skipped, seen = link.state
        x = batch_channel_norm(
            F.conv2d(x, link.filters, None, *link.geometry),
            *link.parameters,
            mean,
            var,
            eps=link.eps,
            use_batch_statistics=link.use_batch_statistics,
            update_rate=link.update_rate,
            skipped_updates=skipped,
            seen_elements=seen,
            residual=residual if last else None,
            relu=relu or not last,
        )
    return x


def outcome(function, x, links, residual, relu):
    """Output, gradients and estimates."""
    links = [link._replace(state=[t.clone() for t in link.state]) for link in links]
    x = x.detach().requires_grad_()
    leaves = [x, *(t for link in links for t in (link.filters, *link.parameters))]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves.append(residual)
    y = function(x, links, residual, relu)
    grads = torch.autograd.grad(
        (y * torch.linspace(0, 1, y.numel()).to(y).view_as(y)).sum(), leaves
    )
    return [y.detach(), grads, [link.state for link in links]]


def inputs(count, dtype=torch.float64, memory_format=NCHW, images=2):
    x = torch.randn(images, 6, 7, 9).to(DEVICE, dtype).contiguous(memory_format=memory_format)
    size = (7, 9) if count == 1 else (4, 5)
    residual = torch.randn(images, CONVOLUTIONS[count - 1][0][0], *size).to(x)
    return x, residual


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("has_residual,relu", [(0, 1), (1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("batch", [False, True])
def test_same_as_one_by_one(count, has_residual, relu, batch):
    """Also with filters that are not saved."""
    x, residual = inputs(count)
    links = make_links(count, batch=batch)
    case = (residual if has_residual else None, bool(relu))
    expected = outcome(one_by_one, x, links, *case)
    torch.testing.assert_close(outcome(branch, x, links, *case), expected)
    again = [link._replace(again=Again(link.filters)) for link in links]
    torch.testing.assert_close(outcome(branch, x, again, *case), expected)
    assert [link.again.calls for link in again] == [1] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [NCHW, LAST])
def test_dtypes_and_memory_formats(dtype, memory_format):
    """To the last bit: what is made again is what it was. Parameters stay in float32."""
    x, residual = inputs(3, dtype, memory_format)
    links = make_links(3, dtype, parameters=torch.float32)
    ours = outcome(branch, x, links, residual, True)
    torch.testing.assert_close(ours, outcome(one_by_one, x, links, residual, True), rtol=0, atol=0)
    assert {g.dtype for g in ours[1]} == {dtype, torch.float32}


def test_empty():
    x, residual = inputs(3, images=0)
    links = make_links(3)
    case = (x, links, residual, True)
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
    with observer() as seen:
        watched = outcome(branch, x, links, residual, True)
    unseen = outcome(branch, x, links, residual, True)
    torch.testing.assert_close(watched, unseen, rtol=0, atol=0)
    if not isinstance(seen, Looks):
        counts = {event.key: event.count for event in seen.key_averages()}
        assert counts["wsbcn_d2::batch_channel_norm"] == 3
        assert counts["wsbcn_d2::batch_channel_norm_backward"] == 3
        assert counts["wsbcn_d2::batch_channel_norm_again"] == 2


def test_saves_no_output_between_two_convolutions(backend):
    """But the input, the outputs of the convolutions, small tables, and the result, which what
    follows saves too; the filters only if they cannot be made again."""
    x, residual = inputs(3)
    for again in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = branch(x.requires_grad_(), make_links(3, again=again), residual)
        activations = [t for t in saved if t.dim() == 4 and t.shape[0] == 2]
        assert [t.shape[1] for t in activations] == [6, 12, 8, 8, 12]
        assert activations[0].data_ptr() == x.data_ptr()
        assert activations[1].data_ptr() == y.data_ptr()
        assert sum(t.dim() == 4 for t in saved) == (5 if again else 8)
        assert sum(t.dim() == 1 for t in saved) == 9 and len(saved) == (14 if again else 17)


def test_what_has_been_used_is_freed(backend):
    """While the backward pass goes on, as if the operations had been single ones."""
    x, residual = inputs(3)
    links = make_links(3, again=True)
    saved = {}

    def pack(t):
        if t.dim() == 4:
            saved[len(saved)] = StorageWeakRef(t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = branch(x.requires_grad_(), links, residual)
    alive = []
    first = links[0].again
    # The interpreter leaves cycles behind.
    first.on_call = (
        lambda: gc.collect() and None or alive.append([not ref.expired() for ref in saved.values()])
    )
    y.sum().backward()
    # x, y (which is not ours to free) and the outputs of the three convolutions
    assert alive == [[True, True, False, False, False]]


def test_nothing_is_kept_without_gradient():
    x, residual = inputs(3)
    links = make_links(3)
    for grad in (False, True):
        alive = []

        class Notes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if func.name() == "aten::convolution":
                    self.outputs.append(StorageWeakRef(result.untyped_storage()))
                    gc.collect()  # the interpreter leaves cycles behind
                    alive.append(sum(not ref.expired() for ref in self.outputs))
                return result

        Notes.outputs = []
        with torch.set_grad_enabled(grad), Notes():
            branch(x, links, residual)
        # of a convolution's output the next one needs only what was made of it
        assert alive == ([1, 2, 3] if grad else [1, 1, 1])


def test_result_is_freed_with_its_last_use(backend):
    x, residual = inputs(3)
    links = make_links(3, again=True)
    y = branch(x.requires_grad_(), links, residual)
    loss = y * torch.ones_like(y)
    result = StorageWeakRef(y.untyped_storage())
    del y
    alive = []
    for link in links:  # the interpreter leaves cycles behind
        link.again.on_call = lambda: gc.collect() and None or alive.append(not result.expired())
    loss.sum().backward()
    assert alive == [False] * 3


def test_some_of_the_gradients():
    """Images need none, nor do frozen filters or parameters."""
    x, residual = inputs(2)
    links = make_links(2)
    links[0].filters.requires_grad_(False)
    links[1].parameters[2].requires_grad_(False)
    leaves = [t for link in links for t in (link.filters, *link.parameters) if t.requires_grad]
    results = []
    for function in (branch, one_by_one):
        copies = [link._replace(state=[t.clone() for t in link.state]) for link in links]
        y = function(x, copies, residual, True)
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.testing.assert_close(*results)
    assert len(leaves) == 8


def test_the_same_graph_twice():
    x, residual = inputs(3)
    links = make_links(3, again=True)
    y = branch(x.requires_grad_(), links, residual)
    leaves = [x, links[0].filters, links[1].parameters[0]]
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("of_constant", [False, True])
def test_no_second_derivative(of_constant):
    """Not even where what comes into the backward pass does not depend on x."""
    x, _ = inputs(1)
    y = branch(x.requires_grad_(), make_links(1))
    loss = y.sum() if of_constant else y.square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


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
