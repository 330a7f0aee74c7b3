"""The kernels in Triton, for GPUs.

An activation is cut into tiles of channels and pixels whose shape follows the memory format, so
that NCHW and channels_last are both read the way they lie in memory. Work on few images with few
channels would leave most of a GPU idle, so the pixels are divided too; what the parts yield is put
together in a fixed order, and results are reproducible. A forward pass is three launches (moments,
tables, apply), one more with an update of the estimates; so is a backward pass.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import List, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .estimates import pool_over_ranks, sum_over_ranks, update_with_batch

# The sign under a fused ReLU is computed again from x and the tables, if nothing was added.
SAVES_OUTPUT_OF_RELU = False

_TILE = 2048  # elements
_TABLE_TILE = 4096
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _moments_kernel(
    x_ptr,
    mean_ptr,
    m2_ptr,
    channels,
    pixels,
    stride_n,
    stride_c,
    stride_p,
    part,
    parts,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean and sum of squared deviations of one part of the pixels: tables (N, parts, C)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, pixels)

    # Welford's recurrence in every lane: one pass, without cancellation far from zero.
    mean = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    rows = x_ptr + n * stride_n + c.to(tl.int64)[:, None] * stride_c
    step = tl.zeros([], COMPUTE)
    for start in range(first, last, BLOCK_P):
        p = start + lane
        mask = (c[:, None] < channels) & (p[None, :] < last)
        value = tl.load(rows + p.to(tl.int64)[None, :] * stride_p, mask=mask, other=0.0)
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
    out = (n * parts + tl.program_id(1)) * channels + c
    tl.store(mean_ptr + out, origin + offset, mask=c < channels)
    tl.store(m2_ptr + out, m2, mask=c < channels)


@triton.jit
def _pool_kernel(
    mean_ptr,
    m2_ptr,
    running_mean_ptr,
    running_var_ptr,
    out_ptr,
    rows,
    channels,
    pixels,
    part,
    parts,
    values,
    update_rate,
    AROUND_ESTIMATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of the batch from those of images and parts, (N * parts, C).

    Writes the mean and variance of the batch, a table (2, C); or, with ``AROUND_ESTIMATE``, the
    candidates for new estimates, then the old estimates, a table (4, C).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    if AROUND_ESTIMATE:
        origin = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(COMPUTE)
    else:
        origin = tl.load(mean_ptr + c, mask=inside, other=0.0)
    offset = tl.zeros([BLOCK_C], COMPUTE)
    square = tl.zeros([BLOCK_C], COMPUTE)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row[:, None] < rows) & inside[None, :]
        count = tl.minimum(pixels - (row % parts) * part, part).to(COMPUTE)[:, None]
        at = row.to(tl.int64)[:, None] * channels + c[None, :]
        delta = tl.where(mask, tl.load(mean_ptr + at, mask=mask, other=0.0) - origin[None, :], 0.0)
        m2 = tl.load(m2_ptr + at, mask=mask, other=0.0)
        offset += tl.sum(delta * count, axis=0)
        square += tl.sum(m2 + delta * delta * count, axis=0)
    offset /= values
    square /= values
    if AROUND_ESTIMATE:
        old_var = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        tl.store(out_ptr + c, origin + update_rate * offset, mask=inside)
        tl.store(out_ptr + channels + c, old_var + update_rate * (square - old_var), mask=inside)
        tl.store(out_ptr + 2 * channels + c, origin, mask=inside)
        tl.store(out_ptr + 3 * channels + c, old_var, mask=inside)
    else:
        # Once more around the mean itself, as the first image may be far from it.
        mean = origin + offset
        square = tl.zeros([BLOCK_C], COMPUTE)
        for start in range(0, rows, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            mask = (row[:, None] < rows) & inside[None, :]
            count = tl.minimum(pixels - (row % parts) * part, part).to(COMPUTE)[:, None]
            at = row.to(tl.int64)[:, None] * channels + c[None, :]
            delta = tl.load(mean_ptr + at, mask=mask, other=0.0) - mean[None, :]
            delta = tl.where(mask, delta, 0.0)
            m2 = tl.load(m2_ptr + at, mask=mask, other=0.0)
            square += tl.sum(m2 + delta * delta * count, axis=0)
        tl.store(out_ptr + c, mean, mask=inside)
        tl.store(out_ptr + channels + c, square / values, mask=inside)


@triton.jit
def _forward_tables_kernel(
    mean_ptr,
    m2_ptr,
    mu_ptr,
    s2_ptr,
    candidates_ptr,
    running_mean_ptr,
    running_var_ptr,
    skipped_ptr,
    seen_ptr,
    weight_ptr,
    bias_ptr,
    group_weight_ptr,
    group_bias_ptr,
    m_ptr,
    v_ptr,
    d_ptr,
    r_ptr,
    mu_out_ptr,
    rstd_out_ptr,
    scale_ptr,
    shift_ptr,
    channels,
    groups,
    pixels,
    part,
    parts,
    values,
    eps,
    UPDATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """One image and group: its statistics, and the affine map of each channel.

    With ``UPDATE`` the candidates become the estimates, if all of the layer are finite. Every
    program finds that out for itself, and those of the first image write the estimates.
    """
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = channels // groups
    k = tl.arange(0, BLOCK_D)
    c = g * size + k
    inside = k < size

    if UPDATE:
        bad = 0
        for start in range(0, 2 * channels, BLOCK_ALL):
            i = start + tl.arange(0, BLOCK_ALL)
            value = tl.load(candidates_ptr + i, mask=i < 2 * channels, other=0.0)
            # A difference with itself is zero exactly for finite numbers.
            bad += tl.sum(tl.where(value - value == 0.0, 0, 1), axis=0)
        source = candidates_ptr + tl.where(bad == 0, 0, 2 * channels)
        mu = tl.load(source + c, mask=inside, other=0.0)
        s2 = tl.load(source + channels + c, mask=inside, other=0.0)
        if n == 0:
            tl.store(running_mean_ptr + c, mu, mask=inside)
            tl.store(running_var_ptr + c, s2, mask=inside)
            if g == 0:
                skipped = tl.load(skipped_ptr)
                tl.store(skipped_ptr, skipped + tl.where(bad == 0, 0, 1))
                seen = tl.load(seen_ptr)
                tl.store(seen_ptr, seen + tl.where(bad == 0, values, 0.0))
    else:
        mu = tl.load(mu_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        s2 = tl.load(s2_ptr + c, mask=inside, other=0.0).to(COMPUTE)

    # The statistics of the channels from those of the parts of their pixels.
    origin = tl.load(mean_ptr + n * parts * channels + c, mask=inside, other=0.0)
    offset = tl.zeros([BLOCK_D], COMPUTE)
    square = tl.zeros([BLOCK_D], COMPUTE)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < parts) & inside[None, :]
        count = tl.minimum(pixels - s * part, part).to(COMPUTE)[:, None]
        at = (n * parts + s.to(tl.int64)[:, None]) * channels + c[None, :]
        delta = tl.where(mask, tl.load(mean_ptr + at, mask=mask, other=0.0) - origin[None, :], 0.0)
        offset += tl.sum(delta * count, axis=0)
    offset /= pixels
    m = origin + offset
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < parts) & inside[None, :]
        count = tl.minimum(pixels - s * part, part).to(COMPUTE)[:, None]
        at = (n * parts + s.to(tl.int64)[:, None]) * channels + c[None, :]
        delta = tl.where(mask, tl.load(mean_ptr + at, mask=mask, other=0.0) - m[None, :], 0.0)
        square += tl.sum(tl.load(m2_ptr + at, mask=mask, other=0.0) + delta * delta * count, axis=0)
    v = square / pixels

    rstd = 1.0 / tl.sqrt(s2 + eps)
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(COMPUTE) * rstd
    z_mean = a * (m - mu) + tl.load(bias_ptr + c, mask=inside, other=0.0).to(COMPUTE)
    d = tl.where(inside, z_mean - tl.sum(tl.where(inside, z_mean, 0.0), axis=0) / size, 0.0)
    group_var = tl.sum(tl.where(inside, a * a * v + d * d, 0.0), axis=0) / size
    r = 1.0 / tl.sqrt(group_var + eps)
    gain = tl.load(group_weight_ptr + g).to(COMPUTE) * r

    at = n * channels + c
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(d_ptr + at, d, mask=inside)
    tl.store(scale_ptr + at, gain * a, mask=inside)
    tl.store(shift_ptr + at, gain * d + tl.load(group_bias_ptr + g).to(COMPUTE), mask=inside)
    tl.store(r_ptr + n * groups + g, r)
    if n == 0:
        tl.store(mu_out_ptr + c, mu, mask=inside)
        tl.store(rstd_out_ptr + c, rstd, mask=inside)


@triton.jit
def _apply_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    m_ptr,
    scale_ptr,
    shift_ptr,
    channels,
    pixels,
    tiles,
    stride_n,
    stride_c,
    stride_p,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of ``relu(scale * (x - m) + shift + residual)``."""
    row = tl.program_id(0) // tiles
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (row // blocks).to(tl.int64)
    c = (row % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = inside[:, None] & (p[None, :] < pixels)
    at = n * stride_n + c.to(tl.int64)[:, None] * stride_c + p.to(tl.int64)[None, :] * stride_p
    m = tl.load(m_ptr + n * channels + c, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + n * channels + c, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    y = scale[:, None] * (x - m[:, None]) + shift[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN, as in torch.relu
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    m_ptr,
    scale_ptr,
    shift_ptr,
    s1_ptr,
    s2_ptr,
    channels,
    pixels,
    stride_n,
    stride_c,
    stride_p,
    part,
    parts,
    FROM_OUTPUT: tl.constexpr,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of the gradient, and of the gradient times x - m, over one part of the pixels:
    tables (N, parts, C)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    lane = tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, pixels)
    m = tl.load(m_ptr + n * channels + c, mask=inside, other=0.0)
    scale = m
    shift = m
    if RELU and not FROM_OUTPUT:
        scale = tl.load(scale_ptr + n * channels + c, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)
    s1 = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    s2 = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    row = n * stride_n + c.to(tl.int64)[:, None] * stride_c
    for start in range(first, last, BLOCK_P):
        p = start + lane
        mask = inside[:, None] & (p[None, :] < last)
        at = row + p.to(tl.int64)[None, :] * stride_p
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(COMPUTE)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
        if RELU:
            grad = _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT)
        s1 += grad
        s2 += tl.where(mask, grad * (x - m[:, None]), 0.0)
    out = (n * parts + tl.program_id(1)) * channels + c
    tl.store(s1_ptr + out, tl.sum(s1, axis=1), mask=inside)
    tl.store(s2_ptr + out, tl.sum(s2, axis=1), mask=inside)


@triton.jit
def _backward_tables_kernel(
    s1_ptr,
    s2_ptr,
    weight_ptr,
    group_weight_ptr,
    m_ptr,
    v_ptr,
    d_ptr,
    r_ptr,
    mu_ptr,
    rstd_ptr,
    p_ptr,
    q_ptr,
    c_ptr,
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
    """One image and group: the coefficients of the gradient of x, and what the image contributes
    to those of the parameters, a table (N, 2 C + 2 G)."""
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
        at = (n * parts + s.to(tl.int64)[:, None]) * channels + c[None, :]
        s1 += tl.sum(tl.load(s1_ptr + at, mask=mask, other=0.0), axis=0)
        s2 += tl.sum(tl.load(s2_ptr + at, mask=mask, other=0.0), axis=0)

    at = n * channels + c
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    d = tl.load(d_ptr + at, mask=inside, other=0.0)
    r = tl.load(r_ptr + n * groups + g)
    mu = tl.load(mu_ptr + c, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + c, mask=inside, other=0.0)
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(COMPUTE) * rstd
    k = tl.load(group_weight_ptr + g).to(COMPUTE) * r

    grad_group_bias = tl.sum(s1, axis=0)
    grad_group_weight = tl.sum(r * (a * s2 + d * s1), axis=0)
    u1 = grad_group_bias / group_values
    u2 = grad_group_weight / group_values
    dz_sum = k * (s1 - pixels * (u1 + u2 * r * d))
    dz_t_sum = k * (s2 - pixels * u2 * r * a * v)
    p = k * a
    tl.store(p_ptr + at, p, mask=inside)
    tl.store(q_ptr + at, -p * u2 * r * a, mask=inside)
    tl.store(c_ptr + at, -p * (u1 + u2 * r * d), mask=inside)
    row = parameters_ptr + n * (2 * channels + 2 * groups)
    tl.store(row + c, (dz_t_sum + (m - mu) * dz_sum) * rstd, mask=inside)
    tl.store(row + channels + c, dz_sum, mask=inside)
    tl.store(row + 2 * channels + g, grad_group_weight)
    tl.store(row + 2 * channels + groups + g, grad_group_bias)


@triton.jit
def _input_grad_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    m_ptr,
    scale_ptr,
    shift_ptr,
    p_ptr,
    q_ptr,
    c_ptr,
    channels,
    pixels,
    tiles,
    stride_n,
    stride_c,
    stride_p,
    HAS_RESIDUAL: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the gradients of x, ``p * grad + q * (x - m) + c``, and of the residual."""
    row = tl.program_id(0) // tiles
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (row // blocks).to(tl.int64)
    c = (row % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = inside[:, None] & (pixel[None, :] < pixels)
    at = n * stride_n + c.to(tl.int64)[:, None] * stride_c + pixel.to(tl.int64)[None, :] * stride_p
    table = n * channels + c
    m = tl.load(m_ptr + table, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    if RELU:
        scale = m
        shift = m
        if not FROM_OUTPUT:
            scale = tl.load(scale_ptr + table, mask=inside, other=0.0)
            shift = tl.load(shift_ptr + table, mask=inside, other=0.0)
        grad = _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT)
        if HAS_RESIDUAL:
            tl.store(grad_residual_ptr + at, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    p = tl.load(p_ptr + table, mask=inside, other=0.0)
    q = tl.load(q_ptr + table, mask=inside, other=0.0)
    b = tl.load(c_ptr + table, mask=inside, other=0.0)
    grad_x = p[:, None] * grad + q[:, None] * (x - m[:, None]) + b[:, None]
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
        strides: of images, channels and pixels.
        block_c, block_p: channels and pixels of a tile.
        rows: images times blocks of channels.
        tiles: blocks of pixels.
        part, parts: pixels of a part and number of parts, for sums over pixels.
    """

    strides: Tuple[int, int, int]
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
        strides = (channels * pixels, pixels, 1)
        block_p = min(triton.next_power_of_2(pixels), _TILE)
        block_c = min(triton.next_power_of_2(channels), _TILE // block_p)
    else:
        strides = (channels * pixels, 1, channels)
        block_c = min(triton.next_power_of_2(channels), 128)
        block_p = min(triton.next_power_of_2(pixels), _TILE // block_c)
    rows = images * triton.cdiv(channels, block_c)
    tiles = triton.cdiv(pixels, block_p)
    # Enough programs for several waves on the GPU; at least two tiles for each.
    wanted = triton.cdiv(8 * _multiprocessors(device), rows)
    part = block_p * triton.cdiv(tiles, max(min(wanted, tiles // 2), 1))
    return _Tiling(strides, block_c, block_p, rows, tiles, part, triton.cdiv(pixels, part))


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
    update_rate: Optional[Tensor],
    eps: float,
    use_batch_statistics: bool,
    relu: bool,
    synchronize: bool,
) -> Tuple[Tensor, ...]:
    """See :mod:`.batch_channel_norm`."""
    x = _dense(x)
    images, channels, height, width = x.shape
    pixels, groups = height * width, group_weight.numel()
    dtype = torch.promote_types(x.dtype, torch.float32)
    compute = _COMPUTE[dtype]

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    y = torch.empty_like(x)
    count = table(int(use_batch_statistics)).fill_(images * pixels)
    m, v, d, r = (table(images, size) for size in (channels, channels, channels, groups))
    scale, shift = table(images, channels), table(images, channels)
    mu, rstd = table(channels), table(channels)
    if x.numel():
        tiling = _Tiling.of(x)
        means, m2s = (table(images, tiling.parts, channels) for _ in range(2))
        _moments(x, tiling, means, m2s)
        rows = images * tiling.parts

    def pool(out: Tensor, around_estimate: bool) -> Tensor:
        block_c = min(triton.next_power_of_2(channels), 16)
        _pool_kernel[(triton.cdiv(channels, block_c),)](
            means,
            m2s,
            running_mean,
            running_var,
            out,
            rows,
            channels,
            pixels,
            tiling.part,
            tiling.parts,
            float(images * pixels),
            0.0 if update_rate is None else float(update_rate),
            AROUND_ESTIMATE=around_estimate,
            COMPUTE=compute,
            BLOCK_R=min(triton.next_power_of_2(rows), _TABLE_TILE // block_c),
            BLOCK_C=block_c,
        )
        return out

    candidates = running_mean  # not read unless there is an update
    statistics = (running_mean, running_var)
    update = False
    if use_batch_statistics:
        pooled = table(2, channels)
        pooled = pool(pooled, around_estimate=False) if x.numel() else pooled.zero_()
        mean, var = pooled
        if synchronize:
            mean, var, count = pool_over_ranks(mean, var, count)
        if update_rate is not None:
            update_with_batch(
                running_mean,
                running_var,
                mean,
                var,
                float(update_rate),
                count.squeeze(0),
                skipped_updates,
                seen_elements,
            )
        statistics = (mean, var)
    elif update_rate is not None and x.numel():
        update = True
        candidates = pool(table(4, channels), around_estimate=True)
        if skipped_updates is None:
            skipped_updates = torch.zeros((), dtype=torch.int64, device=x.device)
        if seen_elements is None:
            seen_elements = torch.zeros((), device=x.device)

    if not x.numel():
        mu.copy_(statistics[0])
        rstd.copy_(torch.rsqrt(statistics[1] + eps))
        return y, m, v, d, r, mu, rstd, scale, shift, count

    block_d = triton.next_power_of_2(channels // groups)
    _forward_tables_kernel[(images * groups,)](
        means,
        m2s,
        *statistics,
        candidates,
        running_mean,
        running_var,
        skipped_updates,
        seen_elements,
        weight,
        bias,
        group_weight,
        group_bias,
        m,
        v,
        d,
        r,
        mu,
        rstd,
        scale,
        shift,
        channels,
        groups,
        pixels,
        tiling.part,
        tiling.parts,
        float(images * pixels),
        eps,
        UPDATE=update,
        COMPUTE=compute,
        BLOCK_D=block_d,
        BLOCK_S=_block_s(tiling, block_d),
        BLOCK_ALL=min(triton.next_power_of_2(2 * channels), _TABLE_TILE),
    )
    _apply_kernel[(tiling.rows * tiling.tiles,)](
        x,
        residual if residual is None else _as(residual, x),
        y,
        m,
        scale,
        shift,
        channels,
        pixels,
        tiling.tiles,
        *tiling.strides,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        COMPUTE=compute,
        BLOCK_C=tiling.block_c,
        BLOCK_P=tiling.block_p,
    )
    return y, m, v, d, r, mu, rstd, scale, shift, count


def batch_channel_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    m: Tensor,
    v: Tensor,
    d: Tensor,
    r: Tensor,
    mu: Tensor,
    rstd: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    count: Tensor,
    relu: bool,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, ...]:
    """See :mod:`.batch_channel_norm`."""
    x = _dense(x)
    grad = _as(grad, x)
    images, channels, height, width = x.shape
    pixels, groups = height * width, group_weight.numel()
    compute = _COMPUTE[m.dtype]
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual and relu else x.new_empty(0)
    p, q, c = (torch.empty_like(m) for _ in range(3))
    parameters = m.new_empty(images, 2 * channels + 2 * groups)
    tables = (m, scale, shift)
    activation = {"FROM_OUTPUT": y is not None, "RELU": relu}

    if x.numel():
        tiling = _Tiling.of(x)
        tile = {"COMPUTE": compute, "BLOCK_C": tiling.block_c, "BLOCK_P": tiling.block_p}
        s1, s2 = (m.new_empty(images, tiling.parts, channels) for _ in range(2))
        _sums_kernel[(tiling.rows, tiling.parts)](
            grad,
            x,
            y,
            *tables,
            s1,
            s2,
            channels,
            pixels,
            *tiling.strides,
            tiling.part,
            tiling.parts,
            **activation,
            **tile,
        )
        block_d = triton.next_power_of_2(channels // groups)
        _backward_tables_kernel[(images * groups,)](
            s1,
            s2,
            weight,
            group_weight,
            m,
            v,
            d,
            r,
            mu,
            rstd,
            p,
            q,
            c,
            parameters,
            channels,
            groups,
            pixels,
            tiling.parts,
            float(channels // groups * pixels),
            COMPUTE=compute,
            BLOCK_D=block_d,
            BLOCK_S=_block_s(tiling, block_d),
        )
    parameters = parameters[0] if images == 1 and x.numel() else _sum(parameters, x)
    grad_weight, grad_bias = parameters[: 2 * channels].split(channels)
    if count.numel():  # gradient through the batch statistics, over all ranks' values
        sums = (grad_bias, grad_weight)
        bias_sum, weight_sum = sum_over_ranks(*sums) if synchronize else sums
        a, count = weight.to(m.dtype) * rstd, count.clamp(min=1)
        q -= a * rstd * weight_sum / count
        c -= a * (bias_sum + (m - mu) * rstd * weight_sum) / count
    if x.numel():
        _input_grad_kernel[(tiling.rows * tiling.tiles,)](
            grad,
            x,
            y,
            grad_x,
            grad_residual,
            *tables,
            p,
            q,
            c,
            channels,
            pixels,
            tiling.tiles,
            *tiling.strides,
            HAS_RESIDUAL=has_residual,
            **activation,
            **tile,
        )
    return grad_x, grad_residual, parameters


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    x = _dense(x)
    images, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return tuple(x.new_zeros(images, channels, dtype=dtype) for _ in range(2))
    tiling = _Tiling.of(x)
    means, m2s = (
        torch.empty(images, tiling.parts, channels, dtype=dtype, device=x.device) for _ in range(2)
    )
    _moments(x, tiling, means, m2s)
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


def _moments(x: Tensor, tiling: _Tiling, means: Tensor, m2s: Tensor) -> None:
    _moments_kernel[(tiling.rows, tiling.parts)](
        x,
        means,
        m2s,
        x.shape[1],
        x.shape[2] * x.shape[3],
        *tiling.strides,
        tiling.part,
        tiling.parts,
        COMPUTE=_COMPUTE[means.dtype],
        BLOCK_C=tiling.block_c,
        BLOCK_P=tiling.block_p,
    )


def _block_s(tiling: _Tiling, block_d: int) -> int:
    return min(triton.next_power_of_2(tiling.parts), max(_TABLE_TILE // block_d, 1))


def _sum(parameters: Tensor, x: Tensor) -> Tensor:
    return parameters.sum(dim=0) if x.numel() else parameters.new_zeros(parameters.shape[1])


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
    return torch.cat([w.permute(_storage_order(w)).reshape(-1) for w in weights])


def _divided(flat: Tensor, weights: List[Tensor]) -> List[Tensor]:
    """The inverse of :func:`_concatenated`."""
    parts = flat.split([w.numel() for w in weights])
    return [
        part.as_strided(w.shape, w.stride(), part.storage_offset())
        for part, w in zip(parts, weights)
    ]


def _storage_order(weight: Tensor) -> List[int]:
    return sorted(range(weight.dim()), key=lambda i: (i != 0, -weight.stride(i)))


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
