"""The operations by kernels in C (:file:`native_kernels.c`), for the CPU.

For batch-channel normalization plain PyTorch calls a hundred operations, nearly all of them on
tables, and reads and writes the activation for each of those that are not. These kernels are called
once for a pass and move what has to be moved. They are for float32, and activations in NCHW;
everything else is :mod:`.eager`'s, whose tables are the same.
"""

import sys
from operator import attrgetter
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import eager
from .estimates import pool_images, sum_over_ranks, use_batch
from .memory_format import dense
from .native_library import kernel_addresses, library
from .tables import new_tables, split_tables, tables_size

# As of plain PyTorch, which may have to do the backward pass.
SAVES_OUTPUT_OF_RELU = eager.SAVES_OUTPUT_OF_RELU


def for_extension() -> Tuple[int, ...]:
    """See :file:`extension.cpp`: the addresses of the kernels."""
    return tuple(kernel_addresses("wsbcn_forward", "wsbcn_again", "wsbcn_backward"))


_F32 = torch.float32
# Of ``wsbcn_forward``: what to normalize by.
_OF_BATCH, _FIXED, _UPDATED = range(3)


def try_out() -> None:
    """Goes through passes, and compares them with what plain PyTorch makes of them.

    Raises whatever makes that fail.
    """
    library()
    kind = {"dtype": _F32, "device": "cpu"}  # whatever the defaults are
    x, residual = torch.linspace(0.0, 80.0, 96, **kind).sin().view(2, 2, 4, 2, 3)
    affine = [torch.linspace(0.5, 1.5, n, **kind) for n in (4, 4, 2, 2)]
    for rate, use_batch_statistics, added in (
        (0.1, False, None),
        (None, False, residual),
        (0.1, True, None),
    ):
        results = []
        for kernels in (sys.modules[__name__], eager):
            estimates = torch.linspace(0.5, 1.0, 8, **kind).view(2, 4).unbind()
            tensors, options = (x, added, *affine, *estimates), (rate, 1e-5, use_batch_statistics)
            y, tables = kernels.batch_channel_norm_forward(
                *tensors, None, None, *options, True, False
            )
            gradients = kernels.batch_channel_norm_backward(
                residual, x, y, affine[0], affine[2], tables, True, added is not None, False
            )
            results.append([y, *estimates, *(t for t in gradients if t is not None)])
        _check_same(*results)
    results = []
    for kernels in (sys.modules[__name__], eager):
        filters, mean, rstd = kernels.standardize_forward([x], [1e-5], _F32)
        results.append(filters + kernels.standardize_backward([residual], [x], mean, rstd))
    _check_same(*results)


