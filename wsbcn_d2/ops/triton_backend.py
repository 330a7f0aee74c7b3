"""The operations by kernels in Triton (:mod:`.triton_kernels`), for GPUs.

An activation is cut into tiles of channels and pixels whose shape follows the memory format, so
that NCHW and channels_last are both read the way they lie in memory. Work on few images with few
channels would leave most of a GPU idle, so the pixels are divided too; what the parts yield is put
together in a fixed order, and results are reproducible. A forward pass is three launches (moments,
tables, apply), one more where many images or parts are to be put together for new estimates; a
backward pass is three. With one image a step the host is as busy as the GPU, so whatever follows
from the shape of an activation is found out once (:class:`_Forward`, :class:`_Backward`), and what
belongs together is in one tensor.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from .estimates import pool_over_ranks, sum_over_ranks, update_with_batch
from .launch import Launch, signature
from .memory_format import dense, in_format_of
from .tables import new_tables, split_tables

# The sign under a fused ReLU is computed again from x and the tables, if nothing was added.
SAVES_OUTPUT_OF_RELU = False

_TILE = 2048  # elements
# Standardized weights begin at multiples of so many elements: convolutions of fp16 and bf16 on
# tensor cores want 16 bytes.
_ALIGNMENT = 16
_TABLE_TILE = 2048
# Moments up to which every program puts together the statistics of all channels by itself, to find
# out whether all of them are finite, rather than a kernel of their own; and those that all programs
# read together.
_FEW_MOMENTS = 16384
_FEW_READS = 4_000_000
# Passes whose launches are remembered: images of all sizes make many, and so do the numbers of
# objects in them.
_REMEMBERED = 4096
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


# With TRITON_INTERPRET=1 kernels run as Python, on tensors of any device.
INTERPRETED = not isinstance(kernels.moments_kernel, triton.runtime.JITFunction)


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
    def of(cls, shape: torch.Size, contiguous: bool, device: torch.device) -> "_Tiling":
        """The tiling of an activation that is dense, in NCHW (``contiguous``) or channels_last."""
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
        parts = triton.cdiv(pixels, part)
        return cls(not contiguous, block_c, block_p, rows, tiles, part, parts)

    @property
    def tile(self) -> Dict[str, Any]:
        """Arguments of the kernels that work on tiles."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "BLOCK_C": self.block_c,
            "BLOCK_P": self.block_p,
        }

    @property
    def partition(self) -> Dict[str, int]:
        """Arguments of the kernels that work on parts."""
        return {"part": self.part, "parts": self.parts}


@lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


@lru_cache(maxsize=_REMEMBERED)
def _moments_launch(
    shape: torch.Size,
    contiguous: bool,
    device: torch.device,
    compute: torch.dtype,
    tensors: Tuple[Any, ...],
) -> Tuple[Launch, _Tiling]:
    """Of the kernel for the moments of the parts, (N, parts, 2, C), and their tiling. The arguments
    are those of :meth:`_Forward.of`; the last distinguishes launches, and nothing else."""
    tiling = _Tiling.of(shape, contiguous, device)
    launch = Launch(
        kernels.moments_kernel,
        (tiling.rows, tiling.parts),
        channels=shape[1],
        pixels=shape[2] * shape[3],
        COMPUTE=_COMPUTE[compute],
        **tiling.partition,
        **tiling.tile,
    )
    return launch, tiling


