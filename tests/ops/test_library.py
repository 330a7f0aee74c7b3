"""The operations as PyTorch knows them: schemas, shapes, profiler, torch.compile, autocast."""

import copy

import pytest
import torch
from ops.cases import make_inputs, with_grad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from versions import needs_compile, needs_opcheck

from wsbcn_d2 import BatchChannelNorm, WSConv2d
from wsbcn_d2.ops import batch_channel_norm, standardize_all, standardize_all_backward

OPS = torch.ops.wsbcn_d2


def check(op, args):
    """What the schema says about mutation and aliases, and whether the shapes, dtypes and strides
    of fake tensors are those of the real ones."""
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@needs_opcheck
@pytest.mark.parametrize(
    "dtype,memory_format",
    [
        (torch.float32, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
        (torch.float32, None),  # rows and columns exchanged
    ],
)
def test_schemas_and_shapes(cpu_backend, dtype, memory_format):
    shape, groups = (2, 4, 2, 3), 2
    x, weight, bias, *rest = make_inputs(shape, groups, torch.float32)
    if memory_format is None:
        x = x.mT.contiguous().mT
        assert not x.is_contiguous()
    else:
        x = x.to(dtype).contiguous(memory_format=memory_format)
    counters = [torch.tensor(0), torch.tensor(0.0)]
    rate = torch.tensor(0.1, dtype=torch.float64)
    for has_residual, relu, batch in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
        residual = torch.randn_like(x) if has_residual else None
        options = (bool(batch), bool(relu), False)
        args = (x, residual, weight, bias, *rest, *counters, rate, 1e-5, *options)
        check(OPS.batch_channel_norm, args)
        y, tables = OPS.batch_channel_norm(*args)
        grad = torch.randn(shape, dtype=dtype)
        args = (grad, x, y, weight, rest[0], tables, bool(relu), bool(has_residual), False)
        check(OPS.batch_channel_norm_backward, args)
        check(OPS.batch_channel_norm_again, (x, tables, groups, bool(relu)))


def test_profiler_shows_the_names():
    conv = WSConv2d(3, 8, 3, norm=BatchChannelNorm(8, 2))
    with profile(activities=[ProfilerActivity.CPU]) as result:
        conv(torch.randn(1, 3, 6, 6)).sum().backward()
    counts = {event.key: event.count for event in result.key_averages()}
    for name in ("batch_channel_norm", "standardize"):
        assert counts[f"wsbcn_d2::{name}"] == counts[f"wsbcn_d2::{name}_backward"] == 1


class Names(TorchDispatchMode):
    """The names of our operations that run in this context."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "wsbcn_d2":
            self.seen.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["estimate", "batch"])
def test_results_are_the_same_whether_or_not_something_looks(cpu_backend, mode):
    norm = BatchChannelNorm(8, 2, mode=mode)
    other = copy.deepcopy(norm)
    x, residual = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5)
    for options in ((None, False), (None, True), (residual, True)):
        with Names() as names:
            watched = results(norm, x, *options)
        assert names.seen == ["batch_channel_norm", "batch_channel_norm_backward"]
        torch.testing.assert_close(results(other, x, *options), watched, rtol=0, atol=0)


def results(norm, x, residual, relu):
    x = x.detach().requires_grad_()
    leaves = [x, *norm.parameters()]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves.append(residual)
    y = norm(x, residual=residual, relu=relu)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    return [y.detach(), *grads, *(b.clone() for b in norm.buffers())]


@needs_compile
@pytest.mark.parametrize("mode", ["estimate", "batch"])
@pytest.mark.parametrize("has_residual,relu", [(False, True), (True, False), (True, True)])
def test_compiled_without_graph_break(cpu_backend, mode, has_residual, relu):
    torch._dynamo.reset()
    norm = BatchChannelNorm(8, 2, mode=mode)
    for p in norm.parameters():
        torch.nn.init.normal_(p, 1.0, 0.5)
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(1 if cpu_backend == "triton" else 2):
        x = torch.randn(2, 8, 6, 5)
        residual = torch.randn(2, 8, 6, 5) if has_residual else None
        torch.testing.assert_close(
            results(compiled, x, residual, relu), results(norm, x, residual, relu)
        )
    assert norm.seen_elements in (60, 2 * 60)
    compiled.eval()  # as the other: of the same module
    norm.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, residual=residual, relu=relu), norm(x, residual=residual, relu=relu)
        )


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_autocast_leaves_all_of_it_in_float32(batch_statistics):
    """The result is that of the same half precision input without autocast."""
    inputs = make_inputs((2, 8, 9, 9), 2, torch.float32, offset=30.0)
    inputs[0] = inputs[0].bfloat16()
    residual = torch.randn(2, 8, 9, 9).bfloat16()
    options = {"use_batch_statistics": batch_statistics, "update_rate": 0.1, "relu": True}
    plain, mixed = with_grad(inputs), with_grad(inputs)
    y = batch_channel_norm(*plain, residual=residual, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = batch_channel_norm(*mixed, residual=residual, **options)
        z.sum().backward()
    y.sum().backward()
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close([z, *mixed[5:]], [y, *plain[5:]], rtol=0, atol=0)
    for a, b in zip(mixed[:5], plain[:5]):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_standardization_under_autocast():
    weights = [torch.randn(4, 3, 3, 3), torch.randn(5, 64, 1, 1)]
    plain = standardize_all(weights, [1e-5, 1e-5], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = standardize_all(weights, [1e-5, 1e-5], torch.float32)
        gradients = standardize_all_backward(mixed[0], weights, *mixed[1:])
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)
    expected = standardize_all_backward(plain[0], weights, *plain[1:])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
