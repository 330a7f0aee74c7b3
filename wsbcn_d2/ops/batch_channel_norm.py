"""Batch-channel normalization as one differentiable operation.

Batch normalization by given statistics (mean ``mu``, variance ``s2`` of each channel) followed
by channel normalization over groups of ``D = C / G`` channels (Qiao et al., arXiv 1903.10520v2,
Algorithm 1 and Eq. 15):

.. math::
    z = \\gamma \\frac{x - \\mu}{\\sqrt{s^2 + \\epsilon}} + \\beta, \\qquad
    y = \\gamma'_g \\frac{z - \\mathrm{mean}_g z}{\\sqrt{\\mathrm{var}_g z + \\epsilon}} + \\beta'_g

Both are affine in x once the statistics are known, and the group statistics follow from the mean
``m`` and the variance ``v`` of x in each image and channel. With ``t = x - m`` and
``a = gamma / sqrt(s2 + eps)``:

    mean z = a (m - mu) + beta,    var z = a^2 v      (image and channel)
    group mean and variance from those of the D channels;  d = mean z - group mean
    r = 1 / sqrt(group var + eps),   k = gamma'_g r
    y = k a t + (k d + beta'_g)

So the forward pass reads x twice and writes y once, and saves x and tables. For the backward
pass, with ``S1 = sum dy`` and ``S2 = sum dy t`` over H and W, ``M = H W``:

    u1 = sum_{c in g} S1 / (D M),   u2 = sum_{c in g} r (a S2 + d S1) / (D M)
    dz = k (dy - u1 - u2 r (a t + d))

and every other gradient is a sum of dz or dz t over H and W, which again are tables.

What follows a normalization in a residual network can be part of the operation, which saves its
passes over the activation: the addition of a residual, and an activation function.

A backend (:mod:`.eager`, :mod:`.native_backend`, :mod:`.triton_backend`) has four functions for
that:

- ``forward(x, norm, residual, activation)`` returns ``y`` and ``tables`` (:mod:`.tables`), with
  ``m, v, d``, ``scale = k a`` and ``shift = k d + beta'_g`` for each image and channel, ``r`` for
  each image and group, ``mu`` and ``rstd = 1 / sqrt(s2 + eps)`` for each channel, and ``count``,
  the number of values behind ``mu`` if that is of the batch.
- ``backward(grad, x, tables, ...)`` takes them (y only where it does not find out from x what the
  activation let through) and returns the gradients of x, of the residual (None if it is that of y),
  and of the parameters, ``weight, bias, group_weight, group_bias``, in one tensor.
- ``again(x, tables, groups, activation)`` makes y once more, without a residual, so that it need
  not be saved (:mod:`.branch`).
- ``moments(x)`` returns ``m`` and ``v`` alone.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .activation import let_through
from .backend import kernels_for
from .differentiable import aliases, gradients_of
from .estimates import pool_images, update_estimates, use_batch
from .formula import batch_channel_norm_by
from .library import batch_channel_norm_compiled
from .normalization import Normalization
from .recomputation import forward
from .state import (
    in_backward,
    is_compiling,
    is_plain,
    is_transformed,
    may_be_repeated,
    without_derivatives,
)
from .tables import split_tables


def batch_channel_norm(
    x: Tensor, norm: Normalization, residual: Optional[Tensor] = None, activation: str = ""
) -> Tensor:
    """Batch-channel normalization of an activation.

    Gradients can be differentiated again, but through statistics of several ranks.

    Args:
        x: (N, C, H, W), any floating dtype and memory format; N may be 0.
        norm: parameters, estimates and options.
        residual: of the shape of x, added to the result.
        activation: "" or "relu", applied after that addition.

    Returns:
        Tensor of the shape, dtype and memory format of x.

    Raises:
        ValueError: if shapes do not fit together.
        RuntimeError: if parameters, estimates or residual are on another device than x; in a
            forward pass that activation checkpointing repeats, if there was no such call.
    """
    check_arguments(x, norm, residual)
    if is_compiling():
        return batch_channel_norm_compiled(x, norm, residual, activation)
    if not is_plain(x, norm.weight):
        return _by_formula(x, norm, residual, activation)
    return _BatchChannelNorm.apply(
        norm, activation, may_be_repeated(), x, residual, *norm.parameters
    )


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each image and channel of (N, C, H, W): two tables (N, C)."""
    return kernels_for(x).moments(x)


