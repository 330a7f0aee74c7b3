"""The kernels in Triton, for GPUs; :mod:`.triton_backend` launches them."""

import triton
import triton.language as tl

# Triton compiles another kernel where an integer is 1 or a multiple of 16. That pays where it makes
# addresses multiples of 16 bytes; other integers, which vary with the size of images, would only
# have kernels compiled for hundreds of steps.
_OF_POOLING = ["rows", "pixels", "part", "parts"]


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


@triton.jit(do_not_specialize=["parts"])
def moments_kernel(
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
    for start in range(first, last, BLOCK_P):
        p = start + lane
        mask = (c[:, None] < channels) & (p[None, :] < last)
        at = _places(n, c, p, channels, pixels, CHANNELS_LAST)
        value = tl.load(x_ptr + at, mask=mask, other=0.0)
        step = ((start - first) // BLOCK_P + 1).to(COMPUTE)
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
    offset = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    square = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row[:, None] < last) & inside[None, :]
        count = tl.minimum(pixels - (row % parts) * part, part).to(COMPUTE)[:, None]
        at = row.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        mean = tl.load(moments_ptr + at, mask=mask, other=0.0)
        m2 = tl.load(moments_ptr + at + channels, mask=mask, other=0.0)
        delta = tl.where(mask, mean - origin[None, :], 0.0)
        offset += delta * count
        square += m2 + delta * delta * count
    return tl.sum(offset, axis=0), tl.sum(square, axis=0)


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


@triton.jit(do_not_specialize=_OF_POOLING)
def pool_kernel(
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
    """1 for each channel with a statistic that is not finite."""
    # A difference with itself is zero exactly for finite numbers.
    bad = (mean - mean != 0.0) | (var - var != 0.0)
    return tl.where(bad & inside, 1, 0)


@triton.jit(do_not_specialize=_OF_POOLING)
def forward_tables_kernel(
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
    BLOCK_OWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """One image and group: its statistics, and the affine map of each channel.

    The statistics to normalize by are given, or, with ``UPDATE``, the estimates after the batch if
    all of the layer are finite, and as they are otherwise. These come from the moments (``POOL``),
    or are given. Every program finds that out for itself, so none may write the estimates: those of
    the first image write ``estimates``, the new means and variances and whether they are the old.

    Read at a time: of the ``BLOCK_D`` channels of the group, the moments of ``BLOCK_S`` parts of
    the image and of ``BLOCK_OWN`` rows of the batch, and of ``BLOCK_ALL`` channels of the layer
    those of ``BLOCK_R`` rows.
    """
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = channels // groups
    k = tl.arange(0, BLOCK_D)
    # Beyond the group there is nothing to read.
    c = tl.where(k < size, g * size + k, channels)
    inside = k < size

    if UPDATE:
        bad = tl.zeros([BLOCK_ALL], tl.int32)
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
        bad = tl.sum(bad, axis=0)
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
                BLOCK_OWN,
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


@triton.jit(do_not_specialize=["tiles"])
def apply_kernel(
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


@triton.jit(do_not_specialize=["parts"])
def sums_kernel(
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


@triton.jit(do_not_specialize=["pixels", "parts"])
def backward_tables_kernel(
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
    s1 = tl.zeros([BLOCK_S, BLOCK_D], COMPUTE)
    s2 = tl.zeros([BLOCK_S, BLOCK_D], COMPUTE)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < parts) & inside[None, :]
        at = (n * parts + s.to(tl.int64)[:, None]) * 2 * channels + c[None, :]
        s1 += tl.load(sums_ptr + at, mask=mask, other=0.0)
        s2 += tl.load(sums_ptr + at + channels, mask=mask, other=0.0)
    s1 = tl.sum(s1, axis=0)
    s2 = tl.sum(s2, axis=0)

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


@triton.jit(do_not_specialize=["tiles"])
def input_grad_kernel(
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
def standardize_kernel(
    weight_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    starts_ptr,
    places_ptr,
    eps_ptr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One filter, of the concatenated filters of many convolutions."""
    row = tl.program_id(0)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    shift = tl.load(places_ptr + row) - first
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
        tl.store(out_ptr + shift + i, (t * rstd).to(out_ptr.dtype.element_ty), mask=i < last)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def standardize_backward_kernel(
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
