"""Which kernels run: Triton's on GPUs, compiled C on CPUs, plain PyTorch where those do not."""

import logging
import os
from functools import lru_cache
from types import ModuleType
from typing import Any, Callable, Dict, Optional

import torch
from torch import Tensor

from . import eager

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

BACKENDS = ("auto", "eager", "native", "triton")
_VARIABLE = "WSBCN_D2_BACKEND"

_chosen: Optional[str] = None
# Those found for devices, which is asked for at every call of a layer.
_kernels: Dict[torch.device, ModuleType] = {}


def set_backend(name: Optional[str]) -> None:
    """Chooses the kernels of this process.

    Args:
        name: ``"auto"``: Triton for tensors on a GPU and C for those on the CPU, each where it
            works, and plain PyTorch otherwise. ``"eager"``: plain PyTorch. ``"native"``: as
            "auto", without Triton. ``"triton"``: as "auto", but for tensors on the CPU Triton's
            interpreter (``TRITON_INTERPRET=1``, for debugging) or plain PyTorch.
            None: what the environment variable ``WSBCN_D2_BACKEND`` says, or else "auto", which is
            how a process starts.

    Raises:
        ValueError: if the name is none of these.
    """
    global _chosen
    _kernels.clear()
    _chosen = None if name is None else _checked(name, "the backend")


def backend_name(device: Optional[torch.device] = None) -> str:
    """The kernels in use for tensors on ``device``: ``"eager"``, ``"native"`` or ``"triton"``.

    Args:
        device: default: the current GPU if there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = _chosen or _checked(os.environ.get(_VARIABLE) or "auto", _VARIABLE)
    if device.type == "cpu" and choice in ("auto", "native"):
        return "eager" if _native_fails() else "native"
    if device.type not in ("cpu", "cuda") or choice not in ("auto", "triton"):
        return "eager"
    return "eager" if _triton_fails(device.type, device.index) else "triton"


def kernels_for(x: Tensor) -> ModuleType:
    """The module with the kernels for a tensor: :mod:`.eager`, :mod:`.native_backend` or
    :mod:`.triton_backend`."""
    device = x.device
    kernels = _kernels.get(device)
    if kernels is None:
        name = backend_name(device)
        if name == "native":
            from . import native_backend as kernels
        elif name == "triton":
            from . import triton_backend as kernels
        else:
            kernels = eager
        _kernels[device] = kernels
    return kernels


def call_on_device_of(x: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with the device of a tensor as the current one: where Triton launches."""
    if x.is_cuda and x.device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(x.device):
            return function(*args)
    return function(*args)


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@lru_cache(maxsize=None)
def _native_fails() -> bool:
    """Whether the kernels in C cannot serve, found out by trying; says so once."""
    try:
        from . import native_backend

        native_backend.try_out()
    except Exception as problem:  # no compiler, no place to write to, ...
        _say_slower("Kernels in C", "cpu", problem)
        return True
    return False


@lru_cache(maxsize=None)
def _triton_fails(device_type: str, device_index: Optional[int]) -> bool:
    """Whether Triton cannot serve a device, found out by trying; says so once."""
    try:
        from . import triton_backend

        if device_type == "cpu" and not triton_backend.INTERPRETED:
            raise RuntimeError("it compiles for GPUs only")
        device = torch.device(device_type, device_index)
        # Triton launches on the current device, which need not be that of the tensor.
        with torch.cuda.device(device if device_type == "cuda" else -1):
            triton_backend.try_out(device)
    except Exception as problem:  # a missing package, compiler or driver, an old GPU, ...
        _say_slower("Triton", device_type, problem)
        return True
    return False


def _say_slower(what: str, device_type: str, problem: Exception) -> None:
    logger.warning(
        f"{what} cannot be used on {device_type}, so BCN and WS run in plain PyTorch there, "
        f"which needs more time: {type(problem).__name__}: {problem}"
    )
