"""The kernels in C (:file:`native_kernels.c`), for the CPU.

For batch-channel normalization plain PyTorch calls a hundred operations, nearly all of them on
tables, and reads and writes the activation for each of those that are not. These kernels are called
once for a pass and move what has to be moved. ``setup.py`` builds them where there is a compiler.
They are for float32, bfloat16 and float16; float64 is :mod:`.eager`'s, whose tables are the same.

Weight standardization takes 28 ms of a step of 267 ms (the demo's R-18, 192 pixels, one thread),
and 35 ms with the layer normalization of PyTorch.
"""

import ctypes
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, cast

import torch
from torch import Tensor

from . import eager
from .estimates import pool_images, sum_over_ranks, use_batch
from .memory_format import dense, in_format_of
from .normalization import Normalization
from .tables import new_tables, split_tables, uses_batch_statistics

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

_POINTERS = (
    "x residual grad y grad_x grad_residual tables scratch parameters weight bias group_weight "
    "group_bias running_mean running_var seen_elements"
)


class _Pass(ctypes.Structure):
    """The arguments of a kernel; see the source for what they are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_double) for name in "rate eps count".split()),
        *((name, ctypes.c_int64) for name in "images channels groups pixels".split()),
        *(
            (name, ctypes.c_int32)
            for name in "dtype channels_last activation statistics threads".split()
        ),
    ]


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
    if loaded.wsbcn_size_of_pass() != ctypes.sizeof(_Pass):
        raise OSError(f"{path} is of another version: install wsbcn_d2 again")
    return loaded


def forward(
    x: Tensor, norm: Normalization, residual: Optional[Tensor], activation: str
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    estimates = (norm.running_mean, norm.running_var)
    if not (_is_for_kernels(x) and all(t.dtype == _F32 and t.is_contiguous() for t in estimates)):
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
        _call("moments", x, groups, tables=tables)
        batch = use_batch(norm, *pool_images(split.m, split.v), values, split.count)
        torch.stack(batch, out=tables[: 2 * channels].view(2, channels))
    result = _call(
        "forward",
        x,
        groups,
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
        activation=_ACTIVATIONS[activation],
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
    _call("again", x, groups, y=y, tables=tables, activation=_ACTIVATIONS[activation])
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
        "grad": in_format_of(x, grad.to(x.dtype)),
        "y": in_format_of(x, cast(Tensor, y)) if reads_y else None,
        "grad_x": torch.empty_like(x),
        "grad_residual": grad_residual,
        "tables": tables,
        "scratch": tables.new_empty(images * (4 * channels + 2 * groups)),
        "parameters": tables.new_empty(2 * (channels + groups)),
        "weight": _floats(weight),
        "group_weight": _floats(group_weight),
        "activation": _ACTIVATIONS[activation],
        "statistics": _OF_BATCH if of_batch else _FIXED,
    }
    _call("backward", x, groups, **arguments)
    parameters = arguments["parameters"]
    if of_batch:
        sums = parameters
        if synchronize:
            of_weight, of_bias = parameters[: 2 * channels].split(channels)
            sums = torch.cat(sum_over_ranks(of_weight, of_bias))
        arguments.update(parameters=sums, count=float(tables[-1].clamp(min=1)))
        _call("backward_through_batch", x, groups, **arguments)
    return arguments["grad_x"], grad_residual, parameters


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    if not _is_for_kernels(x):
        return eager.moments(x)
    x = dense(x)
    tables = new_tables(x, 1, False)
    _call("moments", x, 1, tables=tables)
    split = split_tables(tables, x.shape[0], x.shape[1], 1)
    return split.m, split.v


def standardize(weight: Tensor, eps: float) -> Tuple[Tensor, Any]:
    """See :mod:`.standardized_convolution`."""
    if not (_is_for_kernels(weight) and weight.dtype == _F32):
        return eager.standardize(weight, eps)
    weight = dense(weight)
    filters, x = torch.empty_like(weight), _as_planes(weight)
    tables = new_tables(x, 1, False)
    _call("standardize", x, 1, y=filters, tables=tables, eps=float(eps))
    return filters, tables


def standardize_backward(grad: Tensor, weight: Tensor, statistics: Any) -> Tensor:
    """See :mod:`.standardized_convolution`."""
    if not (_is_for_kernels(weight) and weight.dtype == _F32):
        return eager.standardize_backward(grad, weight, statistics)
    weight = dense(weight)
    grad = in_format_of(weight, grad.to(_F32))
    _call("standardize_backward", _as_planes(weight), 1, grad=grad, grad_x=grad, tables=statistics)
    return grad


def _as_planes(weight: Tensor) -> Tensor:
    """Filters as the planes of one image, (1, C_out, values, 1)."""
    return eager.rows(weight, weight)[None, :, :, None]


def _is_for_kernels(x: Tensor) -> bool:
    library()
    return x.dtype in _DTYPES and x.numel() > 0


def _floats(parameter: Tensor) -> Tensor:
    if parameter.dtype == _F32 and parameter.is_contiguous():  # three calls less for each
        return parameter
    return parameter.detach().float().contiguous()


def _address_of(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():  # zeros that PyTorch only pretends to have
        raise RuntimeError("a tensor without memory has no values to compute with")
    return address


def _call(kernel: str, x: Tensor, groups: int, **arguments: Any) -> int:
    """Calls a kernel for a dense activation, with arguments by the names of :class:`_Pass`."""
    images, channels, height, width = x.shape
    values = {
        name: _address_of(value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if value is not None
    }
    result = getattr(library(), "wsbcn_" + kernel)(
        ctypes.byref(
            _Pass(
                x=_address_of(x),
                images=images,
                channels=channels,
                groups=groups,
                pixels=height * width,
                dtype=_DTYPES[x.dtype],
                channels_last=not x.is_contiguous(),
                threads=torch.get_num_threads(),
                **values,
            )
        )
    )
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory for the tables of an activation of shape {tuple(x.shape)}")
    return result
