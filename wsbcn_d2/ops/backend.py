"""Which kernels run: Triton's on GPUs, those in C on CPUs, plain PyTorch where there are none."""

import logging
import os
from functools import lru_cache
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from . import eager

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

BACKENDS = ("auto", "eager", "native", "triton")
_VARIABLE = "WSBCN_D2_BACKEND"

_chosen: Optional[str] = None


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
    _kernels_of_device.cache_clear()
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
    return "eager" if _triton_fails(device) else "triton"


def kernels_for(x: Tensor) -> ModuleType:
    """The module with the kernels for a tensor; :mod:`.batch_channel_norm` says what it has."""
    return _kernels_of_device(x.device)


def kernels_for_weight(weight: Tensor) -> ModuleType:
    """The same for the standardization of a weight: outside of CPUs PyTorch has a kernel for it."""
    return kernels_for(weight) if weight.device.type == "cpu" else eager


@lru_cache(maxsize=None)
def _kernels_of_device(device: torch.device) -> ModuleType:
    name = backend_name(device)
    if name == "native":
        from . import native_backend

        return native_backend
    if name == "triton":
        from . import triton_backend

        return triton_backend
    return eager


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@lru_cache(maxsize=None)
def _native_fails() -> bool:
    """Whether the kernels in C are not there; says so once."""
    from . import native_backend

    try:
        native_backend.library()
    except OSError as problem:
        _say_slower("Kernels in C", "cpu", problem)
        return True
    return False


@lru_cache(maxsize=None)
def _triton_fails(device: torch.device) -> bool:
    """Whether Triton cannot serve a device, found out by trying; says so once."""
    try:
        from . import triton_backend

        if device.type == "cpu" and not triton_backend.INTERPRETED:
            raise RuntimeError("it compiles for GPUs only")
        triton_backend.try_out(device)
    except Exception as problem:  # a missing package, compiler or driver, an old GPU, ...
        _say_slower("Triton", device.type, problem)
        return True
    return False


def _say_slower(what: str, device_type: str, problem: Exception) -> None:
    logger.warning(
        f"{what} cannot be used on {device_type}, so wsbcn_d2 runs in plain PyTorch there, which "
        f"needs more time: {type(problem).__name__}: {problem}"
    )
