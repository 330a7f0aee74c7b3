"""The kernels in Triton (:mod:`.triton_kernels`), for GPUs.

An activation is cut into tiles of channels and pixels whose shape follows the memory format, so
that NCHW and channels_last are both read the way they lie in memory. Work on few images with few
channels would leave most of a GPU idle, so the pixels are divided too; what the parts yield is put
together in a fixed order, and results are reproducible. A forward pass is two launches, moments and
apply, and a backward pass is two, sums and apply, whose tiles find out all tables by themselves.
Where a tile would have to read too much for that (many parts, or groups of unusual size) there is a
launch for the tables, and one more where many images or parts are to be put together for new
estimates. Whatever follows from the shape of an activation is found out once (:class:`_Forward`,
:class:`_Backward`), as with one image a step the host is as busy as the GPU.
"""

import functools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from .eager import standardize, standardize_backward  # noqa: F401  # of the interpreter
from .estimates import gradient_of_statistics, use_batch
from .memory_format import dense, in_format_of
from .normalization import Normalization
from .state import current_stream
from .tables import new_tables, split_tables, uses_batch_statistics

# The sign under a fused activation is computed again from x and the tables, if nothing was added.
SAVES_ACTIVATED_OUTPUT = False

_TILE = 2048  # elements
# Programs for each multiprocessor, at least, where the pixels are divided.
_WAVES = 4
_ALIGNMENT = 16  # bytes, of which the addresses of tiles are multiples where that is possible
_TABLE_TILE = 2048
# Parts, of an image or of the batch, up to which tiles put their moments together, and the values
# that they read for that.
_FEW_PARTS = 16
_FEW_VALUES = 512
# Tiles up to which each finds out the tables by itself: of more, a launch for them takes less time.
_FEW_TILES = 4096
_MOST_CHANNELS = 256  # for whose tables one program looks, where it is a launch of its own
_UPDATED = 256  # channels whose estimates one program writes
# Shapes whose plans are remembered: images of all sizes make many, and so do the numbers of objects
# in them.
_REMEMBERED = 4096
_STREAMS = 64
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


