"""The operations by kernels in Triton (:mod:`.triton_kernels`), for GPUs.

An activation is cut into tiles of channels and pixels whose shape follows the memory format, so
that NCHW and channels_last are both read the way they lie in memory. Work on few images with few
channels would leave most of a GPU idle, so the pixels are divided too; what the parts yield is put
together in a fixed order, and results are reproducible. A forward pass is two launches, moments and
apply, and a backward pass is two, sums and apply, whose tiles find out all tables by themselves.
Where a tile would have to read too much for that (many parts, or groups of unusual size) there is a
launch for the tables, and one more where many images or parts are to be put together for new
estimates. With one image a step the host is as busy as the GPU, so whatever follows from the shape
of an activation is found out once (:class:`_Forward`, :class:`_Backward`), and what belongs
together is in one tensor.
"""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from . import triton_kernels as kernels
from .estimates import sum_over_ranks, use_batch
from .extension import extension
from .launch import Launch, addresses_of, current_stream, is_watched, signature
from .memory_format import dense, in_format_of
from .tables import new_tables, split_tables, tables_size

# The sign under a fused ReLU is computed again from x and the tables, if nothing was added.
SAVES_OUTPUT_OF_RELU = False

_TILE = 2048  # elements
# Programs for each multiprocessor, at least, where the pixels are divided.
_WAVES = 4
# Standardized weights begin at multiples of so many elements: convolutions of fp16 and bf16 on
# tensor cores want 16 bytes.
_ALIGNMENT = 16
_TABLE_TILE = 2048
# Parts, of an image or of the batch, up to which tiles put their moments together, and the values
# that they read for that.
_FEW_PARTS = 16
_FEW_VALUES = 512
# Tiles up to which each finds out the tables by itself: of more, a launch for them takes less time.
_FEW_TILES = 4096
_MOST_CHANNELS = 256  # for whose tables one program looks, where it is a launch of its own
_UPDATED = 256  # channels whose estimates one program writes
# Passes whose launches are remembered: images of all sizes make many, and so do the numbers of
# objects in them.
_REMEMBERED = 4096
_STREAMS = 64
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


# With TRITON_INTERPRET=1 kernels run as Python, on tensors of any device.
INTERPRETED = not isinstance(kernels.moments_kernel, triton.runtime.JITFunction)


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


@lru_cache(maxsize=None)
def _flags(device: torch.device, stream: int) -> Tensor:
    """What the passes on a stream count; see :mod:`.triton_kernels`.

    Streams get theirs in the order of their first pass, and share them if they are more than
    there are flags. After a pass that ended halfway, with statistics that were not finite, the next
    one leaves the estimates as well.
    """
    return _flags_of(device)[_flags.cache_info().currsize % _STREAMS]


def for_extension() -> Tuple[Any, ...]:
    """See :file:`extension.cpp`: what it asks for at each pass."""
    return current_stream, _flags, is_watched


def _hand_over(
    function: str, args: Tuple[Any, ...], scratch: int, launches: Sequence[Optional[Launch]]
) -> None:
    """Gives the extension the launches of a pass, which it is to make from now on.

    Args:
        function: of the extension.
        args: what was given to the pass.
        scratch: see :class:`_Forward`.
        launches: in their order; None for one that is not made.
    """
    compiled = extension()
    if compiled is None:
        return
    parts = [None if launch is None else launch.parts for launch in launches]
    if parts.count(None) == launches.count(None):
        getattr(compiled, function)(*args, scratch, parts)


def try_out(device: torch.device) -> None:
    """Goes through a pass on a device, which is the current one, and prepares it for others.

    Raises whatever makes that fail.
    """
    _flags_of(device)
    x, ones = torch.ones(1, 2, 2, 2, device=device), torch.ones(2, device=device)
    estimates = torch.ones(2, 2, device=device)
    options = (0.1, 1e-5, False, False, False)
    for _ in range(2):  # the first launch and its repetition are not the same code
        tensors = (x, None, ones, ones, ones, ones, *estimates, None, None)
        _, tables = batch_channel_norm_forward(*tensors, *options)
        batch_channel_norm_backward(x, x, None, ones, ones, tables, *options[2:])
        batch_channel_norm_again(x, tables, 2, relu=True)