def _check_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, theirs)):
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
    added = residual
    if residual is not None and x.is_contiguous():
        added = residual.contiguous()
    addresses = _addresses(x, added, seen_elements, *of_layer)
    if addresses is None or not _fit(x, residual, of_layer, seen_elements):
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
    y = torch.empty_like(x)
    x_, added_, seen_, *of_layer_ = addresses
    updated = library().wsbcn_forward(
        x_,
        added_,
        y.data_ptr(),
        tables.data_ptr(),
        *of_layer_,
        seen_,
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
    addresses = _addresses(x, tables)
    if addresses is None:
        return eager.batch_channel_norm_again(x, tables, groups, relu)
    images, channels, height, width = x.shape
    x_, tables_ = addresses
    y = torch.empty_like(x)
    library().wsbcn_again(
        x_,
        y.data_ptr(),
        tables_,
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
    shape = x.shape
    images, channels = shape[:2]
    groups = group_weight.shape[0]
    reads_y = relu and has_residual
    tensors = (grad, y) if reads_y else (grad, None)
    if x.is_contiguous():
        tensors = [None if t is None else t.contiguous() for t in tensors]
    addresses = _addresses(x, weight, group_weight, tables, *tensors)
    # One value more with the statistics of the batch.
    count = tables.numel() - tables_size(shape, groups, False)
    if addresses is None or grad.shape != shape or count not in (0, 1):
        return eager.batch_channel_norm_backward(
            grad, x, y, weight, group_weight, tables, relu, has_residual, synchronize
        )
    x_, weight_, group_weight_, tables_, grad_, y_ = addresses
    kernels = library()
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if reads_y else None
    parameters = tables.new_empty(2 * (channels + groups))
    scratch = tables.new_empty(images * (4 * channels + 2 * groups))
    sizes = (images, channels, groups, shape[2] * shape[3], torch.get_num_threads())
    kernels.wsbcn_backward(
        grad_,
        x_,
        y_,
        None if count else grad_x.data_ptr(),
        None if grad_residual is None else grad_residual.data_ptr(),
        tables_,
        scratch.data_ptr(),
        weight_,
        group_weight_,
        parameters.data_ptr(),
        relu,
        *sizes,
    )
    if count:
        of_weight, of_bias = parameters[:channels], parameters[channels : 2 * channels]
        if synchronize:
            of_weight, of_bias = sum_over_ranks(of_weight, of_bias)
        kernels.wsbcn_backward_through_batch(
            grad_ if grad_residual is None else grad_residual.data_ptr(),
            x_,
            grad_x.data_ptr(),
            tables_,
            scratch.data_ptr(),
            weight_,
            of_weight.data_ptr(),
            of_bias.data_ptr(),
            float(tables[-1].clamp(min=1)),
            relu and grad_residual is None,
            *sizes,
        )
    return grad_x, grad_residual, parameters


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    x = dense(x)
    if _addresses(x) is None:
        return eager.moments(x)
    mean, var = x.new_empty((2, *x.shape[:2]))
    _find_moments(x, mean, var)
    return mean, var


def standardize_forward(
    weights: Sequence[Tensor], eps: Sequence[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """See :mod:`.weight_standardization`."""
    addresses = _addresses(*weights)
    if dtype != _F32 or addresses is None:
        return eager.standardize_forward(weights, eps, dtype)
    outputs = [torch.empty_like(weight) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    mean, rstd = weights[0].new_empty((2, sum(sizes)))
    kernels, threads = library(), torch.get_num_threads()
    tables = zip(mean.split(sizes), rstd.split(sizes))
    for weight, address, out, (m, r), e in zip(weights, addresses, outputs, tables, eps):
        filters = weight.shape[0]
        kernels.wsbcn_standardize(
            address,
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
    dense_grads = [grad.contiguous() for grad in grads]
    addresses = _addresses(mean, rstd, *dense_grads, *weights)
    if addresses is None:
        return eager.standardize_backward(grads, weights, mean, rstd)
    outputs = [torch.empty_like(weight) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    kernels, threads = library(), torch.get_num_threads()
    tables = zip(mean.split(sizes), rstd.split(sizes))
    for grad, weight, out, (m, r) in zip(dense_grads, weights, outputs, tables):
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


_dtype_of, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")
_ONLY_F32 = {_F32}


def _addresses(*tensors: Optional[Tensor]) -> Optional[List[Optional[int]]]:
    """Where tensors lie, None for None; None if the kernels cannot read one of them: if it is not
    contiguous, of float32 and in memory of the CPU, or has no values.

    The kernels do not find out what is wrong with others; the operations of PyTorch do.
    """
    there = [t for t in tensors if t is not None]
    # Asked for at every call, and so without loops in Python.
    if not (
        all(map(Tensor.is_contiguous, there))
        and all(map(_is_cpu, there))
        and {*map(_dtype_of, there)} == _ONLY_F32
    ):
        return None
    addresses = [*map(Tensor.data_ptr, there)]
    if not all(addresses):  # nor has a tensor without memory, as there are with some types
        return None
    if len(there) == len(tensors):
        return addresses
    rest = iter(addresses)
    return [None if t is None else next(rest) for t in tensors]


def _fit(
    x: Tensor,
    residual: Optional[Tensor],
    of_layer: Sequence[Tensor],
    seen_elements: Optional[Tensor],
) -> bool:
    """Whether such arguments fit together."""
    channels, groups = x.shape[1], of_layer[2].shape[0]
    sizes = [channels, channels, groups, groups, channels, channels]
    return (
        [*map(Tensor.numel, of_layer)] == sizes
        and groups > 0
        and channels % groups == 0
        and (residual is None or residual.shape == x.shape)
        and (seen_elements is None or seen_elements.numel() == 1)
    )