# With TRITON_INTERPRET=1 kernels run as Python, on tensors of any device.
INTERPRETED = not isinstance(kernels.moments_kernel, triton.runtime.JITFunction)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _on_device(function: _Function) -> _Function:
    """Makes the device of the first argument the current one, which is where Triton launches."""

    @functools.wraps(function)
    def on_device(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return function(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return on_device  # type: ignore[return-value]


class _Launch(NamedTuple):
    """A kernel with its grid and those of its arguments that follow from the shape; to be called
    with the others."""

    kernel: Any
    grid: Tuple[int, ...]
    constants: Dict[str, Any]

    def __call__(self, *args: Any) -> None:
        self.kernel[self.grid](*args, **self.constants)


@dataclass(frozen=True)
class _Tiling:
    """How an activation is divided.

    Attributes:
        device: where it is.
        channels_last: how it lies in memory.
        align: a divisor of the pixels of an image, of which the addresses of tiles are multiples.
        block_c, block_p: channels and pixels of a tile.
        rows: images times blocks of channels.
        tiles: blocks of pixels.
        part, parts: pixels of a part and number of parts, for sums over pixels.
    """

    device: torch.device
    channels_last: bool
    align: int
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
        # Of channels_last the channels decide, of which Triton itself finds out.
        align = math.gcd(pixels, _ALIGNMENT) if contiguous else 1
        if contiguous:
            block_p = min(triton.next_power_of_2(pixels), _TILE)
            block_c = min(triton.next_power_of_2(channels), _TILE // block_p)
        else:
            block_c = min(triton.next_power_of_2(channels), 64)
            block_p = min(triton.next_power_of_2(pixels), _TILE // block_c)
        rows = images * triton.cdiv(channels, block_c)
        tiles = triton.cdiv(pixels, block_p)
        # At least two tiles for each part.
        wanted = triton.cdiv(_WAVES * _multiprocessors(device), rows)
        part = block_p * triton.cdiv(tiles, max(min(wanted, tiles // 2), 1))
        parts = triton.cdiv(pixels, part)
        return cls(device, not contiguous, align, block_c, block_p, rows, tiles, part, parts)

    @property
    def tile(self) -> Dict[str, Any]:
        """Arguments of the kernels that work on tiles."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "ALIGN": self.align,
            "BLOCK_C": self.block_c,
            "BLOCK_P": self.block_p,
        }

    @property
    def partition(self) -> Dict[str, int]:
        """Arguments of the kernels that work on parts."""
        return {"part": self.part, "parts": self.parts}

    def groups(self, images: int, size: int) -> Optional[Dict[str, int]]:
        """Arguments of the kernels whose tiles find out tables by themselves, for groups of
        ``size`` channels; None if they are to be found by a launch."""
        channels = max(self.block_c, size)
        # Many images are many tiles, too, and few pixels in each.
        few = images * self.parts <= _FEW_PARTS and _block(self.parts) * channels <= _FEW_VALUES
        if size & (size - 1) or not few or self.rows * self.tiles > _FEW_TILES:
            return None
        return {"GROUPS": channels // size, "SIZE": size, "BLOCK_S": _block(self.parts)}

    def groups_of_a_program(self, shape: torch.Size, groups: int) -> Tuple[Dict[str, int], int]:
        """Arguments of the kernels that find out tables for the tiles, and how many programs these
        need for all groups of all images."""
        size = shape[1] // groups
        # At least 4, as 1 is for a single part.
        block_s = _block(self.parts, max(_TABLE_TILE // triton.next_power_of_2(size), 4))
        together = 1
        if not size & (size - 1):  # otherwise a row of several groups would have gaps
            room = max(min(_TABLE_TILE // block_s, _MOST_CHANNELS) // size, 1)
            wanted = triton.cdiv(shape[0] * groups, _WAVES * _multiprocessors(self.device))
            together = min(triton.next_power_of_2(wanted), room, triton.next_power_of_2(groups))
        arguments = {
            "GROUPS": together,
            "SIZE": triton.next_power_of_2(size),
            "BLOCK_S": block_s,
        }
        return arguments, shape[0] * triton.cdiv(groups, together)


# Of tiles that are given the tables, so that Triton compiles one kernel for all.
_NO_GROUPS = {"GROUPS": 1, "SIZE": 1, "BLOCK_S": 1}


@lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


@lru_cache(maxsize=None)
def _flags_of(device: torch.device) -> Tensor:
    """Made when the device is tried, as a graph that is being captured would own them."""
    return torch.zeros(_STREAMS, 4, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    return current_stream(device) if device.type == "cuda" else 0  # interpreted


@lru_cache(maxsize=None)
def _flags(device: torch.device, stream: int) -> Tensor:
    """What the passes on a stream count; see :mod:`.triton_kernels`.

    Streams get theirs in the order of their first pass, and share them if they are more than
    there are flags. After a pass that ended halfway, with statistics that were not finite, the next
    one leaves the estimates as well.
    """
    return _flags_of(device)[_flags.cache_info().currsize % _STREAMS]


def try_out(device: torch.device) -> None:
    """Goes through a pass on a device, and prepares it for others.

    Raises whatever makes that fail.
    """
    _flags_of(device)
    x, ones = torch.ones(1, 2, 2, 2, device=device), torch.ones(2, device=device)
    norm = Normalization(ones, ones, ones, ones, ones.clone(), ones.clone(), update_rate=0.1)
    _, tables = forward(x, norm, None, "")
    backward(
        x,
        x,
        tables,
        y=None,
        weight=ones,
        group_weight=ones,
        activation="",
        has_residual=False,
        synchronize=False,
    )
    again(x, tables, 2, "relu")


def _moments_launch(
    tiling: _Tiling, shape: torch.Size, compute: torch.dtype, update: bool
) -> _Launch:
    """Of the kernel for the moments of the parts, (N, parts, 2, C)."""
    constants = dict(
        channels=shape[1],
        pixels=shape[2] * shape[3],
        rows=shape[0] * tiling.parts,
        UPDATE=update,
        SINGLE=tiling.part == tiling.block_p,
        COMPUTE=_COMPUTE[compute],
        **tiling.partition,
        **tiling.tile,
    )
    return _Launch(kernels.moments_kernel, (tiling.rows, tiling.parts), constants)


class _Forward(NamedTuple):
    """The launches of a forward pass.

    Attributes:
        scratch: number of values that the launches share and nobody keeps.
        moments: moments of the parts.
        pool: of the statistics of the batch, or of the estimates after it, if the others do not
            find these out by themselves.
        tables: all tables, unless ``apply`` finds these out by itself.
        apply: the output, and what it changes of the layer's state.
    """

    scratch: int
    moments: _Launch
    pool: Optional[_Launch]
    tables: Optional[_Launch]
    apply: _Launch


@lru_cache(maxsize=_REMEMBERED)
def _plan_forward(
    shape: torch.Size,
    contiguous: bool,
    device: torch.device,
    compute: torch.dtype,
    groups: int,
    update: bool,
    use_batch_statistics: bool,
    has_residual: bool,
    activation: str,
) -> _Forward:
    """
    Args:
        shape, contiguous, device: of the activation, which is not empty.
        compute: dtype of the tables.
        update: whether the estimates move and are what to normalize by.
        use_batch_statistics, has_residual, activation: see :mod:`.batch_channel_norm`.
    """
    tiling = _Tiling.of(shape, contiguous, device)
    images, channels, height, width = shape
    size = channels // groups
    rows = images * tiling.parts
    counts = {
        "rows": rows,
        "channels": channels,
        "pixels": height * width,
        **tiling.partition,
        "values": float(images * height * width),
        "COMPUTE": _COMPUTE[compute],
    }
    fused = tiling.groups(images, size)
    pool_there = (
        update
        and fused is not None
        and _block(rows) * fused["GROUPS"] * fused["SIZE"] <= _FEW_VALUES
    )
    statistics = {
        "UPDATE": update,
        "POOL": pool_there,
        "BLOCK_R": _block(rows) if pool_there else 1,
    }
    pool = None
    if use_batch_statistics or (update and not pool_there):
        block_c = min(triton.next_power_of_2(channels), 16)
        blocks = {"BLOCK_R": _block(rows, _TABLE_TILE // block_c), "BLOCK_C": block_c}
        grid = (triton.cdiv(channels, block_c),)
        pool = _Launch(kernels.pool_kernel, grid, {"AROUND_ESTIMATE": update, **blocks, **counts})
    tables = None
    if fused is None:
        there, programs = tiling.groups_of_a_program(shape, groups)
        constants = {"groups": groups, "UPDATE": update, **there, **counts}
        tables = _Launch(kernels.forward_tables_kernel, (programs,), constants)
    work = tiling.rows * tiling.tiles
    updates = triton.cdiv(channels, _UPDATED) if update else 0
    constants = dict(
        groups=groups,
        tiles=tiling.tiles,
        work=work,
        FUSED=fused is not None,
        HAS_RESIDUAL=has_residual,
        RELU=activation == "relu",
        BLOCK_U=_UPDATED if update else 1,
        **(_NO_GROUPS if fused is None else fused),
        **statistics,
        **counts,
        **tiling.tile,
    )
    apply = _Launch(kernels.apply_kernel, (work + updates,), constants)
    moments = _moments_launch(tiling, shape, compute, update)
    # The old estimates, and those that are pooled by a launch.
    scratch = 2 * channels * (rows + update + (pool is not None))
    return _Forward(scratch, moments, pool, tables, apply)


@lru_cache(maxsize=_REMEMBERED)
def _plan_again(
    shape: torch.Size,
    contiguous: bool,
    device: torch.device,
    compute: torch.dtype,
    groups: int,
    activation: str,
) -> _Launch:
    """Of the output once more; the arguments are those of :func:`_plan_forward`."""
    tiling = _Tiling.of(shape, contiguous, device)
    work = tiling.rows * tiling.tiles
    constants = dict(
        channels=shape[1],
        groups=groups,
        pixels=shape[2] * shape[3],
        tiles=tiling.tiles,
        work=work,
        rows=0,
        values=0.0,
        FUSED=False,
        UPDATE=False,
        POOL=False,
        HAS_RESIDUAL=False,
        RELU=activation == "relu",
        COMPUTE=_COMPUTE[compute],
        BLOCK_R=1,
        BLOCK_U=1,
        **_NO_GROUPS,
        **tiling.partition,
        **tiling.tile,
    )
    return _Launch(kernels.apply_kernel, (work,), constants)


class _Backward(NamedTuple):
    """The launches of a backward pass.

    Attributes:
        scratch: number of values that the launches share and nobody keeps.
        sums: sums over the parts.
        tables: the coefficients of the gradient of the activation, and the parameters' gradients,
            unless ``apply`` finds these out by itself.
        apply: the gradient of the activation, and of the residual.
    """

    scratch: int
    sums: _Launch
    tables: Optional[_Launch]
    apply: _Launch


@lru_cache(maxsize=_REMEMBERED)
def _plan_backward(
    shape: torch.Size,
    contiguous: bool,
    device: torch.device,
    compute: torch.dtype,
    groups: int,
    use_batch_statistics: bool,
    has_residual: bool,
    activation: str,
    from_output: bool,
) -> _Backward:
    """The arguments are those of :func:`_plan_forward`, and ``from_output``, whether what the
    activation let through is read from its output."""
    tiling = _Tiling.of(shape, contiguous, device)
    images, channels, height, width = shape
    size = channels // groups
    counts = {
        "channels": channels,
        "groups": groups,
        "pixels": height * width,
        "COMPUTE": _COMPUTE[compute],
    }
    group_values = float(size * height * width)
    tile = {"FROM_OUTPUT": from_output, "RELU": activation == "relu", **tiling.tile}
    sums = _Launch(
        kernels.sums_kernel, (tiling.rows, tiling.parts), {**counts, **tiling.partition, **tile}
    )
    # Through the statistics of the batch a tile is connected with all others.
    fused = None if use_batch_statistics else tiling.groups(images, size)
    tables = None
    if fused is None:
        there, programs = tiling.groups_of_a_program(shape, groups)
        constants = {"parts": tiling.parts, "group_values": group_values, **there, **counts}
        tables = _Launch(kernels.backward_tables_kernel, (programs,), constants)
    constants = dict(
        tiles=tiling.tiles,
        parts=tiling.parts,
        group_values=group_values,
        FUSED=fused is not None,
        HAS_RESIDUAL=has_residual,
        **(_NO_GROUPS if fused is None else fused),
        **counts,
        **tile,
    )
    apply = _Launch(kernels.input_grad_kernel, (tiling.rows * tiling.tiles,), constants)
    return _Backward(2 * channels * images * tiling.parts, sums, tables, apply)


def _block(count: int, limit: int = _TABLE_TILE) -> int:
    """How many of so many things to have at a time, a power of two: of a few, as each makes Triton
    compile another kernel."""
    return min(next((block for block in (1, 4, 16, 128) if count <= block), limit), limit)


@_on_device
def forward(
    x: Tensor, norm: Normalization, residual: Optional[Tensor], activation: str
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    running = (norm.running_mean, norm.running_var)
    if not all(t.is_contiguous() for t in running):  # which the kernels expect
        copies = [t.contiguous() for t in running]
        copied = norm._replace(running_mean=copies[0], running_var=copies[1])
        result = forward(x, copied, residual, activation)
        for estimate, copy in zip(running, copies):
            estimate.copy_(copy)
        return result
    x = dense(x)
    if residual is not None:
        residual = in_format_of(x, residual)
    shape, device = x.shape, x.device
    groups = norm.group_weight.shape[0]
    tables = new_tables(x, groups, norm.use_batch_statistics)
    y = torch.empty_like(x)
    if not shape.numel():
        return y, _tables_of_nothing(tables, x, norm)
    # Whether the kernels move the estimates, and normalize by them.
    update = norm.update_rate is not None and not norm.use_batch_statistics
    skipped, seen, flags = norm.skipped_updates, norm.seen_elements, None
    if update:
        flags = _flags(device, _stream(device))
        if skipped is None:
            skipped = torch.zeros((), dtype=torch.int64, device=device)
        if seen is None:
            seen = torch.zeros((), device=device)
    plan = _plan_forward(
        shape,
        x.is_contiguous(),
        device,
        tables.dtype,
        groups,
        update,
        norm.use_batch_statistics,
        residual is not None,
        activation,
    )
    scratch = tables.new_empty(plan.scratch)
    parameters = [p.contiguous() for p in norm.parameters]
    numbers = (float(norm.update_rate or 0.0), float(norm.eps))
    statistics = running  # to normalize by
    plan.moments(x, scratch, *running, flags)
    if plan.pool is not None:
        pooled = scratch[-2 * shape[1] :].view(2, shape[1])
        mean, var = pooled.unbind()
        statistics = (mean, var)
        plan.pool(scratch, *running, statistics[0], numbers[0])
    if norm.use_batch_statistics:
        values = shape[0] * shape[2] * shape[3]
        of_all = use_batch(norm, *statistics, values, tables[-1:])
        if norm.synchronize:
            torch.stack(of_all, out=pooled)
    if plan.tables is not None:
        plan.tables(scratch, *statistics, flags, *parameters, tables, *numbers)
    plan.apply(
        x,
        residual,
        y,
        tables,
        scratch,
        *statistics,
        flags,
        *running,
        skipped,
        seen,
        *parameters,
        *numbers,
    )
    return y, tables


def _tables_of_nothing(tables: Tensor, x: Tensor, norm: Normalization) -> Tensor:
    """The tables of an empty activation; the batches of other ranks may not be."""
    images, channels = x.shape[:2]
    mean, var = norm.running_mean, norm.running_var
    if norm.use_batch_statistics:
        nothing = tables.new_zeros(channels)
        mean, var = use_batch(norm, nothing, nothing, 0, tables[-1:])
    split = split_tables(tables, images, channels, norm.group_weight.shape[0])
    split.mu.copy_(mean)
    split.rstd.copy_(torch.rsqrt(var + norm.eps))
    return tables


@_on_device
def again(x: Tensor, tables: Tensor, groups: int, activation: str) -> Tensor:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    y = torch.empty_like(x)
    if x.shape.numel():
        launch = _plan_again(x.shape, x.is_contiguous(), x.device, tables.dtype, groups, activation)
        # Nothing of what it would find out the tables from.
        launch(x, None, y, tables, *[None] * 12, 0.0, 0.0)
    return y


@_on_device
def backward(
    grad: Tensor,
    x: Tensor,
    tables: Tensor,
    *,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    activation: str,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    grad = in_format_of(x, grad)
    y = None if y is None else in_format_of(x, y)  # hooks on saved tensors may have changed either
    shape = x.shape
    images, channels = shape[:2]
    groups = group_weight.shape[0]
    of_batch = uses_batch_statistics(tables, x, groups)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual and activation else None
    parameters = tables.new_empty(images, 2 * channels + 2 * groups)
    if not shape.numel():
        parameters = parameters.new_zeros(parameters.shape[1])
        if of_batch:  # the batches of other ranks may not be empty
            none = tables.new_empty(images, 2, channels)
            _add_gradient_of_statistics(none, parameters, weight, tables, groups, synchronize)
        return grad_x, grad_residual, parameters

    plan = _plan_backward(
        shape,
        x.is_contiguous(),
        x.device,
        tables.dtype,
        groups,
        of_batch,
        has_residual,
        activation,
        y is not None,
    )
    weights = (weight.contiguous(), group_weight.contiguous())
    scratch = tables.new_empty(plan.scratch)
    coefficients: Any = None
    plan.sums(grad, x, y, tables, scratch)
    if plan.tables is not None:
        coefficients = tables.new_empty(images, 2, channels)
        plan.tables(scratch, *weights, tables, coefficients, parameters)
    total = None
    if of_batch:
        total = parameters.sum(dim=0)
        _add_gradient_of_statistics(coefficients, total, weight, tables, groups, synchronize)
    plan.apply(
        grad,
        x,
        y,
        grad_x,
        grad_residual,
        tables,
        coefficients,
        scratch,
        *weights,
        parameters,
    )
    if total is None:
        total = parameters.view(-1) if images == 1 else parameters.sum(dim=0)
    return grad_x, grad_residual, total


def _add_gradient_of_statistics(
    coefficients: Tensor,
    parameters: Tensor,
    weight: Tensor,
    tables: Tensor,
    groups: int,
    synchronize: bool,
) -> None:
    """Adds the gradient through the statistics of the batch."""
    images, _, channels = coefficients.shape
    split = split_tables(tables, images, channels, groups)
    a = weight.to(tables.dtype) * split.rstd
    of_weight, of_bias = parameters[: 2 * channels].split(channels)
    q, c = gradient_of_statistics(a, split.rstd, of_weight, of_bias, split.count, synchronize)
    coefficients[:, 0] -= q
    coefficients[:, 1] -= c + (split.m - split.mu) * q


@_on_device
def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    x = dense(x)
    images, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        mean, var = x.new_zeros(2, images, channels, dtype=dtype).unbind()
        return mean, var
    tiling = _Tiling.of(x.shape, x.is_contiguous(), x.device)
    found = x.new_empty(images, tiling.parts, 2, channels, dtype=dtype)
    _moments_launch(tiling, x.shape, dtype, update=False)(x, found, None, None, None)
    means, m2s = found.unbind(dim=2)
    counts = torch.full((tiling.parts,), tiling.part, dtype=dtype, device=x.device)
    counts[-1] = height * width - tiling.part * (tiling.parts - 1)
    share = (counts / (height * width)).view(1, -1, 1)
    mean = means[:, 0] + ((means - means[:, :1]) * share).sum(dim=1)
    m2 = m2s.sum(dim=1) / (height * width)
    return mean, m2 + ((means - mean.unsqueeze(1)).square() * share).sum(dim=1)