def check_arguments(x: Tensor, norm: Normalization, residual: Optional[Tensor]) -> None:
    """Raises ValueError or RuntimeError if tensors do not fit: kernels would read elsewhere."""
    channels, groups = x.shape[1], norm.group_weight.shape[0]
    for name in ("weight", "bias", "group_weight", "group_bias", "running_mean", "running_var"):
        table, size = getattr(norm, name), groups if name.startswith("group") else channels
        if table.shape != (size,):
            raise ValueError(f"{name} must be of shape ({size},), got {tuple(table.shape)}")
        if table.device != x.device:
            raise RuntimeError(f"x is on {x.device}, but {name} is on {table.device}")
    if not groups or channels % groups:
        raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"expected a residual of shape {x.shape}, got {residual.shape}")
        if residual.device != x.device:
            raise RuntimeError(f"x is on {x.device}, but the residual is on {residual.device}")


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        norm: Normalization,
        activation: str,
        repeatable: Optional[bool],
        x: Tensor,
        residual: Optional[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        kernels = kernels_for(x)
        y, tables = forward(kernels, x, norm, residual, activation, repeatable, ctx)
        reads_y = activation and (residual is not None or kernels.SAVES_ACTIVATED_OUTPUT)
        ctx.save_for_backward(x, y if reads_y else None, tables, *parameters)
        ctx.options = (norm.eps, activation, residual is not None, norm.synchronize)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, y, tables, *parameters = ctx.saved_tensors  # once, for activation checkpointing
        eps, activation, has_residual, synchronize = ctx.options
        if not (torch.is_grad_enabled() or is_transformed(grad)):
            gradients = gradients_by_kernels(
                grad, x, y, tables, parameters, activation, has_residual, synchronize
            )
            return (None, None, None, *gradients)
        # Second derivatives, or many gradients at once: by differentiable operations.
        create_graph = torch.is_grad_enabled()
        needed = [ctx.needs_input_grad[3], *ctx.needs_input_grad[5:]]
        with torch.enable_grad():
            x, *parameters = inputs = aliases(x, *parameters)
            weight, bias, group_weight, group_bias = parameters
            mean, rstd = statistics_of_call(x, tables, parameters, eps, synchronize)
            z = batch_channel_norm_by(x, mean, rstd, weight, bias, group_weight, group_bias, eps)
            grad = let_through(grad, z if y is None else y, activation)
            grad_x, *others = gradients_of(z, inputs, needed, grad, create_graph)
        return (None, None, None, grad_x, grad if has_residual else None, *others)


def gradients_by_kernels(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    tables: Tensor,
    parameters: List[Tensor],
    activation: str,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Optional[Tensor], ...]:
    """Gradients of x, the residual (None without one) and the four parameters."""
    weight, _, group_weight, _ = parameters
    grad_x, grad_residual, flat = kernels_for(x).backward(
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
    if has_residual and not activation:
        grad_residual = grad
    # They share a storage but no element, and so need not be views that know of each other.
    parts = flat.unsafe_split_with_sizes([p.shape[0] for p in parameters])
    return (grad_x, grad_residual, *(part.to(p.dtype) for part, p in zip(parts, parameters)))


def statistics_of_call(
    x: Tensor, tables: Tensor, parameters: Sequence[Tensor], eps: float, synchronize: bool
) -> Tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation that a call normalized x by, (C,): differentiable if they are
    those of the batch.

    Raises:
        RuntimeError: if they are those of several ranks.
    """
    split = split_tables(tables, x.shape[0], x.shape[1], parameters[2].shape[0])
    if not split.count.numel():
        return split.mu, split.rstd
    if synchronize:
        raise RuntimeError(
            "gradients through the statistics of several ranks (SyncBCN) cannot be differentiated"
        )
    return _batch_statistics(x, tables.dtype, eps)


def _batch_statistics(x: Tensor, dtype: torch.dtype, eps: float) -> Tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + eps)


def _by_formula(
    x: Tensor, norm: Normalization, residual: Optional[Tensor], activation: str
) -> Tensor:
    """By stock operations, with their gradients, for what is not computed at once."""
    mean, var, dtype = norm.running_mean, norm.running_var, norm.running_mean.dtype
    if in_backward():
        norm = norm._replace(update_rate=None)
    if norm.use_batch_statistics and norm.synchronize:
        raise RuntimeError(
            "statistics of several ranks (SyncBCN) are not for torch.func, tracing or fake tensors"
        )
    if norm.use_batch_statistics or norm.update_rate is not None:
        with without_derivatives():
            values = x.shape[0] * x.shape[2] * x.shape[3]
            v, m = torch.var_mean(x.to(dtype), (2, 3), correction=0)
            if norm.use_batch_statistics:
                use_batch(norm, *pool_images(m, v), values, mean.new_empty(1))
            elif values and norm.update_rate is not None:
                around_old = v + (m - mean).square()
                update_estimates(norm, m.mean(0), around_old.mean(0), norm.update_rate, values)
    if norm.use_batch_statistics:
        mean, rstd = _batch_statistics(x, dtype, norm.eps)
    else:
        rstd = torch.rsqrt(var + norm.eps)
    return batch_channel_norm_by(x, mean, rstd, *norm.parameters, norm.eps, residual, activation)
