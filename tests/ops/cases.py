"""Inputs of batch-channel normalization, and what should come out of them."""

import torch
from oracles import estimated_bcn, large_batch_bcn

from wsbcn_d2 import ops
from wsbcn_d2.ops import Normalization

# The interpreter of Triton works on the CPU, where there is no GPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORACLES = {False: estimated_bcn, True: large_batch_bcn}
BCN_GRADIENTS = ("x", "weight", "bias", "group_weight", "group_bias")


def make_inputs(shape, groups, dtype=torch.float64, offset=0.0, scale=1.0):
    """x, the four affine parameters and the two estimates."""
    c = shape[1]
    x = torch.randn(shape, dtype=torch.float64) * scale + offset
    affine = [torch.randn(n, dtype=torch.float64) + 1 for n in (c, c, groups, groups)]
    mean = torch.randn(c, dtype=torch.float64) * 0.3 + offset
    var = torch.rand(c, dtype=torch.float64) + 0.5
    return [t.to(dtype) for t in (x, *affine, mean, var)]


def batch_channel_norm(x, *tensors, residual=None, activation="", **options):
    """The operation for an input and what else :func:`make_inputs` gives."""
    return ops.batch_channel_norm(x, Normalization(*tensors, **options), residual, activation)


def with_grad(tensors):
    """Copies, of which all but the estimates require gradients."""
    return [t.detach().clone().requires_grad_() for t in tensors[:5]] + [
        t.clone() for t in tensors[5:]
    ]


def run(inputs, grad, residual=None, activation="", **options):
    """Everything that a forward and a backward pass make, by name, in float64 on the CPU.

    Args:
        inputs: those of :func:`make_inputs`; left alone.
        grad: of the output.
        residual, activation, options: those of the operation.
    """
    x, *rest = with_grad(inputs)
    x = inputs[0].detach().requires_grad_()  # in its memory format
    skipped = torch.tensor(0, device=x.device)
    seen = torch.tensor(0.0, device=x.device)
    if residual is not None:
        residual = residual.detach().requires_grad_()
    y = batch_channel_norm(
        x,
        *rest,
        residual=residual,
        activation=activation,
        skipped_updates=skipped,
        seen_elements=seen,
        **options,
    )
    y.backward(grad)
    assert y.dtype == x.grad.dtype == x.dtype
    assert y.stride() == x.grad.stride() == torch.empty_like(x).stride()
    assert all(t.grad.dtype == t.dtype for t in rest[:4])
    results = {"y": y, "mean": rest[4], "var": rest[5], "skipped": skipped, "seen": seen}
    for name, t in zip(BCN_GRADIENTS, (x, *rest[:4])):
        results[f"gradient of {name}"] = t.grad
    if residual is not None:
        results["gradient of residual"] = residual.grad
    return {name: t.detach().double().cpu() for name, t in results.items()}


def expected(
    inputs, grad, residual=None, activation="", use_batch_statistics=False, update_rate=None
):
    """The same by the formulas in float64."""
    x, *rest = with_grad([t.double().cpu() for t in inputs])
    rate = update_rate
    if use_batch_statistics and rate is None:
        rate = 0.0
    result = ORACLES[use_batch_statistics](x, *rest, rate=rate)
    y, leaves = result.y, [x, *rest[:4]]
    names = [f"gradient of {name}" for name in BCN_GRADIENTS]
    if residual is not None:
        leaves.append(residual.detach().double().cpu().requires_grad_())
        names.append("gradient of residual")
        y = y + leaves[-1]
    if activation:
        y = y.relu()
    gradients = torch.autograd.grad(y, leaves, grad.double().cpu())
    seen = x.numel() / x.shape[1] if update_rate is not None else 0
    results = {"y": y.detach(), "mean": result.running_mean, "var": result.running_var}
    results.update(skipped=torch.tensor(0.0), seen=torch.tensor(float(seen)))
    return {**results, **dict(zip(names, gradients))}


def assert_same(ours, theirs, tolerance):
    """``tolerance``: of every result, relative to its largest value."""
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        top = reference.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            ours[name].double() / top,
            reference.double() / top,
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