def _moments_launch(
    tiling: _Tiling, shape: torch.Size, compute: torch.dtype, update: bool
) -> Launch:
    """Of the kernel for the moments of the parts, (N, parts, 2, C)."""
    return Launch(
        kernels.moments_kernel,
        (tiling.rows, tiling.parts),
        channels=shape[1],
        pixels=shape[2] * shape[3],
        rows=shape[0] * tiling.parts,
        UPDATE=update,
        SINGLE=tiling.part == tiling.block_p,
        COMPUTE=_COMPUTE[compute],
        **tiling.partition,
        **tiling.tile,
    )


@lru_cache(maxsize=_REMEMBERED)
def _moments_alone(
    shape: torch.Size,
    contiguous: bool,
    device: torch.device,
    compute: torch.dtype,
    tensors: Tuple[Any, ...],
) -> Tuple[Launch, _Tiling]:
    """The arguments are those of :meth:`_Forward.of`; the last distinguishes launches, and nothing
    else."""
    tiling = _Tiling.of(shape, contiguous, device)
    return _moments_launch(tiling, shape, compute, update=False), tiling


@dataclass(eq=False)
class _Forward:
    """The launches of a forward pass.

    Attributes:
        scratch: number of values that the launches share and nobody keeps.
        moments: moments of the parts.
        pool: of the statistics of the batch, or of the estimates after it, if the others do not
            find these out by themselves.
        tables: all tables, unless ``apply`` finds these out by itself.
        apply: the output, and what it changes of the layer's state.
        known: whether addresses are enough for them (:attr:`.launch.Launch.known`).
    """

    scratch: int
    moments: Launch
    pool: Optional[Launch]
    tables: Optional[Launch]
    apply: Launch
    known: bool = False

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
        has_residual: bool,
        relu: bool,
        tensors: Tuple[Any, ...],
    ) -> "_Forward":
        """
        Args:
            shape, contiguous, device: of the activation, which is not empty.
            compute: dtype of the tables.
            update: whether the estimates move and are what to normalize by.
            use_batch_statistics, has_residual, relu: see :mod:`.batch_channel_norm`.
            tensors: :func:`signature` of those that are given to the pass.
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
            pool = Launch(
                kernels.pool_kernel,
                (triton.cdiv(channels, block_c),),
                AROUND_ESTIMATE=update,
                BLOCK_R=_block(rows, _TABLE_TILE // block_c),
                BLOCK_C=block_c,
                **counts,
            )
        tables = None
        if fused is None:
            there, programs = tiling.groups_of_a_program(shape, groups)
            tables = Launch(
                kernels.forward_tables_kernel,
                (programs,),
                groups=groups,
                UPDATE=update,
                **there,
                **counts,
            )
        work = tiling.rows * tiling.tiles
        updates = triton.cdiv(channels, _UPDATED) if update else 0
        apply = Launch(
            kernels.apply_kernel,
            (work + updates,),
            groups=groups,
            tiles=tiling.tiles,
            work=work,
            FUSED=fused is not None,
            HAS_RESIDUAL=has_residual,
            RELU=relu,
            BLOCK_U=_UPDATED if update else 1,
            **(_NO_GROUPS if fused is None else fused),
            **statistics,
            **counts,
            **tiling.tile,
        )
        moments = _moments_launch(tiling, shape, compute, update)
        # The old estimates, and those that are pooled by a launch.
        scratch = 2 * channels * (rows + update + (pool is not None))
        return cls(scratch, moments, pool, tables, apply)


# Those tensors that the kernel of the output wants only to find out the tables.
_NOT_FOR_TABLES = (None,) * 12


@lru_cache(maxsize=_REMEMBERED)
def _apply_again(
    shape: torch.Size,
    contiguous: bool,
    device: torch.device,
    compute: torch.dtype,
    groups: int,
    relu: bool,
    tensors: Tuple[Any, ...],
) -> Launch:
    """Of the output once more; the arguments are those of :meth:`_Forward.of`."""
    tiling = _Tiling.of(shape, contiguous, device)
    work = tiling.rows * tiling.tiles
    return Launch(
        kernels.apply_kernel,
        (work,),
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
        RELU=relu,
        COMPUTE=_COMPUTE[compute],
        BLOCK_R=1,
        BLOCK_U=1,
        **_NO_GROUPS,
        **tiling.partition,
        **tiling.tile,
    )


@dataclass(eq=False)
class _Backward:
    """The launches of a backward pass.

    Attributes:
        scratch: number of values that the launches share and nobody keeps.
        sums: sums over the parts.
        tables: the coefficients of the gradient of the activation, and the parameters' gradients,
            unless ``apply`` finds these out by itself.
        apply: the gradient of the activation, and of the residual.
        known: as for :class:`_Forward`.
    """

    scratch: int
    sums: Launch
    tables: Optional[Launch]
    apply: Launch
    known: bool = False

    @classmethod
    @lru_cache(maxsize=_REMEMBERED)
    def of(
        cls,
        shape: torch.Size,
        contiguous: bool,
        device: torch.device,
        compute: torch.dtype,
        groups: int,
        use_batch_statistics: bool,
        has_residual: bool,
        relu: bool,
        from_output: bool,
        tensors: Tuple[Any, ...],
    ) -> "_Backward":
        """The arguments are those of :meth:`_Forward.of`, and ``from_output``, whether what ReLU
        let through is read from its output."""
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
        tile = {"FROM_OUTPUT": from_output, "RELU": relu, **tiling.tile}
        sums = Launch(
            kernels.sums_kernel,
            (tiling.rows, tiling.parts),
            **counts,
            **tiling.partition,
            **tile,
        )
        # Through the statistics of the batch a tile is connected with all others.
        fused = None if use_batch_statistics else tiling.groups(images, size)
        tables = None
        if fused is None:
            there, programs = tiling.groups_of_a_program(shape, groups)
            tables = Launch(
                kernels.backward_tables_kernel,
                (programs,),
                parts=tiling.parts,
                group_values=group_values,
                **there,
                **counts,
            )
        apply = Launch(
            kernels.input_grad_kernel,
            (tiling.rows * tiling.tiles,),
            tiles=tiling.tiles,
            parts=tiling.parts,
            group_values=group_values,
            FUSED=fused is not None,
            HAS_RESIDUAL=has_residual,
            **(_NO_GROUPS if fused is None else fused),
            **counts,
            **tile,
        )
        return cls(2 * channels * images * tiling.parts, sums, tables, apply)


def _block(count: int, limit: int = _TABLE_TILE) -> int:
    """How many of so many things to have at a time, a power of two: of a few, as each makes Triton
    compile another kernel."""
    return min(next((block for block in (1, 4, 16, 128) if count <= block), limit), limit)


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
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    of_layer = (weight, bias, group_weight, group_bias, running_mean, running_var)
    if not all([table.is_contiguous() for table in of_layer]):  # which the kernels expect
        copies = [table.contiguous() for table in of_layer]
        result = batch_channel_norm_forward(
            x,
            residual,
            *copies,
            skipped_updates,
            seen_elements,
            update_rate,
            eps,
            use_batch_statistics,
            relu,
            synchronize,
        )
        running_mean.copy_(copies[4])
        running_var.copy_(copies[5])
        return result
    x = dense(x)
    if residual is not None:
        residual = in_format_of(x, residual)
    shape, device = x.shape, x.device
    groups = group_weight.shape[0]
    tables = new_tables(x, groups, use_batch_statistics)
    y = torch.empty_like(x)
    if not shape.numel():
        return y, _tables_of_nothing(
            tables,
            x,
            groups,
            running_mean,
            running_var,
            skipped_updates,
            seen_elements,
            update_rate,
            eps,
            use_batch_statistics,
            synchronize,
        )
    rate = 0.0 if update_rate is None else float(update_rate)
    # Whether the kernels move the estimates, and normalize by them.
    update = update_rate is not None and not use_batch_statistics
    if update:
        if skipped_updates is None:
            skipped_updates = torch.zeros((), dtype=torch.int64, device=device)
        if seen_elements is None:
            seen_elements = torch.zeros((), device=device)

    parameters = (weight, bias, group_weight, group_bias)
    counters = (skipped_updates, seen_elements) if update else (None, None)
    running = (running_mean, running_var)
    stream = current_stream(device)
    flags = _flags(device, stream) if update else None
    tensors = (x, residual, *parameters, *running, *counters, flags)
    addresses = addresses_of(tensors)
    launches = _Forward.of(
        shape,
        x.is_contiguous(),
        device,
        tables.dtype,
        groups,
        update,
        use_batch_statistics,
        residual is not None,
        relu,
        signature(tensors, addresses),
    )
    scratch = tables.new_empty(launches.scratch)
    statistics = running  # to normalize by
    if launches.pool is not None:
        pooled = scratch[-2 * shape[1] :].view(2, shape[1])
        statistics = pooled.unbind()
    more = (y, tables, scratch, *statistics)
    tensors = (*addresses, *addresses_of(more)) if launches.known else (*tensors, *more)
    (x_, residual_, *parameters_), rest = tensors[:6], tensors[6:]
    mean_, var_, skipped_, seen_, flags_, y_, tables_, scratch_, *statistics_ = rest
    launches.moments(stream, x_, scratch_, mean_, var_, flags_)
    if launches.pool is not None:
        launches.pool(stream, scratch_, mean_, var_, statistics_[0], rate)
    if use_batch_statistics:
        values = shape[0] * shape[2] * shape[3]
        counters = (skipped_updates, seen_elements)
        of_all = use_batch(
            *statistics, values, tables[-1:], *running, update_rate, *counters, synchronize
        )
        if synchronize:
            torch.stack(of_all, out=pooled)
    if launches.tables is not None:
        launches.tables(
            stream, scratch_, *statistics_, flags_, *parameters_, tables_, rate, float(eps)
        )
    launches.apply(
        stream,
        x_,
        residual_,
        y_,
        tables_,
        scratch_,
        *statistics_,
        flags_,
        mean_,
        var_,
        skipped_,
        seen_,
        *parameters_,
        rate,
        float(eps),
    )
    launches.known = launches.apply.known  # the last: all have been launched
    if launches.known and not use_batch_statistics:
        state = (*running, skipped_updates, seen_elements)
        options = (update_rate, eps, use_batch_statistics, relu, synchronize)
        _hand_over(
            "remember_forward",
            (x, residual, parameters, state, options),
            launches.scratch,
            [launches.moments, launches.pool, launches.tables, launches.apply],
        )
    return y, tables


def _tables_of_nothing(
    tables: Tensor,
    x: Tensor,
    groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    skipped_updates: Optional[Tensor],
    seen_elements: Optional[Tensor],
    update_rate: Union[float, Tensor, None],
    eps: float,
    use_batch_statistics: bool,
    synchronize: bool,
) -> Tensor:
    """The tables of an empty activation; the batches of other ranks may not be."""
    images, channels = x.shape[:2]
    mean, var = running_mean, running_var
    if use_batch_statistics:
        running, counters = (running_mean, running_var), (skipped_updates, seen_elements)
        nothing = tables.new_zeros(2, channels)
        mean, var = use_batch(
            *nothing, 0, tables[-1:], *running, update_rate, *counters, synchronize
        )
    split = split_tables(tables, images, channels, groups)
    split.mu.copy_(mean)
    split.rstd.copy_(torch.rsqrt(var + eps))
    return tables


def batch_channel_norm_again(x: Tensor, tables: Tensor, groups: int, relu: bool) -> Tensor:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    y = torch.empty_like(x)
    if x.shape.numel():
        tensors = (x, None, y, tables)
        addresses = addresses_of(tensors)
        launch = _apply_again(
            x.shape,
            x.is_contiguous(),
            x.device,
            tables.dtype,
            groups,
            relu,
            signature(tensors, addresses),
        )
        first = addresses if launch.known else tensors
        launch(current_stream(x.device), *first, *_NOT_FOR_TABLES, 0.0, 0.0)
        if launch.known:
            _hand_over("remember_again", (x, tables, groups, relu), 0, [launch])
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
    grad = in_format_of(x, grad)
    shape, device = x.shape, x.device
    images, channels = shape[:2]
    groups = group_weight.shape[0]
    use_batch_statistics = tables.shape[0] > tables_size(shape, groups, False)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual and relu else None
    parameters = tables.new_empty(images, 2 * channels + 2 * groups)
    if not shape.numel():
        parameters = parameters.new_zeros(parameters.shape[1])
        if use_batch_statistics:
            none = tables.new_empty(images, 2, channels)
            _add_gradient_of_statistics(none, parameters, weight, tables, groups, synchronize)
        return grad_x, grad_residual, parameters

    weight, group_weight = weight.contiguous(), group_weight.contiguous()
    tensors = (grad, x, y, weight, group_weight, tables)
    addresses = addresses_of(tensors)
    launches = _Backward.of(
        shape,
        x.is_contiguous(),
        device,
        tables.dtype,
        groups,
        use_batch_statistics,
        has_residual,
        relu,
        y is not None,
        signature(tensors, addresses),
    )
    scratch = tables.new_empty(launches.scratch)
    coefficients = None
    if launches.tables is not None:
        coefficients = tables.new_empty(images, 2, channels)
    more = (grad_x, grad_residual, parameters, scratch, coefficients)
    tensors = (*addresses, *addresses_of(more)) if launches.known else (*tensors, *more)
    grad_, x_, y_, weight_, group_weight_, tables_ = tensors[:6]
    grad_x_, grad_residual_, parameters_, scratch_, coefficients_ = tensors[6:]
    stream = current_stream(device)
    launches.sums(stream, grad_, x_, y_, tables_, scratch_)
    if launches.tables is not None:
        launches.tables(
            stream, scratch_, weight_, group_weight_, tables_, coefficients_, parameters_
        )
    total = parameters
    if use_batch_statistics:
        total = parameters.sum(dim=0)
        _add_gradient_of_statistics(coefficients, total, weight, tables, groups, synchronize)
    launches.apply(
        stream,
        grad_,
        x_,
        y_,
        grad_x_,
        grad_residual_,
        tables_,
        coefficients_,
        scratch_,
        weight_,
        group_weight_,
        parameters_,
    )
    launches.known = launches.apply.known
    if launches.known and not use_batch_statistics:
        _hand_over(
            "remember_backward",
            (grad, x, y, weight, group_weight, tables, relu, has_residual),
            launches.scratch,
            [launches.sums, launches.tables, launches.apply],
        )
    if total.dim() > 1:
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
    key = signature((x,), addresses_of((x,)))
    launch, tiling = _moments_alone(x.shape, x.is_contiguous(), x.device, dtype, key)
    moments_ = x.new_empty(images, tiling.parts, 2, channels, dtype=dtype)
    launch(current_stream(x.device), x, moments_, None, None, None)
    means, m2s = moments_.unbind(dim=2)
    counts = torch.full((tiling.parts,), tiling.part, dtype=dtype, device=x.device)
    counts[-1] = height * width - tiling.part * (tiling.parts - 1)
    share = (counts / (height * width)).view(1, -1, 1)
    mean = means[:, 0] + ((means - means[:, :1]) * share).sum(dim=1)
    m2 = m2s.sum(dim=1) / (height * width)
    return mean, m2 + ((means - mean.unsqueeze(1)).square() * share).sum(dim=1)


def standardize_forward(
    weights: Sequence[Tensor], eps: Sequence[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """See :mod:`.weight_standardization`."""
    compiled = extension()
    if compiled is not None:
        results = compiled.standardize(weights, eps, dtype)
        if results is not None:
            return results
    flat = _concatenated(weights)
    shapes = tuple([w.shape for w in weights])
    filters = _filters(shapes, flat.device)
    compute = torch.promote_types(flat.dtype, torch.float32)
    out = torch.empty(filters.room, dtype=dtype, device=flat.device)
    mean, rstd = torch.empty(2, filters.count, dtype=compute, device=flat.device).unbind()
    found = (filters.starts, filters.places, _eps_of_filters(tuple(eps), shapes, flat.device))
    tensors = (flat, out, mean, rstd, *found)
    launch = _launch_for_filters(kernels.standardize_kernel, filters.count, compute, tensors)
    if compiled is not None and launch.parts is not None:
        of_filters = (found, filters.rooms, filters.count, launch.parts)
        compiled.remember_standardize(sys.modules[__name__], weights, eps, dtype, *of_filters)
    return _divided(out, weights, filters.rooms, filters.rooms == filters.numel), mean, rstd


def standardize_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """See :mod:`.weight_standardization`."""
    compiled = extension()
    if compiled is not None:
        results = compiled.standardize_backward(grads, weights, mean, rstd)
        if results is not None:
            return results
    flat = _concatenated(weights)
    grads = [
        grad
        if grad.is_contiguous() and weight.is_contiguous() or grad.stride() == weight.stride()
        else torch.empty_like(weight).copy_(grad)
        for grad, weight in zip(grads, weights)
    ]
    filters = _filters(tuple([w.shape for w in weights]), flat.device)
    out = torch.empty_like(flat)
    tensors = (_concatenated(grads), flat, out, mean, rstd, filters.starts)
    kernel = kernels.standardize_backward_kernel
    launch = _launch_for_filters(kernel, filters.count, mean.dtype, tensors)
    if compiled is not None and launch.parts is not None:
        args = (grads, weights, mean, rstd, (filters.starts,), filters.numel, filters.count)
        compiled.remember_standardize_backward(sys.modules[__name__], *args, launch.parts)
    return _divided(out, weights, filters.numel, True)


def _launch_for_filters(
    kernel: Any, count: int, compute: torch.dtype, tensors: Tuple[Tensor, ...]
) -> Launch:
    """Launches a kernel with a program for each filter."""
    addresses, device = addresses_of(tensors), tensors[0].device
    launch = _filters_launch(kernel, count, device, compute, signature(tensors, addresses))
    launch(current_stream(device), *(addresses if launch.known else tensors))
    return launch


@lru_cache(maxsize=_REMEMBERED)
def _filters_launch(
    kernel: Any, count: int, device: torch.device, compute: torch.dtype, tensors: Tuple[Any, ...]
) -> Launch:
    return Launch(kernel, (count,), COMPUTE=_COMPUTE[compute], BLOCK=1024)


def _concatenated(weights: Sequence[Tensor]) -> Tensor:
    """All weights, each in its order in memory, in one row."""
    if all([w.is_contiguous() for w in weights]):
        return _flatten_dense_tensors(weights)
    return torch.cat([_row(w) for w in weights])


def _row(weight: Tensor) -> Tensor:
    if weight.is_contiguous():
        return weight.view(-1)
    order = sorted(range(weight.dim()), key=lambda i: (i != 0, -weight.stride(i)))
    return weight.permute(order).reshape(-1)


def _divided(
    flat: Tensor, weights: Sequence[Tensor], rooms: Tuple[int, ...], without_gaps: bool
) -> List[Tensor]:
    """The inverse of :func:`_concatenated`, where each weight lies at the start of its room."""
    if without_gaps and all([w.is_contiguous() for w in weights]):
        return list(_unflatten_dense_tensors(flat, weights))
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
        numel: of each weight.
        rooms: the elements that each weight has for itself there.
        room: those of all.
    """

    count: int
    starts: Tensor
    places: Tensor
    numel: Tuple[int, ...]
    rooms: Tuple[int, ...]
    room: int


@lru_cache(maxsize=None)
def _filters(shapes: Tuple[torch.Size, ...], device: torch.device) -> _Filters:
    filters = torch.tensor([shape[0] for shape in shapes])
    numel = torch.tensor([shape.numel() for shape in shapes])
    rooms = (numel + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    sizes = (numel // filters).repeat_interleave(filters)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    added = (rooms - numel).cumsum(0) - (rooms - numel)  # before each weight
    places = starts[:-1] + added.repeat_interleave(filters)
    lengths = (tuple(numel.tolist()), tuple(rooms.tolist()), int(rooms.sum()))
    return _Filters(len(sizes), starts.to(device), places.to(device), *lengths)


@lru_cache(maxsize=None)
def _eps_of_filters(
    eps: Tuple[float, ...], shapes: Tuple[torch.Size, ...], device: torch.device
) -> Tensor:
    values = torch.tensor(eps, dtype=torch.float64)
    return values.repeat_interleave(torch.tensor([shape[0] for shape in shapes])).to(device)
