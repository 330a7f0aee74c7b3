"""The kernels in Triton, for GPUs.

An activation is cut into tiles of channels and pixels whose shape follows the memory format, so
that NCHW and channels_last are both read the way they lie in memory. Work on few images with few
channels would leave most of a GPU idle, so the pixels are divided too; what the parts yield is put
together in a fixed order, and results are reproducible. A forward pass is three launches (moments,
tables, apply), one more where many images or parts are to be put together for new estimates; a
backward pass is three. With one image a step the host is as busy as the GPU, and what it spends on
a launch grows with the number of arguments: what belongs together is in one tensor.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import List, Optional, Tuple, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from .estimates import pool_over_ranks, sum_over_ranks, update_with_batch
from .tables import new_tables, split_tables

# The sign under a fused ReLU is computed again from x and the tables, if nothing was added.
SAVES_OUTPUT_OF_RELU = False

_TILE = 2048  # elements
_TABLE_TILE = 4096
# Values up to which every program puts together the statistics of all channels by itself, rather
# than a kernel of their own: of the batch, to find out whether all of them are finite.
_FEW_MOMENTS = 16384
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _places(n, c, p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Where the values of one image lie, [channels, pixels]; n is of 64 bits."""
    if CHANNELS_LAST:
        pixel = n * pixels + p.to(tl.int64)
        places = pixel[None, :] * channels + c[:, None]
    else:
        plane = n * channels + c.to(tl.int64)
        places = plane[:, None] * pixels + p[None, :]
    return places


@triton.jit
def _moments_kernel(
    x_ptr,
    moments_ptr,
    channels,
    pixels,
    part,
    parts,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean and sum of squared deviations of one part of the pixels: a table (N, parts, 2, C)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, pixels)

    # Welford's recurrence in every lane: one pass, without cancellation far from zero.
    mean = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    step = tl.zeros([], COMPUTE)
    for start in range(first, last, BLOCK_P):
        p = start + lane
        mask = (c[:, None] < channels) & (p[None, :] < last)
        at = _places(n, c, p, channels, pixels, CHANNELS_LAST)
        value = tl.load(x_ptr + at, mask=mask, other=0.0)
        step += 1.0
        delta = tl.where(mask, value.to(COMPUTE) - mean, 0.0)
        mean += delta * (1.0 / step)
        m2 += delta * tl.where(mask, value.to(COMPUTE) - mean, 0.0)

    count = tl.maximum(last - first - lane + BLOCK_P - 1, 0) // BLOCK_P
    count = count.to(COMPUTE)[None, :]
    origin = tl.sum(tl.where(lane[None, :] == 0, mean, 0.0), axis=1)
    offset = tl.sum(tl.where(count > 0, (mean - origin[:, None]) * count, 0.0), axis=1)
    offset /= last - first
    around = mean - (origin + offset)[:, None]
    m2 = tl.sum(tl.where(count > 0, m2 + around * around * count, 0.0), axis=1)
    out = (n * parts + tl.program_id(1)) * 2 * channels + c
    tl.store(moments_ptr + out, origin + offset, mask=c < channels)
    tl.store(moments_ptr + out + channels, m2, mask=c < channels)


