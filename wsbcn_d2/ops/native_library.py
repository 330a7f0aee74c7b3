"""The compiled kernels for the CPU: :file:`native_kernels.c`, compiled when first needed.

The C compiler of the machine, which Triton needs as well, makes a small library in one or two
seconds (:mod:`.compiler`). ``CC`` chooses another compiler.
"""

import ctypes
import platform
from functools import lru_cache
from pathlib import Path
from typing import List

from .compiler import Program, cached

_FLAGS = (
    "-std=gnu99",
    "-O3",
    "-fopenmp",
    # The same rounding wherever a formula stands, see the source.
    "-ffp-contract=off",
    # What these give up is not used, and loops become instructions for many values.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)

_POINTER, _SIZE, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SHAPE = [_SIZE] * 4 + [_INT]  # images, channels, groups, pixels, threads
_ARGUMENTS = {
    "wsbcn_moments": [_POINTER] * 3 + [_SIZE] * 4 + [_INT],
    "wsbcn_forward": [_POINTER] * 11 + [_DOUBLE] * 2 + [_INT] * 2 + _SHAPE,
    "wsbcn_again": [_POINTER] * 3 + [_INT, *_SHAPE],
    "wsbcn_backward": [_POINTER] * 10 + [_INT, *_SHAPE],
    "wsbcn_backward_through_batch": [_POINTER] * 8 + [_DOUBLE, _INT, *_SHAPE],
    "wsbcn_standardize": [_POINTER] * 4 + [_DOUBLE, _SIZE, _SIZE, _INT],
    "wsbcn_standardize_backward": [_POINTER] * 5 + [_SIZE, _SIZE, _INT],
}


@lru_cache(maxsize=None)
def library() -> ctypes.CDLL:
    """The library with the kernels; raises what :func:`.compiler.cached` does."""
    program = Program(
        Path(__file__).with_name("native_kernels.c"),
        language="C",
        variable="CC",
        compilers=("cc", "gcc", "clang"),
        flags=(*_FLAGS, *_flags_of_machine()),
        libraries=("-lm",),
    )
    return cached(program, _load)


def kernel_addresses(*names: str) -> List[int]:
    """Where kernels of the library begin."""
    return [ctypes.cast(getattr(library(), name), ctypes.c_void_p).value for name in names]


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = _INT if name == "wsbcn_forward" else None
    return loaded


def _flags_of_machine() -> List[str]:
    """What makes the compiler use all instructions of this processor."""
    return ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else []