class _Forward(NamedTuple):
    """The launches of a forward pass.

    Attributes:
        parts: parts of the pixels of an image.
        moments: moments of the parts.
        pool: of the statistics of the batch, or of the estimates after it, if not by ``tables``.
        tables: all tables.
        apply: the output, and what it changes of the layer's state.
    """

    parts: int
    moments: Launch
    pool: Optional[Launch]
    tables: Launch
    apply: Launch

    @classmethod
    @lru_cache(maxsize=_REMEMBERED)
    def of(
        cls,
        shape: torch.Size,
        contiguous: bool,
        device: torch.device,
        compute: torch.dtype,
        groups: int,
        update: bool,
        use_batch_statistics: bool,
        synchronize: bool,
        has_residual: bool,
        relu: bool,
        tensors: Tuple[Any, ...],
    ) -> "_Forward":
        """
        Args:
            shape, contiguous, device: of the activation, which is not empty.
            compute: dtype of the tables.
            update: whether the estimates move and are what to normalize by.
            use_batch_statistics, synchronize, has_residual, relu: see :mod:`.batch_channel_norm`.
            tensors: :func:`signature` of those that are given to the pass, the activation first.
        """
        moments, tiling = _moments_launch(shape, contiguous, device, compute, tensors[:1])
        images, channels, height, width = shape
        pixels = height * width
        rows = images * tiling.parts
        few_moments = (
            rows * channels <= _FEW_MOMENTS and images * groups * rows * channels <= _FEW_READS
        )
        counts = {"rows": rows, "channels": channels, "pixels": pixels, **tiling.partition}
        compute_ = {"COMPUTE": _COMPUTE[compute]}
        values = {"values": float(images * pixels)}

        pool = None
        if use_batch_statistics or (update and not few_moments):
            block_c = min(triton.next_power_of_2(channels), 16)
            pool = Launch(
                kernels.pool_kernel,
                (triton.cdiv(channels, block_c),),
                AROUND_ESTIMATE=update,
                BLOCK_R=_block(rows, _TABLE_TILE // block_c),
                BLOCK_C=block_c,
                **counts,
                **values,
                **compute_,
            )
        pool_there = update and few_moments
        block_d = triton.next_power_of_2(channels // groups)
        limit = max(_TABLE_TILE // block_d, 1)
        block_all = min(triton.next_power_of_2(channels), _TABLE_TILE)
        if pool_there:
            block_all = min(block_all, max(256, _TABLE_TILE // triton.next_power_of_2(rows)))
        tables = Launch(
            kernels.forward_tables_kernel,
            (images * groups,),
            groups=groups,
            UPDATE=update,
            POOL=pool_there,
            BLOCK_D=block_d,
            BLOCK_S=_block(tiling.parts, limit),
            # What is not used must not make Triton compile another kernel.
            BLOCK_OWN=_block(rows, limit) if pool_there else 1,
            BLOCK_R=_block(rows, _TABLE_TILE // block_all) if pool_there else 1,
            BLOCK_ALL=block_all if update else 1,
            **counts,
            **values,
            **compute_,
        )
        apply = Launch(
            kernels.apply_kernel,
            (tiling.rows * tiling.tiles,),
            channels=channels,
            groups=groups,
            pixels=pixels,
            tiles=tiling.tiles,
            UPDATE=update,
            HAS_RESIDUAL=has_residual,
            RELU=relu,
            **values,
            **compute_,
            **tiling.tile,
        )
        return cls(tiling.parts, moments, pool, tables, apply)


class _Backward(NamedTuple):
    """The launches of a backward pass.

    Attributes:
        parts: parts of the pixels of an image.
        sums: sums over the parts.
        tables: the coefficients of the gradient of the activation, and the parameters' gradients.
        apply: the gradient of the activation, and of the residual.
    """

    parts: int
    sums: Launch
    tables: Launch
    apply: Launch

    @classmethod
    @lru_cache(maxsize=_REMEMBERED)
    def of(
        cls,
        shape: torch.Size,
        contiguous: bool,
        device: torch.device,
        compute: torch.dtype,
        groups: int,
        has_residual: bool,
        relu: bool,
        from_output: bool,
        tensors: Tuple[Any, ...],
    ) -> "_Backward":
        """The arguments are those of :meth:`_Forward.of`, and ``from_output``, whether what ReLU
        let through is read from its output."""
        tiling = _Tiling.of(shape, contiguous, device)
        images, channels, height, width = shape
        pixels = height * width
        counts = {"channels": channels, "groups": groups, "pixels": pixels}
        compute_ = {"COMPUTE": _COMPUTE[compute]}
        tile = {"FROM_OUTPUT": from_output, "RELU": relu, **tiling.tile}
        sums = Launch(
            kernels.sums_kernel,
            (tiling.rows, tiling.parts),
            **counts,
            **tiling.partition,
            **tile,
            **compute_,
        )
        block_d = triton.next_power_of_2(channels // groups)
        tables = Launch(
            kernels.backward_tables_kernel,
            (images * groups,),
            parts=tiling.parts,
            group_values=float(channels // groups * pixels),
            BLOCK_D=block_d,
            BLOCK_S=_block(tiling.parts, max(_TABLE_TILE // block_d, 1)),
            **counts,
            **compute_,
        )
        apply = Launch(
            kernels.input_grad_kernel,
            (tiling.rows * tiling.tiles,),
            tiles=tiling.tiles,
            HAS_RESIDUAL=has_residual,
            **counts,
            **tile,
            **compute_,
        )
        return cls(tiling.parts, sums, tables, apply)


def _block(count: int, limit: int) -> int:
    """How many of so many things to have at a time, a power of two: of a few, as each makes Triton
    compile another kernel."""
    return min(next((block for block in (1, 16, 128) if count <= block), limit), limit)


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
    x = dense(x)
    if residual is not None:
        residual = in_format_of(x, residual)
    images, channels, height, width = x.shape
    groups = group_weight.shape[0]
    rate = 0.0 if update_rate is None else float(update_rate)
    tables = new_tables(x, groups, use_batch_statistics)
    shift = tables.new_empty(images, channels)
    y = torch.empty_like(x)
    # Whether the kernels move the estimates, and normalize by them.
    update = update_rate is not None and not use_batch_statistics and x.numel() > 0
    if update:
        if skipped_updates is None:
            skipped_updates = torch.zeros((), dtype=torch.int64, device=x.device)
        if seen_elements is None:
            seen_elements = torch.zeros((), device=x.device)
    parameters = (weight, bias, group_weight, group_bias)
    counters = (skipped_updates, seen_elements)

    launches, moments_ = None, None
    if x.numel():
        launches = _Forward.of(
            x.shape,
            x.is_contiguous(),
            x.device,
            tables.dtype,
            groups,
            update,
            use_batch_statistics,
            synchronize,
            residual is not None,
            relu,
            signature(x, residual, *parameters, running_mean, running_var, *counters),
        )
        moments_ = tables.new_empty(images, launches.parts, 2, channels)
        launches.moments(x, moments_)

    mean, var = running_mean, running_var  # to normalize by, or what they become
    if launches is not None and launches.pool is not None:
        pooled = tables.new_empty(2, channels)
        launches.pool(moments_, running_mean, running_var, pooled, rate)
        mean, var = pooled
    elif use_batch_statistics:
        mean, var = tables.new_zeros(2, channels)
    if use_batch_statistics:
        count = tables[-1:].fill_(images * height * width)
        if synchronize:
            mean, var, total = pool_over_ranks(mean, var, count)
            count.copy_(total)
        if update_rate is not None:
            update_with_batch(
                running_mean, running_var, mean, var, rate, count.squeeze(0), *counters
            )

    if launches is None:
        split = split_tables(tables, images, channels, groups)
        split.mu.copy_(mean)
        split.rstd.copy_(torch.rsqrt(var + eps))
        return y, tables, shift
    estimates = tables.new_empty(2 * channels + 1) if update else None
    launches.tables(
        moments_,
        mean,
        var,
        running_mean,
        running_var,
        *parameters,
        tables,
        shift,
        estimates,
        rate,
        float(eps),
    )
    launches.apply(x, residual, y, tables, shift, estimates, running_mean, running_var, *counters)
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
    x = dense(x)
    grad = in_format_of(x, grad)
    images, channels = x.shape[:2]
    groups = group_weight.shape[0]
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual and relu else x.new_empty(0)
    coefficients = tables.new_empty(images, 2, channels)
    parameters = tables.new_empty(images, 2 * channels + 2 * groups)

    launches = None
    if x.numel():
        launches = _Backward.of(
            x.shape,
            x.is_contiguous(),
            x.device,
            tables.dtype,
            groups,
            has_residual,
            relu,
            y is not None,
            signature(grad, x, y, weight, group_weight, tables, shift),
        )
        sums = tables.new_empty(images, launches.parts, 2, channels)
        launches.sums(grad, x, y, tables, shift, sums)
        launches.tables(sums, weight, group_weight, tables, coefficients, parameters)
        parameters = parameters[0] if images == 1 else parameters.sum(dim=0)
    else:
        parameters = parameters.new_zeros(parameters.shape[1])
    _add_gradient_of_statistics(coefficients, parameters, weight, tables, groups, synchronize)
    if launches is not None:
        launches.apply(grad, x, y, grad_x, grad_residual, tables, shift, coefficients)
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
    x = dense(x)
    images, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return tuple(x.new_zeros(images, channels, dtype=dtype) for _ in range(2))
    launch, tiling = _moments_launch(x.shape, x.is_contiguous(), x.device, dtype, signature(x))
    moments_ = x.new_empty(images, tiling.parts, 2, channels, dtype=dtype)
    launch(x, moments_)
    means, m2s = moments_.unbind(dim=2)
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
    filters = _filters(tuple(w.shape for w in weights), flat.device)
    compute = torch.promote_types(flat.dtype, torch.float32)
    out = torch.empty(sum(filters.rooms), dtype=dtype, device=flat.device)
    mean, rstd = (torch.empty(filters.count, dtype=compute, device=flat.device) for _ in range(2))
    kernels.standardize_kernel[(filters.count,)](
        flat,
        out,
        mean,
        rstd,
        filters.starts,
        filters.places,
        _eps_of_filters(tuple(eps), tuple(w.shape[0] for w in weights), flat.device),
        COMPUTE=_COMPUTE[compute],
        BLOCK=1024,
    )
    return _divided(out, weights, filters.rooms), mean, rstd


def standardize_backward(
    grads: List[Tensor], weights: List[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """See :mod:`.weight_standardization`."""
    flat = _concatenated(weights)
    grads = [
        grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
        for grad, weight in zip(grads, weights)
    ]
    filters = _filters(tuple(w.shape for w in weights), flat.device)
    out = torch.empty_like(flat)
    kernels.standardize_backward_kernel[(filters.count,)](
        _concatenated(grads),
        flat,
        out,
        mean,
        rstd,
        filters.starts,
        COMPUTE=_COMPUTE[mean.dtype],
        BLOCK=1024,
    )
    return _divided(out, weights, [w.numel() for w in weights])


def _concatenated(weights: List[Tensor]) -> Tensor:
    """All weights, each in its order in memory, in one row."""
    return torch.cat([_row(w) for w in weights])


def _row(weight: Tensor) -> Tensor:
    if weight.is_contiguous():
        return weight.view(-1)
    order = sorted(range(weight.dim()), key=lambda i: (i != 0, -weight.stride(i)))
    return weight.permute(order).reshape(-1)


def _divided(flat: Tensor, weights: List[Tensor], rooms: Sequence[int]) -> List[Tensor]:
    """The inverse of :func:`_concatenated`, where each weight lies at the start of its room."""
    return [
        part.as_strided(w.shape, w.stride(), part.storage_offset())
        for part, w in zip(flat.split(list(rooms)), weights)
    ]


class _Filters(NamedTuple):
    """Where the filters of some weights lie.

    Attributes:
        count: of the filters.
        starts: (count + 1,), where each begins in the concatenation, and where the last ends.
        places: (count,), where each begins among those standardized.
        rooms: the elements that each weight has for itself there.
    """

    count: int
    starts: Tensor
    places: Tensor
    rooms: Tuple[int, ...]


@lru_cache(maxsize=None)
def _filters(shapes: Tuple[torch.Size, ...], device: torch.device) -> _Filters:
    filters = torch.tensor([shape[0] for shape in shapes])
    numel = torch.tensor([shape.numel() for shape in shapes])
    rooms = (numel + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    sizes = (numel // filters).repeat_interleave(filters)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    added = (rooms - numel).cumsum(0) - (rooms - numel)  # before each weight
    places = starts[:-1] + added.repeat_interleave(filters)
    return _Filters(len(sizes), starts.to(device), places.to(device), tuple(rooms.tolist()))


@lru_cache(maxsize=None)
def _eps_of_filters(
    eps: Tuple[float, ...], filters: Tuple[int, ...], device: torch.device
) -> Tensor:
    values = torch.tensor(eps, dtype=torch.float64)
    return values.repeat_interleave(torch.tensor(filters)).to(device)
