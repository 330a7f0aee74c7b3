"""What is compiled where it runs, when it is first needed: installing compiles nothing.

Later processes find the result in the user's cache (``$XDG_CACHE_HOME/wsbcn_d2``, by default
``~/.cache/wsbcn_d2``).
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

_TIMEOUT = 300  # seconds

Loaded = TypeVar("Loaded")


class Program(NamedTuple):
    """What becomes a shared library.

    Attributes:
        source: the file with it.
        language: its name, for messages.
        variable, compilers: the environment variable that chooses a compiler, and the commands that
            are tried without it.
        flags: options before the source.
        libraries: options after it.
        depends_on: what else the result depends on, in words.
    """

    source: Path
    language: str
    variable: str
    compilers: Tuple[str, ...]
    flags: Tuple[str, ...]
    libraries: Tuple[str, ...] = ()
    depends_on: Tuple[str, ...] = ()


def cached(
    program: Program, load: Callable[[Path], Loaded], announce: Optional[Callable[[], None]] = None
) -> Loaded:
    """The library of a program, compiled if the user's cache does not have it.

    Args:
        load: loads a library; OSError, ImportError and AttributeError say that a file is damaged.
        announce: called before something is compiled that takes long, which is for one process at a
            time. None: it takes a moment, and where nothing can be cached is done each time.

    Raises:
        RuntimeError: if there is no compiler, or if it fails.
        OSError: if the library cannot be written or loaded.
        subprocess.TimeoutExpired: if the compiler does not come to an end.
    """
    compiler = _compiler(program)
    # A home directory may be shared by machines that differ.
    parts = [program.source.read_text(), *compiler, _run([*compiler, "--version"]), *program.flags]
    parts += [*program.libraries, *program.depends_on, _instructions()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    name = f"{program.source.stem}_{key}.so"
    cache = _cache()
    if cache is not None:
        try:
            return load(cache / name)
        except (OSError, ImportError, AttributeError):  # it is not there, or damaged
            pass
    if announce is not None:
        return _compile_once(program, compiler, cache, name, load, announce)
    if cache is not None:
        try:
            return _compile(program, compiler, cache / name, load)
        except OSError:  # nothing can be written there, or loaded from there
            pass
    with tempfile.TemporaryDirectory(prefix="wsbcn_d2_") as folder:
        return _compile(program, compiler, Path(folder) / name, load)


def _compile_once(
    program: Program,
    compiler: Sequence[str],
    cache: Optional[Path],
    name: str,
    load: Callable[[Path], Loaded],
    announce: Callable[[], None],
) -> Loaded:
    if cache is None:
        raise OSError("there is no folder to keep what takes long to compile")
    failure = cache / f"{name}.failed"
    begin = time.time()
    with _turn(cache / f"{name}.lock"):
        try:  # another process has been first
            return load(cache / name)
        except (OSError, ImportError, AttributeError):
            if failure.exists() and failure.stat().st_mtime >= begin:  # while this one waited
                raise RuntimeError(failure.read_text()) from None
        announce()
        try:
            return _compile(program, compiler, cache / name, load)
        except Exception as problem:
            failure.write_text(str(problem))
            raise


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Context for one process at a time, where the file system has locks; the others wait."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process ends
        yield


def _compiler(program: Program) -> List[str]:
    """The command: that of the environment variable, or else the first compiler that there is."""
    chosen = os.environ.get(program.variable, "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [[name] for name in program.compilers]
    except ValueError as problem:
        raise RuntimeError(f"{program.variable}={chosen} is not a command: {problem}") from None
    for command in commands:
        if shutil.which(command[0]) is not None:
            return command
    tried = ", ".join(command[0] for command in commands)
    raise RuntimeError(f"there is no {program.language} compiler ({tried})")


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


def _compile(
    program: Program, compiler: Sequence[str], path: Path, load: Callable[[Path], Loaded]
) -> Loaded:
    """Compiles the library, loads it and, as that has worked, writes it to ``path``."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [*compiler, *program.flags, str(program.source), "-o", temporary]
        _run([*command, *program.libraries])
        loaded = load(Path(temporary))
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