@triton.jit
def _pooled(
    moments_ptr,
    origin,
    c,
    first,
    last,
    channels,
    pixels,
    part,
    parts,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the deviations from ``origin``, and of their squares, over some rows of the moments,
    [rows of (N, parts), 2, C]."""
    inside = c < channels
    offset = tl.zeros([BLOCK_C], COMPUTE)
    square = tl.zeros([BLOCK_C], COMPUTE)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row[:, None] < last) & inside[None, :]
        count = tl.minimum(pixels - (row % parts) * part, part).to(COMPUTE)[:, None]
        at = row.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        mean = tl.load(moments_ptr + at, mask=mask, other=0.0)
        m2 = tl.load(moments_ptr + at + channels, mask=mask, other=0.0)
        delta = tl.where(mask, mean - origin[None, :], 0.0)
        offset += tl.sum(delta * count, axis=0)
        square += tl.sum(m2 + delta * delta * count, axis=0)
    return offset, square


@triton.jit
def _new_estimates(
    moments_ptr,
    running_mean_ptr,
    running_var_ptr,
    update_rate,
    c,
    rows,
    channels,
    pixels,
    part,
    parts,
    values,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What the estimates of some channels would be after the batch."""
    old_mean = tl.load(running_mean_ptr + c, mask=c < channels, other=0.0).to(COMPUTE)
    old_var = tl.load(running_var_ptr + c, mask=c < channels, other=0.0).to(COMPUTE)
    offset, square = _pooled(
        moments_ptr,
        old_mean,
        c,
        0,
        rows,
        channels,
        pixels,
        part,
        parts,
        COMPUTE,
        BLOCK_R,
        BLOCK_C,
    )
    mean = old_mean + update_rate * (offset / values)
    var = old_var + update_rate * (square / values - old_var)
    return mean, var


@triton.jit
def _pool_kernel(
    moments_ptr,
    running_mean_ptr,
    running_var_ptr,
    out_ptr,
    update_rate,
    rows,
    channels,
    pixels,
    part,
    parts,
    values,
    AROUND_ESTIMATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of the batch, (2, C): its mean and variance, or, with ``AROUND_ESTIMATE``, what
    the estimates would be after it."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    if AROUND_ESTIMATE:
        mean, var = _new_estimates(
            moments_ptr,
            running_mean_ptr,
            running_var_ptr,
            update_rate,
            c,
            rows,
            channels,
            pixels,
            part,
            parts,
            values,
            COMPUTE,
            BLOCK_R,
            BLOCK_C,
        )
    else:
        # Twice: the mean first, as the first image may be far from it.
        mean = tl.load(moments_ptr + c, mask=inside, other=0.0)
        for _ in tl.static_range(2):
            offset, square = _pooled(
                moments_ptr,
                mean,
                c,
                0,
                rows,
                channels,
                pixels,
                part,
                parts,
                COMPUTE,
                BLOCK_R,
                BLOCK_C,
            )
            mean += offset / values
            var = square / values
    tl.store(out_ptr + c, mean, mask=inside)
    tl.store(out_ptr + channels + c, var, mask=inside)


@triton.jit
def _not_finite(mean, var, inside):
    """Number of channels with a statistic that is not finite."""
    # A difference with itself is zero exactly for finite numbers.
    bad = (mean - mean != 0.0) | (var - var != 0.0)
    return tl.sum(tl.where(bad & inside, 1, 0), axis=0)


@triton.jit
def _forward_tables_kernel(
    moments_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    group_weight_ptr,
    group_bias_ptr,
    tables_ptr,
    shift_ptr,
    estimates_ptr,
    update_rate,
    eps,
    rows,
    channels,
    groups,
    pixels,
    part,
    parts,
    values,
    UPDATE: tl.constexpr,
    POOL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """One image and group: its statistics, and the affine map of each channel.

    The statistics to normalize by are given, or, with ``UPDATE``, the estimates after the batch if
    all of the layer are finite, and as they are otherwise. These come from the moments (``POOL``),
    or are given. Every program finds that out for itself, so none may write the estimates: those of
    the first image write ``estimates``, the new means and variances and whether they are the old.
    """
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = channels // groups
    k = tl.arange(0, BLOCK_D)
    # Beyond the group there is nothing to read.
    c = tl.where(k < size, g * size + k, channels)
    inside = k < size

    if UPDATE:
        bad = 0
        for start in range(0, channels, BLOCK_ALL):
            i = start + tl.arange(0, BLOCK_ALL)
            if POOL:
                mean, var = _new_estimates(
                    moments_ptr,
                    running_mean_ptr,
                    running_var_ptr,
                    update_rate,
                    i,
                    rows,
                    channels,
                    pixels,
                    part,
                    parts,
                    values,
                    COMPUTE,
                    BLOCK_R,
                    BLOCK_ALL,
                )
            else:
                mean = tl.load(mean_ptr + i, mask=i < channels, other=0.0)
                var = tl.load(var_ptr + i, mask=i < channels, other=0.0)
            bad += _not_finite(mean, var, i < channels)
        if POOL:
            mu, s2 = _new_estimates(
                moments_ptr,
                running_mean_ptr,
                running_var_ptr,
                update_rate,
                c,
                rows,
                channels,
                pixels,
                part,
                parts,
                values,
                COMPUTE,
                BLOCK_S,
                BLOCK_D,
            )
        else:
            mu = tl.load(mean_ptr + c, mask=inside, other=0.0)
            s2 = tl.load(var_ptr + c, mask=inside, other=0.0)
        old_mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        old_var = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        mu = tl.where(bad == 0, mu, old_mean)
        s2 = tl.where(bad == 0, s2, old_var)
        if n == 0:
            tl.store(estimates_ptr + c, mu, mask=inside)
            tl.store(estimates_ptr + channels + c, s2, mask=inside)
            if g == 0:
                tl.store(estimates_ptr + 2 * channels, tl.where(bad == 0, 0.0, 1.0))
    else:
        mu = tl.load(mean_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        s2 = tl.load(var_ptr + c, mask=inside, other=0.0).to(COMPUTE)

    # The statistics of the channels from those of the parts of their pixels.
    first = n.to(tl.int32) * parts
    m = tl.load(moments_ptr + n * parts * 2 * channels + c, mask=inside, other=0.0)
    v = m
    for _ in tl.static_range(2):  # around the mean itself, as the first part may be far from it
        offset, square = _pooled(
            moments_ptr,
            m,
            c,
            first,
            first + parts,
            channels,
            pixels,
            part,
            parts,
            COMPUTE,
            BLOCK_S,
            BLOCK_D,
        )
        m += offset / pixels
        v = square / pixels

    rstd = 1.0 / tl.sqrt(s2 + eps)
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(COMPUTE) * rstd
    z_mean = a * (m - mu) + tl.load(bias_ptr + c, mask=inside, other=0.0).to(COMPUTE)
    d = tl.where(inside, z_mean - tl.sum(tl.where(inside, z_mean, 0.0), axis=0) / size, 0.0)
    group_var = tl.sum(tl.where(inside, a * a * v + d * d, 0.0), axis=0) / size
    r = 1.0 / tl.sqrt(group_var + eps)
    gain = tl.load(group_weight_ptr + g).to(COMPUTE) * r

    row = tables_ptr + 2 * channels + n * (4 * channels + groups)
    tl.store(row + c, m, mask=inside)
    tl.store(row + channels + c, v, mask=inside)
    tl.store(row + 2 * channels + c, d, mask=inside)
    tl.store(row + 3 * channels + c, gain * a, mask=inside)
    tl.store(row + 4 * channels + g, r)
    shift = gain * d + tl.load(group_bias_ptr + g).to(COMPUTE)
    tl.store(shift_ptr + n * channels + c, shift, mask=inside)
    if n == 0:
        tl.store(tables_ptr + c, mu, mask=inside)
        tl.store(tables_ptr + channels + c, rstd, mask=inside)


@triton.jit
def _apply_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    tables_ptr,
    shift_ptr,
    estimates_ptr,
    running_mean_ptr,
    running_var_ptr,
    skipped_ptr,
    seen_ptr,
    channels,
    groups,
    pixels,
    tiles,
    values,
    UPDATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of ``relu(scale * (x - m) + shift + residual)``; with ``UPDATE``, those of the first
    image write its channels' estimates."""
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (row // blocks).to(tl.int64)
    c = (row % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = inside[:, None] & (p[None, :] < pixels)
    at = _places(n, c, p, channels, pixels, CHANNELS_LAST)
    table = tables_ptr + 2 * channels + n * (4 * channels + groups) + c
    m = tl.load(table, mask=inside, other=0.0)
    scale = tl.load(table + 3 * channels, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    y = scale[:, None] * (x - m[:, None]) + shift[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN, as in torch.relu
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if UPDATE:
        if (n == 0) & (tile == 0):
            mean = tl.load(estimates_ptr + c, mask=inside)
            var = tl.load(estimates_ptr + channels + c, mask=inside)
            tl.store(running_mean_ptr + c, mean, mask=inside)
            tl.store(running_var_ptr + c, var, mask=inside)
            if row == 0:
                bad = tl.load(estimates_ptr + 2 * channels)
                tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(bad == 0.0, 0, 1))
                tl.store(seen_ptr, tl.load(seen_ptr) + tl.where(bad == 0.0, values, 0.0))


@triton.jit
def _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT: tl.constexpr):
    """The gradient before ReLU, whose output is read if it has been saved."""
    if FROM_OUTPUT:
        positive = tl.load(y_ptr + at, mask=mask, other=0.0) > 0
    else:
        positive = scale[:, None] * (x - m[:, None]) + shift[:, None] > 0
    return tl.where(positive, grad, 0.0)


@triton.jit
def _sums_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    tables_ptr,
    shift_ptr,
    sums_ptr,
    channels,
    groups,
    pixels,
    part,
    parts,
    FROM_OUTPUT: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of the gradient, and of the gradient times x - m, over one part of the pixels: a table
    (N, parts, 2, C)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    lane = tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, pixels)
    table = tables_ptr + 2 * channels + n * (4 * channels + groups) + c
    m = tl.load(table, mask=inside, other=0.0)
    scale = m
    shift = m
    if RELU and not FROM_OUTPUT:
        scale = tl.load(table + 3 * channels, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)
    s1 = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    s2 = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    for start in range(first, last, BLOCK_P):
        p = start + lane
        mask = inside[:, None] & (p[None, :] < last)
        at = _places(n, c, p, channels, pixels, CHANNELS_LAST)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(COMPUTE)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
        if RELU:
            grad = _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT)
        s1 += grad
        s2 += tl.where(mask, grad * (x - m[:, None]), 0.0)
    out = (n * parts + tl.program_id(1)) * 2 * channels + c
    tl.store(sums_ptr + out, tl.sum(s1, axis=1), mask=inside)
    tl.store(sums_ptr + out + channels, tl.sum(s2, axis=1), mask=inside)


@triton.jit
def _backward_tables_kernel(
    sums_ptr,
    weight_ptr,
    group_weight_ptr,
    tables_ptr,
    coefficients_ptr,
    parameters_ptr,
    channels,
    groups,
    pixels,
    parts,
    group_values,
    COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One image and group: the coefficients of the gradient of x, a table (N, 2, C), and what the
    image contributes to those of the parameters, a table (N, 2 C + 2 G)."""
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = channels // groups
    i = tl.arange(0, BLOCK_D)
    c = g * size + i
    inside = i < size
    s1 = tl.zeros([BLOCK_D], COMPUTE)
    s2 = tl.zeros([BLOCK_D], COMPUTE)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < parts) & inside[None, :]
        at = (n * parts + s.to(tl.int64)[:, None]) * 2 * channels + c[None, :]
        s1 += tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0), axis=0)
        s2 += tl.sum(tl.load(sums_ptr + at + channels, mask=mask, other=0.0), axis=0)

    row = tables_ptr + 2 * channels + n * (4 * channels + groups)
    m = tl.load(row + c, mask=inside, other=0.0)
    v = tl.load(row + channels + c, mask=inside, other=0.0)
    d = tl.load(row + 2 * channels + c, mask=inside, other=0.0)
    p = tl.load(row + 3 * channels + c, mask=inside, other=0.0)
    r = tl.load(row + 4 * channels + g)
    mu = tl.load(tables_ptr + c, mask=inside, other=0.0)
    rstd = tl.load(tables_ptr + channels + c, mask=inside, other=0.0)
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(COMPUTE) * rstd
    k = tl.load(group_weight_ptr + g).to(COMPUTE) * r

    grad_group_bias = tl.sum(s1, axis=0)
    grad_group_weight = tl.sum(r * (a * s2 + d * s1), axis=0)
    u1 = grad_group_bias / group_values
    u2 = grad_group_weight / group_values
    dz_sum = k * (s1 - pixels * (u1 + u2 * r * d))
    dz_t_sum = k * (s2 - pixels * u2 * r * a * v)
    out = coefficients_ptr + n * 2 * channels + c
    tl.store(out, -p * u2 * r * a, mask=inside)
    tl.store(out + channels, -p * (u1 + u2 * r * d), mask=inside)
    out = parameters_ptr + n * (2 * channels + 2 * groups)
    tl.store(out + c, (dz_t_sum + (m - mu) * dz_sum) * rstd, mask=inside)
    tl.store(out + channels + c, dz_sum, mask=inside)
    tl.store(out + 2 * channels + g, grad_group_weight)
    tl.store(out + 2 * channels + groups + g, grad_group_bias)


@triton.jit
def _input_grad_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    tables_ptr,
    shift_ptr,
    coefficients_ptr,
    channels,
    groups,
    pixels,
    tiles,
    HAS_RESIDUAL: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the gradients of x, ``scale * grad + q * (x - m) + c``, and of the residual."""
    row = tl.program_id(0) // tiles
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (row // blocks).to(tl.int64)
    c = (row % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = inside[:, None] & (pixel[None, :] < pixels)
    at = _places(n, c, pixel, channels, pixels, CHANNELS_LAST)
    table = tables_ptr + 2 * channels + n * (4 * channels + groups) + c
    m = tl.load(table, mask=inside, other=0.0)
    scale = tl.load(table + 3 * channels, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    if RELU:
        shift = m
        if not FROM_OUTPUT:
            shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)
        grad = _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT)
        if HAS_RESIDUAL:
            tl.store(grad_residual_ptr + at, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    coefficients = coefficients_ptr + n * 2 * channels + c
    q = tl.load(coefficients, mask=inside, other=0.0)
    b = tl.load(coefficients + channels, mask=inside, other=0.0)
    grad_x = scale[:, None] * grad + q[:, None] * (x - m[:, None]) + b[:, None]
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _standardize_kernel(
    weight_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    starts_ptr,
    eps_ptr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One filter, of the concatenated filters of many convolutions."""
    row = tl.program_id(0)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    size = (last - first).to(COMPUTE)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], COMPUTE)
    for start in range(first, last, BLOCK):
        i = start + lane
        total += tl.load(weight_ptr + i, mask=i < last, other=0.0).to(COMPUTE)
    mean = tl.sum(total, axis=0) / size
    square = tl.zeros([BLOCK], COMPUTE)
    for start in range(first, last, BLOCK):
        i = start + lane
        t = tl.load(weight_ptr + i, mask=i < last, other=0.0).to(COMPUTE) - mean
        square += tl.where(i < last, t * t, 0.0)
    var = tl.sum(square, axis=0) / size
    rstd = 1.0 / tl.sqrt(var + tl.load(eps_ptr + row).to(COMPUTE))
    for start in range(first, last, BLOCK):
        i = start + lane
        t = tl.load(weight_ptr + i, mask=i < last, other=0.0).to(COMPUTE) - mean
        tl.store(out_ptr + i, (t * rstd).to(out_ptr.dtype.element_ty), mask=i < last)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _standardize_backward_kernel(
    grad_ptr,
    weight_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    starts_ptr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one filter: ``rstd (g - mean g - w_hat mean(g w_hat))``."""
    row = tl.program_id(0)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    size = (last - first).to(COMPUTE)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    lane = tl.arange(0, BLOCK)
    s1 = tl.zeros([BLOCK], COMPUTE)
    s2 = tl.zeros([BLOCK], COMPUTE)
    for start in range(first, last, BLOCK):
        i = start + lane
        g = tl.load(grad_ptr + i, mask=i < last, other=0.0).to(COMPUTE)
        t = tl.load(weight_ptr + i, mask=i < last, other=0.0).to(COMPUTE) - mean
        s1 += g
        s2 += g * t
    g_mean = tl.sum(s1, axis=0) / size
    slope = rstd * rstd * tl.sum(s2, axis=0) / size
    for start in range(first, last, BLOCK):
        i = start + lane
        g = tl.load(grad_ptr + i, mask=i < last, other=0.0).to(COMPUTE)
        t = tl.load(weight_ptr + i, mask=i < last, other=0.0).to(COMPUTE) - mean
        out = rstd * (g - g_mean - t * slope)
        tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < last)


# With TRITON_INTERPRET=1 kernels run as Python, on tensors of any device.
INTERPRETED = not isinstance(_moments_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class _Tiling:
    """How an activation is divided.

    Attributes:
        channels_last: how it lies in memory.
        block_c, block_p: channels and pixels of a tile.
        rows: images times blocks of channels.
        tiles: blocks of pixels.
        part, parts: pixels of a part and number of parts, for sums over pixels.
    """

    channels_last: bool
    block_c: int
    block_p: int
    rows: int
    tiles: int
    part: int
    parts: int

    @classmethod
    def of(cls, x: Tensor) -> "_Tiling":
        """The tiling of a dense activation, in NCHW or channels_last."""
        return _tiling(x.shape, x.is_contiguous(), x.device)


@lru_cache(maxsize=4096)
def _tiling(shape: torch.Size, contiguous: bool, device: torch.device) -> _Tiling:
    images, channels, height, width = shape
    pixels = height * width
    if contiguous:
        block_p = min(triton.next_power_of_2(pixels), _TILE)
        block_c = min(triton.next_power_of_2(channels), _TILE // block_p)
    else:
        block_c = min(triton.next_power_of_2(channels), 128)
        block_p = min(triton.next_power_of_2(pixels), _TILE // block_c)
    rows = images * triton.cdiv(channels, block_c)
    tiles = triton.cdiv(pixels, block_p)
    # Enough programs for several waves on the GPU; at least two tiles for each.
    wanted = triton.cdiv(8 * _multiprocessors(device), rows)
    part = block_p * triton.cdiv(tiles, max(min(wanted, tiles // 2), 1))
    return _Tiling(not contiguous, block_c, block_p, rows, tiles, part, triton.cdiv(pixels, part))


@lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


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
    update_rate: Union[float, Tensor, None],
    eps: float,
    use_batch_statistics: bool,
    relu: bool,
    synchronize: bool,
) -> Tuple[Tensor, ...]:
    """See :mod:`.batch_channel_norm`."""
    x = _dense(x)
    images, channels, height, width = x.shape
    pixels, groups = height * width, group_weight.shape[0]
    values = float(images * pixels)
    tables = new_tables(x, groups, use_batch_statistics)
    compute = _COMPUTE[tables.dtype]
    shift = tables.new_empty(images, channels)
    y = torch.empty_like(x)
    rate = 0.0 if update_rate is None else float(update_rate)
    mean, var = running_mean, running_var  # to normalize by
    estimates = None  # that this kernel writes
    if not x.numel():
        tiling, moments_, rows = None, None, 0
    else:
        tiling = _Tiling.of(x)
        moments_ = _moments(x, tiling, tables.dtype)
        rows = images * tiling.parts

    def pool(around_estimate: bool) -> Tensor:
        out = tables.new_empty(2, channels)
        block_c = min(triton.next_power_of_2(channels), 16)
        _pool_kernel[(triton.cdiv(channels, block_c),)](
            moments_,
            running_mean,
            running_var,
            out,
            rate,
            rows,
            channels,
            pixels,
            tiling.part,
            tiling.parts,
            values,
            AROUND_ESTIMATE=around_estimate,
            COMPUTE=compute,
            BLOCK_R=min(triton.next_power_of_2(rows), _TABLE_TILE // block_c),
            BLOCK_C=block_c,
        )
        return out

    few_moments = rows * channels <= _FEW_MOMENTS
    if use_batch_statistics:
        mean, var = pool(around_estimate=False) if rows else tables.new_zeros(2, channels)
        count = tables[-1:].fill_(values)
        if synchronize:
            mean, var, total = pool_over_ranks(mean, var, count)
            count.copy_(total)
        if update_rate is not None:
            update_with_batch(
                running_mean,
                running_var,
                mean,
                var,
                rate,
                count.squeeze(0),
                skipped_updates,
                seen_elements,
            )
    elif update_rate is not None and rows:
        if not few_moments:
            mean, var = pool(around_estimate=True)
        estimates = tables.new_empty(2 * channels + 1)
        if skipped_updates is None:
            skipped_updates = torch.zeros((), dtype=torch.int64, device=x.device)
        if seen_elements is None:
            seen_elements = torch.zeros((), device=x.device)

    if not rows:
        split = split_tables(tables, images, channels, groups)
        split.mu.copy_(mean)
        split.rstd.copy_(torch.rsqrt(var + eps))
        return y, tables, shift

    update = estimates is not None
    block_d = triton.next_power_of_2(channels // groups)
    block_all = min(triton.next_power_of_2(channels), 256 if few_moments else _TABLE_TILE)
    _forward_tables_kernel[(images * groups,)](
        moments_,
        mean,
        var,
        running_mean,
        running_var,
        weight,
        bias,
        group_weight,
        group_bias,
        tables,
        shift,
        estimates,
        rate,
        eps,
        rows,
        channels,
        groups,
        pixels,
        tiling.part,
        tiling.parts,
        values,
        UPDATE=update,
        POOL=update and few_moments,
        COMPUTE=compute,
        BLOCK_D=block_d,
        BLOCK_S=_block_s(tiling, block_d),
        BLOCK_R=min(triton.next_power_of_2(rows), _TABLE_TILE // block_all),
        BLOCK_ALL=block_all,
    )
    _apply_kernel[(tiling.rows * tiling.tiles,)](
        x,
        residual if residual is None else _as(residual, x),
        y,
        tables,
        shift,
        estimates,
        running_mean,
        running_var,
        skipped_updates,
        seen_elements,
        channels,
        groups,
        pixels,
        tiling.tiles,
        values,
        UPDATE=update,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        CHANNELS_LAST=tiling.channels_last,
        COMPUTE=compute,
        BLOCK_C=tiling.block_c,
        BLOCK_P=tiling.block_p,
    )
    return y, tables, shift


def batch_channel_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    tables: Tensor,
    shift: Optional[Tensor],
    relu: bool,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, ...]:
    """See :mod:`.batch_channel_norm`."""
    x = _dense(x)
    grad = _as(grad, x)
    images, channels, height, width = x.shape
    pixels, groups = height * width, group_weight.shape[0]
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual and relu else x.new_empty(0)
    coefficients = tables.new_empty(images, 2, channels)
    parameters = tables.new_empty(images, 2 * channels + 2 * groups)

    if x.numel():
        tiling = _Tiling.of(x)
        tile = {
            "FROM_OUTPUT": y is not None,
            "RELU": relu,
            "CHANNELS_LAST": tiling.channels_last,
            "COMPUTE": _COMPUTE[tables.dtype],
            "BLOCK_C": tiling.block_c,
            "BLOCK_P": tiling.block_p,
        }
        sums = tables.new_empty(images, tiling.parts, 2, channels)
        _sums_kernel[(tiling.rows, tiling.parts)](
            grad,
            x,
            y,
            tables,
            shift,
            sums,
            channels,
            groups,
            pixels,
            tiling.part,
            tiling.parts,
            **tile,
        )
        block_d = triton.next_power_of_2(channels // groups)
        _backward_tables_kernel[(images * groups,)](
            sums,
            weight,
            group_weight,
            tables,
            coefficients,
            parameters,
            channels,
            groups,
            pixels,
            tiling.parts,
            float(channels // groups * pixels),
            COMPUTE=tile["COMPUTE"],
            BLOCK_D=block_d,
            BLOCK_S=_block_s(tiling, block_d),
        )
        parameters = parameters[0] if images == 1 else parameters.sum(dim=0)
    else:
        parameters = parameters.new_zeros(parameters.shape[1])
    _add_gradient_of_statistics(coefficients, parameters, weight, tables, groups, synchronize)
    if x.numel():
        _input_grad_kernel[(tiling.rows * tiling.tiles,)](
            grad,
            x,
            y,
            grad_x,
            grad_residual,
            tables,
            shift,
            coefficients,
            channels,
            groups,
            pixels,
            tiling.tiles,
            HAS_RESIDUAL=has_residual,
            **tile,
        )
    return grad_x, grad_residual, parameters


def _add_gradient_of_statistics(
    coefficients: Tensor,
    parameters: Tensor,
    weight: Tensor,
    tables: Tensor,
    groups: int,
    synchronize: bool,
) -> None:
    """Adds the gradient through the statistics of the batch, if they were of the batch."""
    images, _, channels = coefficients.shape
    if tables.numel() == 2 * channels + images * (4 * channels + groups):
        return
    split = split_tables(tables, images, channels, groups)
    grad_weight, grad_bias = parameters[: 2 * channels].split(channels)
    sums = (grad_bias, grad_weight)
    bias_sum, weight_sum = sum_over_ranks(*sums) if synchronize else sums
    a, count = weight.to(tables.dtype) * split.rstd, split.count.clamp(min=1)
    offset = split.m - split.mu
    coefficients[:, 0] -= a * split.rstd * weight_sum / count
    coefficients[:, 1] -= a * (bias_sum + offset * split.rstd * weight_sum) / count


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    x = _dense(x)
    images, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return tuple(x.new_zeros(images, channels, dtype=dtype) for _ in range(2))
    tiling = _Tiling.of(x)
    means, m2s = _moments(x, tiling, dtype).unbind(dim=2)
    counts = torch.full((tiling.parts,), tiling.part, dtype=dtype, device=x.device)
    counts[-1] = height * width - tiling.part * (tiling.parts - 1)
    share = (counts / (height * width)).view(1, -1, 1)
    mean = means[:, 0] + ((means - means[:, :1]) * share).sum(dim=1)
    m2 = m2s.sum(dim=1) / (height * width)
    return mean, m2 + ((means - mean.unsqueeze(1)).square() * share).sum(dim=1)


def standardize_forward(
    weights: List[Tensor], eps: List[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """See :mod:`.weight_standardization`."""
    flat = _concatenated(weights)
    rows, starts = _filters(tuple(w.shape for w in weights), flat.device)
    compute = torch.promote_types(flat.dtype, torch.float32)
    out = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    mean, rstd = (torch.empty(rows, dtype=compute, device=flat.device) for _ in range(2))
    _standardize_kernel[(rows,)](
        flat,
        out,
        mean,
        rstd,
        starts,
        _eps_of_filters(tuple(eps), tuple(w.shape[0] for w in weights), flat.device),
        COMPUTE=_COMPUTE[compute],
        BLOCK=1024,
    )
    return _divided(out, weights), mean, rstd


def standardize_backward(
    grads: List[Tensor], weights: List[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """See :mod:`.weight_standardization`."""
    flat = _concatenated(weights)
    grads = [
        grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
        for grad, weight in zip(grads, weights)
    ]
    rows, starts = _filters(tuple(w.shape for w in weights), flat.device)
    out = torch.empty_like(flat)
    _standardize_backward_kernel[(rows,)](
        _concatenated(grads),
        flat,
        out,
        mean,
        rstd,
        starts,
        COMPUTE=_COMPUTE[mean.dtype],
        BLOCK=1024,
    )
    return _divided(out, weights)


def _moments(x: Tensor, tiling: _Tiling, dtype: torch.dtype) -> Tensor:
    """Means and sums of squared deviations of the parts, (N, parts, 2, C)."""
    images, channels, height, width = x.shape
    moments_ = torch.empty(images, tiling.parts, 2, channels, dtype=dtype, device=x.device)
    _moments_kernel[(tiling.rows, tiling.parts)](
        x,
        moments_,
        channels,
        height * width,
        tiling.part,
        tiling.parts,
        CHANNELS_LAST=tiling.channels_last,
        COMPUTE=_COMPUTE[dtype],
        BLOCK_C=tiling.block_c,
        BLOCK_P=tiling.block_p,
    )
    return moments_


def _block_s(tiling: _Tiling, block_d: int) -> int:
    return min(triton.next_power_of_2(tiling.parts), max(_TABLE_TILE // block_d, 1))


def _dense(x: Tensor) -> Tensor:
    """x itself if it lies in memory as NCHW or channels_last, otherwise a copy that does."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _as(other: Tensor, x: Tensor) -> Tensor:
    """``other`` in the memory format of x, which is dense."""
    if x.is_contiguous():
        return other.contiguous()
    return other.contiguous(memory_format=torch.channels_last)


def _concatenated(weights: List[Tensor]) -> Tensor:
    """All weights, each in its order in memory, in one row."""
    return torch.cat([_row(w) for w in weights])


def _row(weight: Tensor) -> Tensor:
    if weight.is_contiguous():
        return weight.view(-1)
    order = sorted(range(weight.dim()), key=lambda i: (i != 0, -weight.stride(i)))
    return weight.permute(order).reshape(-1)


def _divided(flat: Tensor, weights: List[Tensor]) -> List[Tensor]:
    """The inverse of :func:`_concatenated`."""
    parts = flat.split([w.numel() for w in weights])
    return [
        part.as_strided(w.shape, w.stride(), part.storage_offset())
        for part, w in zip(parts, weights)
    ]


@lru_cache(maxsize=None)
def _filters(shapes: Tuple[torch.Size, ...], device: torch.device) -> Tuple[int, Tensor]:
    """Number of filters, and where each begins in the concatenation, and where the last ends."""
    sizes = torch.cat([torch.full((s[0],), s.numel() // s[0]) for s in shapes])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return len(sizes), starts.to(device)


@lru_cache(maxsize=None)
def _eps_of_filters(
    eps: Tuple[float, ...], filters: Tuple[int, ...], device: torch.device
) -> Tensor:
    values = torch.tensor(eps, dtype=torch.float64)
    return values.repeat_interleave(torch.tensor(filters)).to(device)
