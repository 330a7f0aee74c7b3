"""The compiled kernels for the CPU: :file:`native_kernels.c`, compiled when first needed.

Installing compiles nothing. The C compiler of the machine, which Triton needs as well, makes a
library of a few kilobytes in about a second, and other processes find it in the user's cache.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import List

_SOURCE = Path(__file__).with_name("native_kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-O3",
    "-fopenmp",
    # The same rounding wherever a formula stands, see the source.
    "-ffp-contract=off",
    # Allow vectors; nothing here depends on what they give up.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_TIMEOUT = 300  # seconds

_POINTER, _SIZE, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SHAPE = [_SIZE] * 4 + [_INT]  # images, channels, groups, pixels, threads
_ARGUMENTS = {
    "wsbcn_moments": [_POINTER] * 3 + [_SIZE] * 4 + [_INT],
    "wsbcn_forward": [_POINTER] * 11 + [_DOUBLE] * 2 + [_INT] * 2 + _SHAPE,
    "wsbcn_again": [_POINTER] * 3 + [_INT, *_SHAPE],
    "wsbcn_backward": [_POINTER] * 10 + [_INT, *_SHAPE],
    "wsbcn_backward_through_batch": [_POINTER] * 8 + [_DOUBLE, _INT, *_SHAPE],
}


@lru_cache(maxsize=None)
def library() -> ctypes.CDLL:
    """The library with the kernels, compiled if no process of this user has done so before.

    Raises:
        RuntimeError: if there is no compiler, or if it fails.
        OSError: if the library cannot be written or loaded.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *_flags_of_machine()]
    # A home directory may be shared by machines that differ.
    parts = [_SOURCE.read_text(), compiler, _version_of(compiler), *flags, _instructions()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    path = _cache() / f"native_kernels_{key}.so"
    if not path.exists():
        _compile(compiler, flags, path)
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = _INT if name == "wsbcn_forward" else None
    return loaded


def _compiler() -> str:
    """``CC``, or else the first that there is."""
    names = [os.environ["CC"]] if os.environ.get("CC") else _COMPILERS
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise RuntimeError(f"there is no C compiler ({', '.join(names)})")


def _version_of(compiler: str) -> str:
    return _run([compiler, "--version"])


def _flags_of_machine() -> List[str]:
    """What makes the compiler use all instructions of this processor."""
    return ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else []


def _instructions() -> str:
    """The instructions that this processor has, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() + platform.node()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> Path:
    """Where libraries are kept: the user's cache, or a directory of this process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "wsbcn_d2"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="wsbcn_d2_"))


def _compile(compiler: str, flags: List[str], path: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        _run([compiler, *flags, str(_SOURCE), "-o", temporary, "-lm"])
        os.replace(temporary, path)  # whole, or not at all, for other processes
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: List[str]) -> str:
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT,
    )
    if result.returncode:
        lines = result.stdout.strip().splitlines() or ["no output"]
        raise RuntimeError(f"{command[0]} failed with status {result.returncode}: {lines[-1]}")
    return result.stdout
