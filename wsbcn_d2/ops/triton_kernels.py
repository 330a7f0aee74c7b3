"""The kernels in Triton, for GPUs; :mod:`.triton_backend` launches them."""

import triton
import triton.language as tl

# Triton compiles another kernel where an integer is 1 or a multiple of 16. That pays where it makes
# addresses multiples of 16 bytes; other integers, which vary with the size of images, would only
# have kernels compiled for hundreds of steps.
_OF_POOLING = ["rows", "pixels", "part", "parts"]

# Between its launches a pass leaves behind, for its last one, what is to be known of the whole
# layer. ``flags`` are four integers that all passes on a stream share: how often statistics were
# not finite, of which up to the pass before, and the same as it was when this pass began. Nothing
# resets them, so nothing waits for that, and a pass that is replayed from a graph is no exception.


@triton.jit
def _aligned(pixels, ALIGN: tl.constexpr):
    """``pixels``, which the compiler then knows for a multiple of ``ALIGN``: it reads and writes as
    many values at once as it knows to lie behind a multiple of their size."""
    if ALIGN > 1:
        pixels = pixels // ALIGN * ALIGN
    return pixels


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


@triton.jit(do_not_specialize=["parts", "rows"])
def moments_kernel(
    x_ptr,
    scratch_ptr,
    running_mean_ptr,
    running_var_ptr,
    flags_ptr,
    channels,
    pixels,
    part,
    parts,
    rows,
    UPDATE: tl.constexpr,
    SINGLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean and sum of squared deviations of one part of the pixels: a table (N, parts, 2, C).

    With ``UPDATE`` the estimates are going to be written by the last kernel of the pass, for which
    their old values follow in ``scratch``, (2, C); and it counts in ``flags`` if what these moments
    contribute to the new ones is not finite. ``SINGLE``: no part is more than a tile.
    """
    pixels = _aligned(pixels, ALIGN)
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    lane = tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, pixels)
    count = (last - first).to(COMPUTE)

    mask = inside[:, None] & ((first + lane)[None, :] < last)
    at = _places(n, c, first + lane, channels, pixels, CHANNELS_LAST)
    value = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    # Deviations from the mean of the first tile. The whole part varies at least by its distance
    # from that one, so no more than a few bits cancel however far the values are from zero.
    mean = tl.sum(value, axis=1) / tl.minimum(last - first, BLOCK_P)
    delta = tl.where(mask, value - mean[:, None], 0.0)
    offset = delta
    square = delta * delta
    if not SINGLE:
        for start in range(first + BLOCK_P, last, BLOCK_P):
            p = start + lane
            mask = inside[:, None] & (p[None, :] < last)
            at = _places(n, c, p, channels, pixels, CHANNELS_LAST)
            value = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
            delta = tl.where(mask, value - mean[:, None], 0.0)
            offset += delta
            square += delta * delta
    total = tl.sum(offset, axis=1)
    m2 = tl.sum(square, axis=1) - total * (total / count)
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # NaN stays NaN, which a maximum would hide
    mean += total / count
    out = (n * parts + tl.program_id(1)) * 2 * channels + c
    tl.store(scratch_ptr + out, mean, mask=inside)
    tl.store(scratch_ptr + out + channels, m2, mask=inside)

    if UPDATE:
        old_mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        old_var = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        delta = mean - old_mean
        # If this is finite, so is the sum of all rows.
        contribution = (m2 + delta * delta * count) * rows + old_var
        bad = tl.sum(_not_finite(contribution, inside), axis=0)
        if bad > 0:
            tl.atomic_add(flags_ptr, 1)
        if (n == 0) & (tl.program_id(1) == 0):
            old = scratch_ptr + rows * 2 * channels + c
            tl.store(old, old_mean, mask=inside)
            tl.store(old + channels, old_var, mask=inside)
            if tl.program_id(0) == 0:
                tl.store(flags_ptr + 2, tl.load(flags_ptr + 1))


@triton.jit
def _not_finite(value, inside):
    """1 for each channel with a value that is not finite."""
    # A difference with itself is zero exactly for finite numbers.
    return tl.where((value - value != 0.0) & inside, 1, 0)


@triton.jit
def _pooled(
    moments_ptr,
    origin,
    c,
    inside,
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


@triton.jit(do_not_specialize=_OF_POOLING)
def pool_kernel(
    scratch_ptr,
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
        old_mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        old_var = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        offset, square = _pooled(
            scratch_ptr,
            old_mean,
            c,
            inside,
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
    else:
        # Twice: the mean first, as the first image may be far from it.
        mean = tl.load(scratch_ptr + c, mask=inside, other=0.0)
        for _ in tl.static_range(2):
            offset, square = _pooled(
                scratch_ptr,
                mean,
                c,
                inside,
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
def _statistics(
    scratch_ptr,
    mean_ptr,
    var_ptr,
    flags_ptr,
    update_rate,
    c,
    inside,
    rows,
    channels,
    pixels,
    part,
    parts,
    values,
    UPDATE: tl.constexpr,
    POOL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and variance to normalize some channels by.

    They are given, or, with ``UPDATE``, the estimates after the batch if all of the layer are
    finite, and as they were otherwise. These come from the moments (``POOL``), or are given.
    """
    if POOL:
        old_mean = tl.load(scratch_ptr + rows * 2 * channels + c, mask=inside, other=0.0)
        old_var = tl.load(scratch_ptr + (rows * 2 + 1) * channels + c, mask=inside, other=0.0)
        offset, square = _pooled(
            scratch_ptr,
            old_mean,
            c,
            inside,
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
    else:
        mean = tl.load(mean_ptr + c, mask=inside, other=0.0).to(COMPUTE)
        var = tl.load(var_ptr + c, mask=inside, other=0.0).to(COMPUTE)
    if UPDATE:
        good = tl.load(flags_ptr) == tl.load(flags_ptr + 2)
        if not POOL:
            old_mean = tl.load(scratch_ptr + rows * 2 * channels + c, mask=inside, other=0.0)
            old_var = tl.load(scratch_ptr + (rows * 2 + 1) * channels + c, mask=inside, other=0.0)
        mean = tl.where(good, mean, old_mean)
        var = tl.where(good, var, old_var)
    return mean, var


@triton.jit
def _over_groups(value, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """For each channel the sum over its group; ``GROUPS`` of ``SIZE`` channels lie in a row."""
    total = tl.sum(tl.reshape(value, [GROUPS, SIZE]), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], [GROUPS, SIZE]), [GROUPS * SIZE])


@triton.jit
def _own(value, first, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """``BLOCK`` values from ``first`` on, of ``ALL``."""
    if BLOCK != ALL:
        i = first + tl.arange(0, BLOCK)
        chosen = tl.arange(0, ALL)[None, :] == i[:, None]
        value = tl.sum(tl.where(chosen, value[None, :], 0.0), axis=1)
    return value


@triton.jit
def _affine_maps(
    scratch_ptr,
    weight_ptr,
    bias_ptr,
    group_weight_ptr,
    group_bias_ptr,
    mu,
    s2,
    eps,
    n,
    c,
    inside,
    channels,
    size,
    pixels,
    part,
    parts,
    COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The tables of some channels of an image, which are whole groups: m, v, d, scale, shift, r and
    rstd. Read at a time: the moments of ``BLOCK_S`` parts, and 1 only if there is no other."""
    # The statistics of the channels from those of the parts of their pixels.
    first = n.to(tl.int32) * parts
    m = tl.load(scratch_ptr + n * parts * 2 * channels + c, mask=inside, other=0.0)
    if BLOCK_S == 1:
        v = tl.load(scratch_ptr + (n * 2 + 1) * channels + c, mask=inside, other=0.0) / pixels
    else:
        v = m
        for _ in tl.static_range(2):  # around the mean itself, as the first part may be far from it
            offset, square = _pooled(
                scratch_ptr,
                m,
                c,
                inside,
                first,
                first + parts,
                channels,
                pixels,
                part,
                parts,
                COMPUTE,
                BLOCK_S,
                GROUPS * SIZE,
            )
            m += offset / pixels
            v = square / pixels

    rstd = 1.0 / tl.sqrt(s2 + eps)
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(COMPUTE) * rstd
    z_mean = a * (m - mu) + tl.load(bias_ptr + c, mask=inside, other=0.0).to(COMPUTE)
    z_mean = tl.where(inside, z_mean, 0.0)
    d = tl.where(inside, z_mean - _over_groups(z_mean, GROUPS, SIZE) / size, 0.0)
    z_var = tl.where(inside, a * a * v + d * d, 0.0)
    r = 1.0 / tl.sqrt(_over_groups(z_var, GROUPS, SIZE) / size + eps)
    gain = tl.load(group_weight_ptr + c // size, mask=inside, other=0.0).to(COMPUTE) * r
    group_bias = tl.load(group_bias_ptr + c // size, mask=inside, other=0.0).to(COMPUTE)
    return m, v, d, gain * a, gain * d + group_bias, r, rstd


@triton.jit
def _store_tables(
    tables_ptr, n, c, inside, channels, groups, size, mu, rstd, m, v, d, scale, shift, r
):
    row = tables_ptr + 2 * channels + n * (5 * channels + groups)
    tl.store(row + c, m, mask=inside)
    tl.store(row + channels + c, v, mask=inside)
    tl.store(row + 2 * channels + c, d, mask=inside)
    tl.store(row + 3 * channels + c, scale, mask=inside)
    tl.store(row + 4 * channels + c, shift, mask=inside)
    tl.store(row + 5 * channels + c // size, r, mask=inside & (c % size == 0))
    if n == 0:
        tl.store(tables_ptr + c, mu, mask=inside)
        tl.store(tables_ptr + channels + c, rstd, mask=inside)


@triton.jit(do_not_specialize=_OF_POOLING)
def forward_tables_kernel(
    scratch_ptr,
    mean_ptr,
    var_ptr,
    flags_ptr,
    weight_ptr,
    bias_ptr,
    group_weight_ptr,
    group_bias_ptr,
    tables_ptr,
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
    COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """``GROUPS`` groups of an image: their statistics, and the affine map of each channel. For
    where that is too much to be done for each tile again (``FUSED`` in :func:`apply_kernel`).

    ``SIZE`` is the number of channels in a group, or a power of two above it and ``GROUPS`` 1.
    """
    blocks = tl.cdiv(groups, GROUPS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    size = channels // groups
    k = tl.arange(0, GROUPS * SIZE)
    c = (tl.program_id(0) % blocks) * GROUPS * size + k
    inside = (k < GROUPS * size) & (c < channels)
    mu, s2 = _statistics(
        scratch_ptr,
        mean_ptr,
        var_ptr,
        flags_ptr,
        update_rate,
        c,
        inside,
        rows,
        channels,
        pixels,
        part,
        parts,
        values,
        UPDATE,
        False,
        COMPUTE,
        1,
        GROUPS * SIZE,
    )
    m, v, d, scale, shift, r, rstd = _affine_maps(
        scratch_ptr,
        weight_ptr,
        bias_ptr,
        group_weight_ptr,
        group_bias_ptr,
        mu,
        s2,
        eps,
        n,
        c,
        inside,
        channels,
        size,
        pixels,
        part,
        parts,
        COMPUTE,
        GROUPS,
        SIZE,
        BLOCK_S,
    )
    _store_tables(
        tables_ptr, n, c, inside, channels, groups, size, mu, rstd, m, v, d, scale, shift, r
    )


@triton.jit
def _write_estimates(
    scratch_ptr,
    mean_ptr,
    var_ptr,
    flags_ptr,
    running_mean_ptr,
    running_var_ptr,
    skipped_ptr,
    seen_ptr,
    update_rate,
    block,
    rows,
    channels,
    pixels,
    part,
    parts,
    values,
    UPDATE: tl.constexpr,
    POOL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Moves the estimates of a block of channels, and with the first of them the counters."""
    c = block * BLOCK_U + tl.arange(0, BLOCK_U)
    inside = c < channels
    mean, var = _statistics(
        scratch_ptr,
        mean_ptr,
        var_ptr,
        flags_ptr,
        update_rate,
        c,
        inside,
        rows,
        channels,
        pixels,
        part,
        parts,
        values,
        UPDATE,
        POOL,
        COMPUTE,
        BLOCK_R,
        BLOCK_U,
    )
    tl.store(running_mean_ptr + c, mean, mask=inside)
    tl.store(running_var_ptr + c, var, mask=inside)
    if block == 0:
        flags = tl.load(flags_ptr)
        good = flags == tl.load(flags_ptr + 2)
        tl.store(flags_ptr + 1, flags)
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(good, 0, 1))
        tl.store(seen_ptr, tl.load(seen_ptr) + tl.where(good, values, 0.0))


@triton.jit(do_not_specialize=["tiles", "rows", "part", "parts", "work"])
def apply_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    tables_ptr,
    scratch_ptr,
    mean_ptr,
    var_ptr,
    flags_ptr,
    running_mean_ptr,
    running_var_ptr,
    skipped_ptr,
    seen_ptr,
    weight_ptr,
    bias_ptr,
    group_weight_ptr,
    group_bias_ptr,
    update_rate,
    eps,
    channels,
    groups,
    pixels,
    tiles,
    work,
    rows,
    part,
    parts,
    values,
    FUSED: tl.constexpr,
    UPDATE: tl.constexpr,
    POOL: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One tile of ``relu(scale * (x - m) + shift + residual)``, of ``work`` in all.

    With ``FUSED`` it finds out scale and shift by itself, of the ``GROUPS`` groups of ``SIZE``
    channels that it belongs to, and the first tile of an image writes the tables. With ``UPDATE``
    further programs write the estimates of ``BLOCK_U`` channels each.
    """
    pixels = _aligned(pixels, ALIGN)
    pid = tl.program_id(0)
    if pid < work:
        tile = pid % tiles
        row = pid // tiles
        blocks = tl.cdiv(channels, BLOCK_C)
        n = (row // blocks).to(tl.int64)
        first = (row % blocks) * BLOCK_C
        c = first + tl.arange(0, BLOCK_C)
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = c < channels
        mask = inside[:, None] & (p[None, :] < pixels)
        at = _places(n, c, p, channels, pixels, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
        if FUSED:
            start = first // SIZE * SIZE
            i = start + tl.arange(0, GROUPS * SIZE)
            there = i < channels
            mu, s2 = _statistics(
                scratch_ptr,
                mean_ptr,
                var_ptr,
                flags_ptr,
                update_rate,
                i,
                there,
                rows,
                channels,
                pixels,
                part,
                parts,
                values,
                UPDATE,
                POOL,
                COMPUTE,
                BLOCK_R,
                GROUPS * SIZE,
            )
            all_m, v, d, all_scale, all_shift, r, rstd = _affine_maps(
                scratch_ptr,
                weight_ptr,
                bias_ptr,
                group_weight_ptr,
                group_bias_ptr,
                mu,
                s2,
                eps,
                n,
                i,
                there,
                channels,
                SIZE,
                pixels,
                part,
                parts,
                COMPUTE,
                GROUPS,
                SIZE,
                BLOCK_S,
            )
            if (tile == 0) & (first % SIZE == 0):
                _store_tables(
                    tables_ptr,
                    n,
                    i,
                    there,
                    channels,
                    groups,
                    SIZE,
                    mu,
                    rstd,
                    all_m,
                    v,
                    d,
                    all_scale,
                    all_shift,
                    r,
                )
            m = _own(all_m, first - start, BLOCK_C, GROUPS * SIZE)
            scale = _own(all_scale, first - start, BLOCK_C, GROUPS * SIZE)
            shift = _own(all_shift, first - start, BLOCK_C, GROUPS * SIZE)
        else:
            table = tables_ptr + 2 * channels + n * (5 * channels + groups) + c
            m = tl.load(table, mask=inside, other=0.0)
            scale = tl.load(table + 3 * channels, mask=inside, other=0.0)
            shift = tl.load(table + 4 * channels, mask=inside, other=0.0)
        y = scale[:, None] * (x - m[:, None]) + shift[:, None]
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(COMPUTE)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN, as in torch.relu
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    elif UPDATE:
        _write_estimates(
            scratch_ptr,
            mean_ptr,
            var_ptr,
            flags_ptr,
            running_mean_ptr,
            running_var_ptr,
            skipped_ptr,
            seen_ptr,
            update_rate,
            pid - work,
            rows,
            channels,
            pixels,
            part,
            parts,
            values,
            UPDATE,
            POOL,
            COMPUTE,
            BLOCK_R,
            BLOCK_U,
        )


@triton.jit
def _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT: tl.constexpr):
    """The gradient before ReLU, whose output is read if it has been saved."""
    if FROM_OUTPUT:
        y = tl.load(y_ptr + at, mask=mask, other=0.0)
    else:
        y = scale[:, None] * (x - m[:, None]) + shift[:, None]
    return tl.where(y <= 0, 0.0, grad)  # NaN lets it through, as in torch.relu


@triton.jit(do_not_specialize=["parts"])
def sums_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    tables_ptr,
    sums_ptr,
    channels,
    groups,
    pixels,
    part,
    parts,
    FROM_OUTPUT: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of the gradient, and of the gradient times x - m, over one part of the pixels: a table
    (N, parts, 2, C)."""
    pixels = _aligned(pixels, ALIGN)
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    lane = tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, pixels)
    table = tables_ptr + 2 * channels + n * (5 * channels + groups) + c
    m = tl.load(table, mask=inside, other=0.0)
    scale = m
    shift = m
    if RELU and not FROM_OUTPUT:
        scale = tl.load(table + 3 * channels, mask=inside, other=0.0)
        shift = tl.load(table + 4 * channels, mask=inside, other=0.0)
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
def _gradients(
    sums_ptr,
    weight_ptr,
    group_weight_ptr,
    tables_ptr,
    n,
    c,
    inside,
    channels,
    groups,
    size,
    pixels,
    parts,
    group_values,
    COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of some channels of an image, which are whole groups: the coefficients q and b of the
    gradient of x, and what the image contributes to the gradients of weight, bias, and the weight
    and bias of the groups."""
    s1 = tl.zeros([BLOCK_S, GROUPS * SIZE], COMPUTE)
    s2 = tl.zeros([BLOCK_S, GROUPS * SIZE], COMPUTE)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < parts) & inside[None, :]
        at = (n * parts + s.to(tl.int64)[:, None]) * 2 * channels + c[None, :]
        s1 += tl.load(sums_ptr + at, mask=mask, other=0.0)
        s2 += tl.load(sums_ptr + at + channels, mask=mask, other=0.0)
    s1 = tl.sum(s1, axis=0)
    s2 = tl.sum(s2, axis=0)

    row = tables_ptr + 2 * channels + n * (5 * channels + groups)
    m = tl.load(row + c, mask=inside, other=0.0)
    v = tl.load(row + channels + c, mask=inside, other=0.0)
    d = tl.load(row + 2 * channels + c, mask=inside, other=0.0)
    p = tl.load(row + 3 * channels + c, mask=inside, other=0.0)
    r = tl.load(row + 5 * channels + c // size, mask=inside, other=0.0)
    mu = tl.load(tables_ptr + c, mask=inside, other=0.0)
    rstd = tl.load(tables_ptr + channels + c, mask=inside, other=0.0)
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(COMPUTE) * rstd
    k = tl.load(group_weight_ptr + c // size, mask=inside, other=0.0).to(COMPUTE) * r

    grad_group_bias = _over_groups(s1, GROUPS, SIZE)
    grad_group_weight = _over_groups(r * (a * s2 + d * s1), GROUPS, SIZE)
    u1 = grad_group_bias / group_values
    u2 = grad_group_weight / group_values
    dz_sum = k * (s1 - pixels * (u1 + u2 * r * d))
    dz_t_sum = k * (s2 - pixels * u2 * r * a * v)
    grad_weight = (dz_t_sum + (m - mu) * dz_sum) * rstd
    q = -p * u2 * r * a
    return q, -p * (u1 + u2 * r * d), grad_weight, dz_sum, grad_group_weight, grad_group_bias


@triton.jit
def _store_gradients(
    parameters_ptr,
    n,
    c,
    inside,
    channels,
    groups,
    size,
    grad_weight,
    grad_bias,
    grad_group_weight,
    grad_group_bias,
):
    out = parameters_ptr + n * (2 * channels + 2 * groups)
    tl.store(out + c, grad_weight, mask=inside)
    tl.store(out + channels + c, grad_bias, mask=inside)
    first = inside & (c % size == 0)
    tl.store(out + 2 * channels + c // size, grad_group_weight, mask=first)
    tl.store(out + 2 * channels + groups + c // size, grad_group_bias, mask=first)


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
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """``GROUPS`` groups of an image: the coefficients of the gradient of x, a table (N, 2, C), and
    what the image contributes to those of the parameters, a table (N, 2 C + 2 G). For where the
    tiles cannot do it by themselves (``FUSED`` in :func:`input_grad_kernel`). ``SIZE`` is that of
    :func:`forward_tables_kernel`."""
    blocks = tl.cdiv(groups, GROUPS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    size = channels // groups
    k = tl.arange(0, GROUPS * SIZE)
    c = (tl.program_id(0) % blocks) * GROUPS * size + k
    inside = (k < GROUPS * size) & (c < channels)
    q, b, grad_weight, grad_bias, grad_group_weight, grad_group_bias = _gradients(
        sums_ptr,
        weight_ptr,
        group_weight_ptr,
        tables_ptr,
        n,
        c,
        inside,
        channels,
        groups,
        size,
        pixels,
        parts,
        group_values,
        COMPUTE,
        GROUPS,
        SIZE,
        BLOCK_S,
    )
    out = coefficients_ptr + n * 2 * channels + c
    tl.store(out, q, mask=inside)
    tl.store(out + channels, b, mask=inside)
    _store_gradients(
        parameters_ptr,
        n,
        c,
        inside,
        channels,
        groups,
        size,
        grad_weight,
        grad_bias,
        grad_group_weight,
        grad_group_bias,
    )


@triton.jit(do_not_specialize=["tiles", "parts"])
def input_grad_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    tables_ptr,
    coefficients_ptr,
    sums_ptr,
    weight_ptr,
    group_weight_ptr,
    parameters_ptr,
    channels,
    groups,
    pixels,
    tiles,
    parts,
    group_values,
    FUSED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of the gradients of x, ``scale * grad + q * (x - m) + b``, and of the residual.

    With ``FUSED`` it finds out q and b by itself, of the ``GROUPS`` groups of ``SIZE`` channels
    that it belongs to, and the first tile of an image writes its gradients of the parameters.
    """
    pixels = _aligned(pixels, ALIGN)
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (row // blocks).to(tl.int64)
    first = (row % blocks) * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = inside[:, None] & (pixel[None, :] < pixels)
    at = _places(n, c, pixel, channels, pixels, CHANNELS_LAST)
    table = tables_ptr + 2 * channels + n * (5 * channels + groups) + c
    m = tl.load(table, mask=inside, other=0.0)
    scale = tl.load(table + 3 * channels, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    if FUSED:
        start = first // SIZE * SIZE
        i = start + tl.arange(0, GROUPS * SIZE)
        there = i < channels
        all_q, all_b, grad_weight, grad_bias, grad_group_weight, grad_group_bias = _gradients(
            sums_ptr,
            weight_ptr,
            group_weight_ptr,
            tables_ptr,
            n,
            i,
            there,
            channels,
            groups,
            SIZE,
            pixels,
            parts,
            group_values,
            COMPUTE,
            GROUPS,
            SIZE,
            BLOCK_S,
        )
        if (tile == 0) & (first % SIZE == 0):
            _store_gradients(
                parameters_ptr,
                n,
                i,
                there,
                channels,
                groups,
                SIZE,
                grad_weight,
                grad_bias,
                grad_group_weight,
                grad_group_bias,
            )
        q = _own(all_q, first - start, BLOCK_C, GROUPS * SIZE)
        b = _own(all_b, first - start, BLOCK_C, GROUPS * SIZE)
    else:
        coefficients = coefficients_ptr + n * 2 * channels + c
        q = tl.load(coefficients, mask=inside, other=0.0)
        b = tl.load(coefficients + channels, mask=inside, other=0.0)
    if RELU:
        shift = m
        if not FROM_OUTPUT:
            shift = tl.load(table + 4 * channels, mask=inside, other=0.0)
        grad = _under_relu(grad, x, y_ptr, at, mask, m, scale, shift, FROM_OUTPUT)
        if HAS_RESIDUAL:
            tl.store(grad_residual_ptr + at, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    grad_x = scale[:, None] * grad + q[:, None] * (x - m[:, None]) + b[:, None]
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
