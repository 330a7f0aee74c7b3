"""Batch-channel normalization as operations that PyTorch knows by name, for ``torch.compile``.

``torch.ops.wsbcn_d2.batch_channel_norm`` changes none of its arguments: it returns the estimates
after the batch, which :func:`batch_channel_norm_compiled` writes. Its kernels are those of the
device.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from .backend import kernels_for
from .memory_format import dense
from .normalization import Normalization
from .recomputation import forward
from .tables import new_tables


def batch_channel_norm_compiled(
    x: Tensor, norm: Normalization, residual: Optional[Tensor], activation: str
) -> Tensor:
    """:func:`.batch_channel_norm.batch_channel_norm` while ``torch.compile`` traces."""
    rate = None
    if norm.update_rate is not None:
        # A tensor, but on the CPU, where reading it stalls nothing: torch.compile would take a
        # number for a constant and compile again whenever a schedule changes it.
        rate = torch.tensor(norm.update_rate, dtype=torch.float64, device="cpu")
    y, _, mean, var, skipped, seen = _operation(
        x,
        residual,
        norm.weight,  # one by one: torch.compile of PyTorch 2.4 knows no properties of tuples
        norm.bias,
        norm.group_weight,
        norm.group_bias,
        norm.running_mean,
        norm.running_var,
        norm.layer,
        rate,
        norm.eps,
        norm.use_batch_statistics,
        norm.synchronize,
        activation,
    )
    if rate is not None:
        with torch.no_grad():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            if norm.skipped_updates is not None:
                norm.skipped_updates.add_(skipped)
            if norm.seen_elements is not None:
                norm.seen_elements.add_(seen)
    return y


@torch.library.custom_op("wsbcn_d2::batch_channel_norm", mutates_args=())
def _operation(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    layer: Optional[Tensor],
    update_rate: Optional[Tensor],
    eps: float,
    use_batch_statistics: bool,
    synchronize: bool,
    activation: str,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var = running_mean.clone(), running_var.clone()
    skipped = torch.zeros((), dtype=torch.int64, device=x.device)
    seen = torch.zeros((), dtype=torch.float32, device=x.device)
    norm = Normalization(
        weight,
        bias,
        group_weight,
        group_bias,
        mean,
        var,
        eps=eps,
        use_batch_statistics=use_batch_statistics,
        update_rate=None if update_rate is None else float(update_rate),
        skipped_updates=skipped,
        seen_elements=seen,
        synchronize=synchronize,
        layer=layer,
    )
    # Compiled code does not know whether it is checkpointed.
    y, tables = forward(kernels_for(x), x, norm, residual, activation, repeatable=True)
    return y, tables, mean, var, skipped, seen


@_operation.register_fake
def _(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    layer: Optional[Tensor],
    update_rate: Optional[Tensor],
    eps: float,
    use_batch_statistics: bool,
    synchronize: bool,
    activation: str,
) -> Tuple[Tensor, ...]:
    tables = new_tables(x, group_weight.shape[0], use_batch_statistics)
    estimates = torch.empty_like(running_mean), torch.empty_like(running_var)
    counters = x.new_empty((), dtype=torch.int64), x.new_empty((), dtype=torch.float32)
    return (torch.empty_like(dense(x)), tables, *estimates, *counters)


@torch.library.custom_op("wsbcn_d2::batch_channel_norm_backward", mutates_args=())
def _backward_operation(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    tables: Tensor,
    weight: Tensor,
    group_weight: Tensor,
    activation: str,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_residual, parameters = kernels_for(x).backward(
        grad,
        x,
        tables,
        y=y,
        weight=weight,
        group_weight=group_weight,
        activation=activation,
        has_residual=has_residual,
        synchronize=synchronize,
    )
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, parameters


@_backward_operation.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    tables: Tensor,
    weight: Tensor,
    group_weight: Tensor,
    activation: str,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(dense(x))
    grad_residual = torch.empty_like(grad_x) if has_residual and activation else x.new_empty(0)
    return grad_x, grad_residual, tables.new_empty(2 * (len(weight) + len(group_weight)))


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, group_weight, group_bias, *_ = inputs
    synchronize, activation = inputs[-2:]
    y, tables = output[:2]
    ctx.save_for_backward(x, y if activation else None, tables, weight, group_weight)
    ctx.options = (activation, residual is not None, synchronize)
    ctx.dtypes = [p.dtype for p in (weight, bias, group_weight, group_bias)]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    x, y, tables, weight, group_weight = ctx.saved_tensors
    activation, has_residual, _ = ctx.options
    grad_x, grad_residual, flat = _backward_operation(
        grad, x, y, tables, weight, group_weight, *ctx.options
    )
    if not has_residual:
        grad_residual = None
    elif not activation:
        grad_residual = grad
    channels, groups = weight.shape[0], group_weight.shape[0]
    parts = flat.split([channels, channels, groups, groups])
    of_parameters = [part.to(dtype) for part, dtype in zip(parts, ctx.dtypes)]
    return (grad_x, grad_residual, *of_parameters, *[None] * 8)


_operation.register_autograd(_backward, setup_context=_save)
