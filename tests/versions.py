"""What some of the versions of PyTorch, Triton and Detectron2 cannot do: marks for tests."""

import importlib.util
import inspect
import shutil

import pytest
import torch
from detectron2.engine import launch

from wsbcn_d2.ops import native_backend

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def _compiles():
    try:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    except RuntimeError:  # not supported with this Python
        return False
    return True


def _interprets():
    try:
        return importlib.util.find_spec("triton.runtime.interpreter") is not None
    except ImportError:
        return False


needs_compile = pytest.mark.skipif(
    not _compiles(), reason="this PyTorch has no torch.compile for this Python"
)
needs_opcheck = pytest.mark.skipif(
    not hasattr(torch.library, "opcheck"), reason="this PyTorch has no torch.library.opcheck"
)
needs_cpu_processes = pytest.mark.skipif(
    "cuda is not available" in inspect.getsource(inspect.getmodule(launch)),
    reason="this Detectron2 starts several processes on GPUs only",
)
KEEPS_NO_FILTERS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
keeps_no_filters = pytest.mark.skipif(
    not KEEPS_NO_FILTERS,
    reason="this PyTorch does not tell whether something else decides what graphs keep",
)
needs_assign = pytest.mark.skipif(
    TORCH < (2, 1), reason="load_state_dict of PyTorch 2.0 does not assign"
)
CPU_HAS_HALF = TORCH >= (2, 1)
needs_cpu_half = pytest.mark.skipif(
    not CPU_HAS_HALF, reason="PyTorch 2.0 does not have all operations in float16 on a CPU"
)
TRITON_INTERPRETS = _interprets()
needs_c_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"
)
needs_extension = pytest.mark.skipif(
    TORCH < (2, 1) or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="there is no C++ compiler, or this PyTorch is too old for the extension",
)


def _has_native_kernels():
    try:
        native_backend.library()
    except OSError:
        return False
    return True


needs_native_kernels = pytest.mark.skipif(
    not _has_native_kernels(), reason="the kernels in C were not built with the installation"
)
