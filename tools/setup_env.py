#!/usr/bin/env python3
"""Makes the virtual environment of the Makefile's commands; run again, completes or updates it.

    python3.12 tools/setup_env.py --venv .venv

If the Python that runs it has Detectron2, the environment uses that and everything beside it, and
gets only what is missing. Else PyTorch, Detectron2's wheel and what they need are installed, in
the versions of constraints.txt. The project itself is installed in place, with its extras.

It runs before anything is installed, so it uses the standard library only.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
DETECTRON2 = ROOT / "requirements" / "detectron2.txt"
DETECTRON2_NEEDS = ROOT / "requirements" / "detectron2-needs.txt"
# The environment is brought up to date when one of these changes.
SOURCES = [
    CONSTRAINTS,
    DETECTRON2,
    DETECTRON2_NEEDS,
    ROOT / "pyproject.toml",
    ROOT / "setup.py",
    ROOT / "wsbcn_d2" / "ops" / "native_kernels.c",
    ROOT / "wsbcn_d2" / "version.py",
    Path(__file__).resolve(),
]
EXTRAS = ("digits", "safetensors", "test", "dev")
OLDEST, NEWEST = (3, 10), (3, 12)
HEARTBEAT_SECONDS = 10


class SetupError(Exception):
    """Something that the user has to know and to change."""


class State(NamedTuple):
    """What is known of an environment."""

    interpreter: str  # which Python made it: where it is installed, and its version
    python: str  # its path
    sources: Optional[str]  # the digest of what was installed; None until all of it is


class Environment:
    """A virtual environment that this script makes.

    Its state is a file inside of it, written before anything else is done and after all is done,
    so that an interrupted set-up is noticed and a foreign environment is never touched.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.log = path / "setup.log"
        self.held = path / "held.txt"
        self._state = path / "setup_env.json"

    def state(self) -> Optional[State]:
        """Returns None if there is no environment; raises if there is one of somebody else."""
        if self._state.exists():
            return State(**json.loads(self._state.read_text()))
        if self.path.exists() and any(self.path.iterdir()):
            raise SetupError(
                f"{self.path} is there but was not made by this script. Remove it, or name another "
                "folder: make VENV=.venv-wsbcn ..."
            )
        return None

    def set_state(self, state: State) -> None:
        """Written to another file first, so that it cannot be half-written either."""
        new = self._state.with_suffix(".new")
        new.write_text(json.dumps(state._asdict()))
        new.replace(self._state)

    def site_packages(self) -> Path:
        """Where packages are installed in it."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        output = subprocess.run(
            [self.python, "-c", code], check=True, stdout=subprocess.PIPE, universal_newlines=True
        ).stdout
        return Path(output.strip())

    def run(self, task: str, command: List[str]) -> None:
        """Runs a command with its output in the log, and says now and then how far it is."""
        print(f"  {task} ...", flush=True)
        start = time.monotonic()
        environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0"}
        with open(self.log, "ab") as log:
            with subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT
            ) as process:
                while True:
                    try:
                        process.wait(HEARTBEAT_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        seconds = round(time.monotonic() - start)
                        print(f"    {seconds:3d} s  {self._log_lines()[-1][:80]}", flush=True)
        if process.returncode:
            print("\n".join(self._log_lines()[-15:]), file=sys.stderr)
            raise SetupError(f"this failed: {task}. All that was printed is in {self.log}")

    def pip_install(self, task: str, *arguments: str) -> None:
        # Byte code is left to the first import: most of PyTorch's is never needed.
        options = ["--no-compile", "--progress-bar", "off"]
        self.run(task, [str(self.python), "-m", "pip", "install", *options, *arguments])

    def _log_lines(self) -> List[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip() and "WARNING" not in line] or [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="default: %(default)s")
    parser.add_argument(
        "--keep-python",
        action="store_true",
        help="keep an environment that another Python made, instead of making it again with this",
    )
    args = parser.parse_args()
    environment = Environment(Path(os.path.abspath(args.venv)))
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make demo` and `make test` may be started together
        set_up(environment, args.keep_python)


def set_up(environment: Environment, keep_python: bool) -> None:
    """Makes the environment, completes it or brings it up to date; if it is, does nothing."""
    this = State(f"{sys.prefix} {sys.version.split()[0]}", sys.executable, sources_digest())
    state = environment.state()
    keep_python = keep_python or Path(sys.prefix) == environment.path  # if activated, this is its
    if (
        state is not None
        and state.sources is not None
        and (keep_python or state.interpreter == this.interpreter)
        and environment.python.exists()  # not so if the Python that it links to was removed
    ):
        if state.sources == this.sources:
            return
        print(f"Bringing {environment.path} up to date", flush=True)
        this = state._replace(sources=this.sources)
        environment.set_state(this._replace(sources=None))
    else:
        if state is not None and keep_python and sys.executable != state.python:
            if Path(state.python).exists():
                os.execv(state.python, [state.python, *sys.argv])
        check_python()
        if state is not None:
            print(f"Removing {environment.path}: unfinished, or of another Python", flush=True)
            shutil.rmtree(environment.path)
        print(f"Setting up {environment.path} with Python {sys.version.split()[0]}", flush=True)
        environment.path.mkdir(parents=True, exist_ok=True)
        environment.set_state(this._replace(sources=None))
        make_venv(environment)
    start = time.monotonic()
    install(environment)
    environment.set_state(this)
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def sources_digest() -> str:
    """Changes with the requirements, and with the place of the checkout, where the project runs."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_python() -> None:
    """Raises if the tested set does not exist for this Python."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(
            f"Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} is needed, but "
            f"{sys.executable} is {sys.version.split()[0]}. Name another one: "
            "make PYTHON=python3.12 ..."
        )


def make_venv(environment: Environment) -> None:
    """Makes it, and finds out whether it can use the Detectron2 of this Python."""
    has_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(environment.path, with_pip=has_pip, symlinks=True)
    site_packages = environment.site_packages()
    if not has_pip:  # Debian has it in a package of its own
        environment.run(
            "installing pip",
            [sys.executable, "-m", "pip", "install", "--target", str(site_packages), "pip"],
        )
    if importlib.util.find_spec("detectron2") is not None:
        use_existing(environment, site_packages)


def use_existing(environment: Environment, site_packages: Path) -> None:
    """Makes the packages of this Python visible in the environment, and holds their versions; not
    so if its Detectron2 does not work there."""
    from importlib import metadata  # newer than the oldest Python that gets an error message

    # Not --system-site-packages, which means the system's even if this Python is of an environment.
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    links = site_packages / "detectron2_environment.pth"
    links.write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in folders))
    result = subprocess.run(
        [
            str(environment.python),
            "-c",
            "import torch, torchvision, detectron2.modeling; print(detectron2.__file__)",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    output = (result.stdout.splitlines() or ["it ends Python"])[-1]
    if result.returncode:
        print(f"  not using the Detectron2 of {sys.executable}, which fails: {output}", flush=True)
        links.unlink()
        return
    print(f"  using {output}", flush=True)
    versions: Dict[str, str] = {}
    for package in metadata.distributions():  # of several with one name, the first is imported
        versions.setdefault(package.metadata["Name"], package.version)
    environment.held.write_text("".join(f"{n}=={v}\n" for n, v in versions.items()))


def install(environment: Environment) -> None:
    """Installs everything that the environment lacks."""
    uses_existing = environment.held.exists()
    constraints = environment.path / "constraints.txt"
    constraints.write_text(
        merge_constraints(
            CONSTRAINTS.read_text(), environment.held.read_text() if uses_existing else ""
        )
    )
    pinned = ["--constraint", str(constraints)]
    # All that has to be built is built with these, not with the newest setuptools of the day.
    environment.pip_install("installing setuptools", *pinned, "setuptools", "wheel")

    # What ONNX needs may not go with the versions that are held.
    extras = EXTRAS if uses_existing else (*EXTRAS, "export")
    project = ["--no-build-isolation", "--editable", f"{ROOT}[{','.join(extras)}]"]
    if uses_existing:
        # Detectron2 does not name it, as it has several distributions.
        find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('cv2') is None)"
        has_cv2 = subprocess.run([str(environment.python), "-c", find]).returncode == 0
        needs = [] if has_cv2 else ["opencv-python-headless"]
        environment.pip_install("installing what is missing", *pinned, *needs, *project)
        return
    environment.pip_install(
        "installing PyTorch and what Detectron2 needs (2.5 GB to download, 1 to 3 minutes)",
        *pinned,
        *["--requirement", str(DETECTRON2_NEEDS)],
        *project,
    )
    install_detectron2(environment)


def merge_constraints(tested: str, held: str) -> str:
    """
    Args:
        tested: the text of constraints.txt.
        held: lines ``name==version`` of packages that are to stay as they are.

    Returns:
        The tested versions, except for packages that are held. What things are built with is not.
    """
    versions = dict(parse_pins(held))
    for builder in ("setuptools", "wheel"):
        versions.pop(builder, None)
    pins = {name: versions.get(name, version) for name, version in parse_pins(tested)}
    return "".join(f"{name}=={version}\n" for name, version in pins.items())


def parse_pins(text: str) -> Iterator[Tuple[str, str]]:
    """Yields the name, as pip compares names, and the version of every ``name==version`` line."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            yield re.sub(r"[-_.]+", "-", name).lower(), version


def install_detectron2(environment: Environment) -> None:
    """Installs the pinned wheel, less the parts that would do harm."""
    site_packages = environment.site_packages()
    environment.pip_install(
        "installing Detectron2",
        *["--target", str(site_packages), "--upgrade", "--no-deps", "--require-hashes"],
        *["--python-version", "3.10", "--only-binary", ":all:"],
        *["--requirement", str(DETECTRON2)],
    )
    # Detectron2's scripts, packed by accident: they would be found in the place of other `tools`.
    shutil.rmtree(site_packages / "tools", ignore_errors=True)
    # Built for another PyTorch. Only Python 3.10 would try it, and all are to do the same.
    for library in (site_packages / "detectron2").glob("_C.*.so"):
        library.unlink()


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup_env.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nsetup_env.py: interrupted; the next run starts it again")
