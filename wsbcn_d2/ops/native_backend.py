"""The kernels in C (:file:`native_kernels.c`), for the CPU.

For batch-channel normalization plain PyTorch calls a hundred operations, nearly all of them on
tables, and reads and writes the activation for each of those that are not. These kernels are called
once for a pass and move what has to be moved. ``setup.py`` builds them where there is a compiler.
They are for float32, bfloat16 and float16; float64 is :mod:`.eager`'s, whose tables are the same.

Weight standardization takes 0.6 of the time of PyTorch's layer normalization: 37 ms instead of 61
for all filters of a step of the demo's R-18, by one thread.
"""

import ctypes
import struct
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import eager
from .estimates import pool_images, use_batch
from .memory_format import dense, in_format_of
from .normalization import Normalization
from .tables import new_tables, size_of_tables, split_tables, uses_batch_statistics

SAVES_ACTIVATED_OUTPUT = eager.SAVES_ACTIVATED_OUTPUT

_F32 = torch.float32
_DTYPES = {_F32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {"": 0, "relu": 1}
_OF_BATCH, _FIXED, _UPDATED = range(3)  # what to normalize by
_NO_MEMORY, _SKIPPED = -1, 1  # results

_KERNELS = (
    *("moments", "forward", "again", "backward", "backward_through_batch"),
    *("standardize", "standardize_backward"),
)

# The arguments of a kernel, as ``Pass`` of the source lays them out; see :func:`_call`.
_PASS = struct.Struct("@16P 3d 4q 5i 0q")


@lru_cache(maxsize=None)
def library() -> ctypes.CDLL:
    """The library with the kernels.

    Raises:
        OSError: if the installation did not build it, or built another version of it.
    """
    folder = Path(__file__).parent
    paths = [folder / f"native_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise OSError("they were not built when wsbcn_d2 was installed, for which see its log")
    loaded = ctypes.CDLL(str(path))
    if not all(hasattr(loaded, f"wsbcn_{name}") for name in ("size_of_pass", *_KERNELS)):
        raise OSError(f"{path} is none of this version: install wsbcn_d2 again")
    if loaded.wsbcn_size_of_pass() != _PASS.size:
        raise OSError(f"{path} is of another version: install wsbcn_d2 again")
    return loaded


def forward(
    x: Tensor, norm: Normalization, residual: Optional[Tensor], activation: str
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    written = (norm.running_mean, norm.running_var, norm.seen_elements)
    if not (_is_for_kernels(x) and all(t is None or _is_plain(t) for t in written)):
        return eager.forward(x, norm, residual, activation)
    x = dense(x)
    images, channels, height, width = x.shape
    groups, values = norm.group_weight.shape[0], images * height * width
    tables = new_tables(x, groups, norm.use_batch_statistics)
    y = torch.empty_like(x)
    statistics = _FIXED if norm.update_rate is None else _UPDATED
    if norm.use_batch_statistics:
        statistics = _OF_BATCH
        split = split_tables(tables, images, channels, groups)
        _call("moments", _layout(x, groups), x, tables=tables)
        batch = use_batch(norm, *pool_images(split.m, split.v), values, split.count)
        torch.stack(batch, out=tables[: 2 * channels].view(2, channels))
    result = _call(
        "forward",
        _layout(x, groups),
        x,
        residual=None if residual is None else in_format_of(x, residual.to(x.dtype)),
        y=y,
        tables=tables,
        weight=_floats(norm.weight),
        bias=_floats(norm.bias),
        group_weight=_floats(norm.group_weight),
        group_bias=_floats(norm.group_bias),
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        seen_elements=norm.seen_elements,
        rate=norm.update_rate or 0.0,
        eps=norm.eps,
        statistics=statistics,
        activation=activation,
    )
    if result == _SKIPPED and norm.skipped_updates is not None:
        norm.skipped_updates.add_(1)
    return y, tables


def again(x: Tensor, tables: Tensor, groups: int, activation: str) -> Tensor:
    """See :mod:`.batch_channel_norm`."""
    if not _is_for_kernels(x):
        return eager.again(x, tables, groups, activation)
    x = dense(x)
    y = torch.empty_like(x)
    _call("again", _layout(x, groups), x, y=y, tables=tables, activation=activation)
    return y


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
    if not _is_for_kernels(x):
        return eager.backward(
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
    x = dense(x)
    images, channels = x.shape[:2]
    groups = group_weight.shape[0]
    reads_y = bool(activation) and has_residual
    of_batch = uses_batch_statistics(tables, x, groups)
    grad_residual = torch.empty_like(x) if reads_y else None
    arguments: Dict[str, Any] = {
        "grad": _gradient(grad, x),
        "y": in_format_of(x, cast(Tensor, y)) if reads_y else None,
        "grad_x": torch.empty_like(x),
        "grad_residual": grad_residual,
        "tables": tables,
        "scratch": tables.new_empty(images * (4 * channels + 2 * groups)),
        "parameters": tables.new_empty(2 * (channels + groups)),
        "weight": _floats(weight),
        "group_weight": _floats(group_weight),
        "activation": activation,
        "statistics": _OF_BATCH if of_batch else _FIXED,
    }
    layout = _layout(x, groups)
    _call("backward", layout, x, **arguments)
    parameters = arguments["parameters"]
    if of_batch:
        sums = parameters
        if synchronize:
            sums = parameters[: 2 * channels].view(2, channels).clone()  # as of an empty rank
            dist.all_reduce(sums)
        arguments.update(parameters=sums, count=float(tables[-1].clamp(min=1)))
        _call("backward_through_batch", layout, x, **arguments)
    return arguments["grad_x"], grad_residual, parameters


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    if not _is_for_kernels(x):
        return eager.moments(x)
    x = dense(x)
    tables = new_tables(x, 1, False)
    _call("moments", _layout(x, 1), x, tables=tables)
    split = split_tables(tables, x.shape[0], x.shape[1], 1)
    return split.m, split.v


def standardize(weight: Tensor, eps: float) -> Tuple[Tensor, Any]:
    """See :mod:`.standardized_convolution`."""
    if weight.dtype != _F32 or not weight.numel():
        return eager.standardize(weight, eps)
    weight = dense(weight)
    filters = torch.empty_like(weight)
    tables = weight.new_empty(size_of_tables(1, weight.shape[0], 1))
    _call("standardize", _layout_of_filters(weight), weight, y=filters, tables=tables, eps=eps)
    return filters, tables


def standardize_backward(grad: Tensor, weight: Tensor, statistics: Any) -> Tensor:
    """See :mod:`.standardized_convolution`."""
    if weight.dtype != _F32 or not weight.numel():
        return eager.standardize_backward(grad, weight, statistics)
    weight = dense(weight)
    grad = _gradient(grad, weight)
    layout = _layout_of_filters(weight)
    _call("standardize_backward", layout, weight, grad=grad, grad_x=grad, tables=statistics)
    return grad


def _is_for_kernels(x: Tensor) -> bool:
    return x.dtype in _DTYPES and x.numel() > 0


def _is_plain(table: Tensor) -> bool:
    return table.dtype == _F32 and table.is_contiguous()


def _floats(parameter: Tensor) -> Tensor:
    # Three calls less for each that is.
    return parameter if _is_plain(parameter) else parameter.detach().float().contiguous()


def _gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a dense tensor, as kernels read it.

    Raises:
        RuntimeError: if it is zeros that PyTorch only pretends to have, as it does for gradients.
    """
    grad = in_format_of(x, grad.to(x.dtype))
    if not grad.data_ptr():
        raise RuntimeError("a gradient without memory has no values to compute with")
    return grad


def _layout(x: Tensor, groups: int) -> Tuple[int, ...]:
    """How a dense activation lies in memory, for :func:`_call`."""
    images, channels, height, width = x.shape
    return images, channels, groups, height * width, _DTYPES[x.dtype], not x.is_contiguous()


def _layout_of_filters(weight: Tensor) -> Tuple[int, ...]:
    """The same of a weight: one image, of which each filter is a plane, in any format."""
    channels = weight.shape[0]
    return 1, channels, 1, weight.numel() // channels, _DTYPES[_F32], False


def _call(
    kernel: str,
    layout: Tuple[int, ...],
    x: Tensor,
    *,
    residual: Optional[Tensor] = None,
    grad: Optional[Tensor] = None,
    y: Optional[Tensor] = None,
    grad_x: Optional[Tensor] = None,
    grad_residual: Optional[Tensor] = None,
    tables: Optional[Tensor] = None,
    scratch: Optional[Tensor] = None,
    parameters: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    group_weight: Optional[Tensor] = None,
    group_bias: Optional[Tensor] = None,
    running_mean: Optional[Tensor] = None,
    running_var: Optional[Tensor] = None,
    seen_elements: Optional[Tensor] = None,
    rate: float = 0.0,
    eps: float = 0.0,
    count: float = 0.0,
    activation: str = "",
    statistics: int = _OF_BATCH,
) -> int:
    """Calls a kernel; the source says what the arguments are."""
    tensors = (
        *(x, residual, grad, y, grad_x, grad_residual, tables, scratch, parameters),
        *(weight, bias, group_weight, group_bias, running_mean, running_var, seen_elements),
    )
    result = getattr(library(), "wsbcn_" + kernel)(
        # Not a ctypes.Structure: with names 2.8 us, of the 40 us that a forward pass of
        # 1x256x13x21 takes, where this takes 0.4.
        _PASS.pack(
            *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
            *(rate, eps, count),
            *layout,
            *(_ACTIVATIONS[activation], statistics, torch.get_num_threads()),
        )
    )
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory for the tables of an activation of shape {tuple(x.shape)}")
    return result
