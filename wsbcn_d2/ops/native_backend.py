"""The operations by kernels in C (:file:`native_kernels.c`), for the CPU.

For batch-channel normalization plain PyTorch calls a hundred operations, nearly all of them on
tables, and reads and writes the activation for each of those that are not. These kernels are called
once for a pass and move what has to be moved. They are for float32, and activations in NCHW;
everything else is :mod:`.eager`'s, whose tables are the same.
"""

from operator import attrgetter
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import eager
from .estimates import pool_images, sum_over_ranks, use_batch
from .memory_format import dense
from .native_library import library
from .tables import new_tables, split_tables

# As of plain PyTorch, which may have to do the backward pass.
SAVES_OUTPUT_OF_RELU = eager.SAVES_OUTPUT_OF_RELU

_F32 = torch.float32
_ONLY_F32 = {_F32}
_dtype_of = attrgetter("dtype")
# Of ``wsbcn_forward``: what to normalize by.
_OF_BATCH, _FIXED, _UPDATED = range(3)


def try_out() -> None:
    """Goes through a pass, and compares it with what plain PyTorch makes of it.

    Raises whatever makes that fail.
    """
    x = torch.linspace(-1.0, 1.0, 24).view(1, 4, 2, 3).square()
    affine = [torch.linspace(0.5, 1.5, n) for n in (4, 4, 2, 2)]
    results = []
    for forward, backward in (
        (batch_channel_norm_forward, batch_channel_norm_backward),
        (eager.batch_channel_norm_forward, eager.batch_channel_norm_backward),
    ):
        estimates = torch.zeros(4), torch.ones(4)
        y, tables = forward(x, None, *affine, *estimates, None, None, 0.1, 1e-5, False, True, False)
        grad_x, _, of_parameters = backward(
            x, x, y, affine[0], affine[2], tables, True, False, False
        )
        results.append(torch.cat([t.flatten() for t in (y, *estimates, grad_x, of_parameters)]))
    if not torch.allclose(*results, rtol=1e-3, atol=1e-4):
        raise RuntimeError("the compiled kernels compute something else than PyTorch")


