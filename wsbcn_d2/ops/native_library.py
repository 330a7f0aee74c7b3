"""The compiled kernels for the CPU: :file:`native_kernels.c`, compiled when first needed.

Installing compiles nothing. The C compiler of the machine, which Triton needs as well, makes a
small library in one or two seconds, and later processes find it in the user's cache
(``$XDG_CACHE_HOME/wsbcn_d2``, by default ``~/.cache/wsbcn_d2``). ``CC`` chooses another compiler.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import List, Optional

_SOURCE = Path(__file__).with_name("native_kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
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
_TIMEOUT = 300  # seconds

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
    """The library with the kernels, compiled if the user's cache does not have it.

    Raises:
        RuntimeError: if there is no compiler, or if it fails.
        OSError: if the library cannot be written or loaded.
        subprocess.TimeoutExpired: if the compiler does not come to an end.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *_flags_of_machine()]
    # A home directory may be shared by machines that differ.
    parts = [_SOURCE.read_text(), *compiler, _run([*compiler, "--version"]), *flags]
    key = hashlib.sha256("\n".join([*parts, _instructions()]).encode()).hexdigest()[:32]
    name = f"native_kernels_{key}.so"
    cache = _cache()
    if cache is not None:
        try:
            return _load(cache / name)
        except (OSError, AttributeError):  # it is not there, or damaged
            pass
        try:
            return _compile(compiler, flags, cache / name)
        except OSError:  # nothing can be written there, or loaded from there
            pass
    with tempfile.TemporaryDirectory(prefix="wsbcn_d2_") as folder:
        return _compile(compiler, flags, Path(folder) / name)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = _INT if name == "wsbcn_forward" else None
    return loaded


def _compiler() -> List[str]:
    """The command: ``CC``, or else the first compiler that there is."""
    chosen = os.environ.get("CC", "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [[name] for name in _COMPILERS]
    except ValueError as problem:
        raise RuntimeError(f"CC={chosen} is not a command: {problem}") from None
    for command in commands:
        if shutil.which(command[0]) is not None:
            return command
    raise RuntimeError(f"there is no C compiler ({', '.join(c[0] for c in commands)})")


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


def _cache() -> Optional[Path]:
    """The folder in the user's cache; None if there is none, or others can write to it, who would
    decide what is run here."""
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsbcn_d2"
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError):  # the latter if there is no home
        return None
    ours = status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022
    return path if ours else None


def _compile(compiler: List[str], flags: List[str], path: Path) -> ctypes.CDLL:
    """Compiles the library, loads it and, as that has worked, writes it to ``path``."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        _run([*compiler, *flags, str(_SOURCE), "-o", temporary, "-lm"])
        loaded = _load(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # as loading half a library would end the process
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)  # whole, or not at all, for other processes
    finally:
        Path(temporary).unlink(missing_ok=True)
    return loaded


def _run(command: List[str]) -> str:
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_TIMEOUT,
    )
    if result.returncode:
        lines = result.stdout.strip().splitlines() or ["no output"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{command[0]} failed with status {result.returncode}: {reason}")
    return result.stdout
