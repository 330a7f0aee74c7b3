"""The operations as PyTorch knows them: schemas, shapes, profiler, torch.compile, autocast."""

import copy

import pytest
import torch
from ops.cases import batch_channel_norm, make_inputs, with_grad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from versions import needs_compile

from wsbcn_d2 import BatchChannelNorm

OPS = torch.ops.wsbcn_d2


def check(op, args):
    """What the schema says about mutation and aliases, and whether the shapes, dtypes and strides
    of fake tensors are those of the real ones."""
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


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
    x, weight, bias, group_weight, *rest = make_inputs(shape, groups, torch.float32)
    if memory_format is None:
        x = x.mT.contiguous().mT
        assert not x.is_contiguous()
    else:
        x = x.to(dtype).contiguous(memory_format=memory_format)
    rate = torch.tensor(0.1, dtype=torch.float64)
    for has_residual, activation, batch in ((0, "", 0), (0, "relu", 1), (1, "", 1), (1, "relu", 0)):
        residual = torch.randn_like(x) if has_residual else None
        args = (x, residual, weight, bias, group_weight, *rest, None, rate, 1e-5, bool(batch))
        args = (*args, False, activation)
        check(OPS.batch_channel_norm, args)
        y, tables, *_ = OPS.batch_channel_norm(*args)
        grad = torch.randn(shape, dtype=dtype)
        options = (activation, bool(has_residual), False)
        check(OPS.batch_channel_norm_backward, (grad, x, y, tables, weight, group_weight, *options))


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "observer",
    [Looks, lambda: profile(activities=[ProfilerActivity.CPU])],
    ids=["mode", "profiler"],
)
@pytest.mark.parametrize("mode", ["estimate", "batch"])
def test_looking_changes_nothing(cpu_backend, mode, observer):
    """Neither the results nor what runs: no operation by its name."""
    norm = BatchChannelNorm(8, 2, mode=mode)
    other = copy.deepcopy(norm)
    x, residual = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5)
    for options in ((None, ""), (None, "relu"), (residual, "relu")):
        with observer() as seen:
            watched = results(norm, x, *options)
        torch.testing.assert_close(results(other, x, *options), watched, rtol=0, atol=0)
        if not isinstance(seen, Looks):
            assert not any("wsbcn_d2::" in event.key for event in seen.key_averages())


def results(norm, x, residual, activation):
    x = x.detach().requires_grad_()
    leaves = [x, *norm.parameters()]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves.append(residual)
    y = norm(x, residual=residual, activation=activation)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    return [y.detach(), *grads, *(b.clone() for b in norm.buffers())]


@needs_compile
@pytest.mark.parametrize("mode", ["estimate", "batch"])
@pytest.mark.parametrize("has_residual,activation", [(False, "relu"), (True, ""), (True, "relu")])
def test_compiled_without_graph_break(cpu_backend, mode, has_residual, activation):
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
            results(compiled, x, residual, activation),
            results(norm, x, residual, activation),
        )
    assert norm.seen_elements in (60, 2 * 60)
    compiled.eval()  # as the other: of the same module
    norm.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, residual=residual, activation=activation),
            norm(x, residual=residual, activation=activation),
        )


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_autocast_leaves_all_of_it_in_float32(batch_statistics):
    """The result is that of the same half precision input without autocast."""
    inputs = make_inputs((2, 8, 9, 9), 2, torch.float32, offset=30.0)
    inputs[0] = inputs[0].bfloat16()
    residual = torch.randn(2, 8, 9, 9).bfloat16()
    options = {"use_batch_statistics": batch_statistics, "update_rate": 0.1, "activation": "relu"}
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