def batch_channel_norm_forward(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    skipped_updates: Optional[Tensor],
    seen_elements: Optional[Tensor],
    update_rate: Optional[float],
    eps: float,
    use_batch_statistics: bool,
    relu: bool,
    synchronize: bool,
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    of_layer = (weight, bias, group_weight, group_bias, running_mean, running_var)
    if not _can_be_read(x, residual, of_layer, seen_elements):
        return eager.batch_channel_norm_forward(
            x,
            residual,
            *of_layer,
            skipped_updates,
            seen_elements,
            update_rate,
            eps,
            use_batch_statistics,
            relu,
            synchronize,
        )
    images, channels, height, width = x.shape
    groups, pixels = group_weight.shape[0], height * width
    tables = new_tables(x, groups, use_batch_statistics)
    statistics = _FIXED if update_rate is None else _UPDATED
    if use_batch_statistics:
        statistics = _OF_BATCH
        _, _, m, v, *_, count = split_tables(tables, images, channels, groups)
        _find_moments(x, m, v)
        running, counters = (running_mean, running_var), (skipped_updates, seen_elements)
        batch = pool_images(m, v)
        batch = use_batch(
            *batch, images * pixels, count, *running, update_rate, *counters, synchronize
        )
        torch.stack(batch, out=tables[: 2 * channels].view(2, channels))
    if residual is not None:
        residual = residual.contiguous()
    y = torch.empty_like(x)
    updated = library().wsbcn_forward(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        y.data_ptr(),
        tables.data_ptr(),
        *map(Tensor.data_ptr, of_layer),
        None if seen_elements is None else seen_elements.data_ptr(),
        0.0 if update_rate is None else float(update_rate),
        eps,
        statistics,
        relu,
        images,
        channels,
        groups,
        pixels,
        torch.get_num_threads(),
    )
    if not updated and skipped_updates is not None:
        skipped_updates.add_(1)
    return y, tables


def batch_channel_norm_again(x: Tensor, tables: Tensor, groups: int, relu: bool) -> Tensor:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    if not (_fits(x) and _are_plain((tables,))):
        return eager.batch_channel_norm_again(x, tables, groups, relu)
    images, channels, height, width = x.shape
    y = torch.empty_like(x)
    library().wsbcn_again(
        x.data_ptr(),
        y.data_ptr(),
        tables.data_ptr(),
        relu,
        images,
        channels,
        groups,
        height * width,
        torch.get_num_threads(),
    )
    return y


def batch_channel_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    tables: Tensor,
    relu: bool,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    if not (_fits(x) and grad.dtype == _F32 and _are_plain((weight, group_weight, tables))):
        return eager.batch_channel_norm_backward(
            grad, x, y, weight, group_weight, tables, relu, has_residual, synchronize
        )
    grad = grad.contiguous()
    if y is not None:
        y = y.contiguous()
    images, channels, height, width = x.shape
    groups = group_weight.shape[0]
    shape = (images, channels, groups, height * width, torch.get_num_threads())
    kernels = library()
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if relu and has_residual else None
    parameters = tables.new_empty(2 * (channels + groups))
    scratch = tables.new_empty(images * (4 * channels + 2 * groups))
    count = tables.numel() - 2 * channels - images * (5 * channels + groups)
    kernels.wsbcn_backward(
        grad.data_ptr(),
        x.data_ptr(),
        None if grad_residual is None else y.data_ptr(),
        None if count else grad_x.data_ptr(),
        None if grad_residual is None else grad_residual.data_ptr(),
        tables.data_ptr(),
        scratch.data_ptr(),
        weight.data_ptr(),
        group_weight.data_ptr(),
        parameters.data_ptr(),
        relu,
        *shape,
    )
    if count:
        of_weight, of_bias = parameters[:channels], parameters[channels : 2 * channels]
        if synchronize:
            of_weight, of_bias = sum_over_ranks(of_weight, of_bias)
        kernels.wsbcn_backward_through_batch(
            (grad if grad_residual is None else grad_residual).data_ptr(),
            x.data_ptr(),
            grad_x.data_ptr(),
            tables.data_ptr(),
            scratch.data_ptr(),
            weight.data_ptr(),
            of_weight.data_ptr(),
            of_bias.data_ptr(),
            float(tables[-1].clamp(min=1)),
            relu and grad_residual is None,
            *shape,
        )
    return grad_x, grad_residual, parameters


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    x = dense(x)
    if not _fits(x):
        return eager.moments(x)
    mean, var = x.new_empty((2, *x.shape[:2]))
    _find_moments(x, mean, var)
    return mean, var


def standardize_forward(
    weights: Sequence[Tensor], eps: Sequence[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """See :mod:`.weight_standardization`."""
    if dtype != _F32 or not all(map(_fits, weights)):
        return eager.standardize_forward(weights, eps, dtype)
    outputs = [torch.empty_like(weight) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    mean, rstd = weights[0].new_empty((2, sum(sizes)))
    kernels, threads = library(), torch.get_num_threads()
    for weight, out, m, r, e in zip(weights, outputs, mean.split(sizes), rstd.split(sizes), eps):
        filters = weight.shape[0]
        kernels.wsbcn_standardize(
            weight.data_ptr(),
            out.data_ptr(),
            m.data_ptr(),
            r.data_ptr(),
            e,
            filters,
            weight.numel() // filters,
            threads,
        )
    return outputs, mean, rstd


def standardize_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """See :mod:`.weight_standardization`."""
    if not (all(map(_fits, weights)) and all(grad.dtype == _F32 for grad in grads)):
        return eager.standardize_backward(grads, weights, mean, rstd)
    grads = [grad.contiguous() for grad in grads]
    outputs = [torch.empty_like(weight) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    kernels, threads = library(), torch.get_num_threads()
    tables = zip(mean.split(sizes), rstd.split(sizes))
    for grad, weight, out, (m, r) in zip(grads, weights, outputs, tables):
        filters = weight.shape[0]
        kernels.wsbcn_standardize_backward(
            grad.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            m.data_ptr(),
            r.data_ptr(),
            filters,
            weight.numel() // filters,
            threads,
        )
    return outputs


def _find_moments(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Writes the mean and biased variance of each image and channel into tables (N, C)."""
    images, channels, height, width = x.shape
    library().wsbcn_moments(
        x.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        mean.stride(0),
        images,
        channels,
        height * width,
        torch.get_num_threads(),
    )


def _fits(x: Tensor) -> bool:
    """Whether the kernels are for such an activation, or such filters."""
    return x.dtype == _F32 and x.is_contiguous() and x.numel() > 0


def _can_be_read(
    x: Tensor,
    residual: Optional[Tensor],
    of_layer: Sequence[Tensor],
    seen_elements: Optional[Tensor],
) -> bool:
    """Whether the kernels are for such arguments. They do not find out what is wrong with others;
    the operations of PyTorch do."""
    if not _fits(x) or (
        residual is not None and (residual.shape, residual.dtype) != (x.shape, _F32)
    ):
        return False
    channels, groups = x.shape[1], of_layer[2].shape[0]
    sizes = [channels, channels, groups, groups, channels, channels]
    return (
        _are_plain(of_layer)
        and [*map(Tensor.numel, of_layer)] == sizes
        and channels % groups == 0
        and (seen_elements is None or _are_plain((seen_elements,)))
    )


def _are_plain(tables: Sequence[Tensor]) -> bool:
    # Asked for at every call, and so without a loop in Python.
    return all(map(Tensor.is_contiguous, tables)) and {*map(_dtype_of, tables)} == _ONLY_F32
