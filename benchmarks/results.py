"""What the commands have in common: where they run, and the file that they write."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Optional

import detectron2
import torch

from wsbcn_d2 import ops
from wsbcn_d2.command_line import HelpFormatter
from wsbcn_d2.engine.checkpoint import atomic_write, check_output
from wsbcn_d2.version import __version__

Results = Dict[str, Any]

ROOT = Path(__file__).parents[1]
# Where measurements go that are for the page, and all others.
FOR_THE_PAGE = "benchmarks/results"
FOR_ONESELF = "output/benchmarks"


def parser(description: Optional[str], repetitions: int) -> argparse.ArgumentParser:
    """A parser with the options that all commands have.

    Args:
        description: the docstring of the module, of which the first line is shown.
        repetitions: default number of rounds.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{_module()}",
        description=(description or "").partition("\n")[0],
        formatter_class=HelpFormatter,
    )
    made.add_argument("--repetitions", type=positive, default=repetitions, help="rounds that count")
    made.add_argument("--warmup", type=positive, default=2, help="rounds before those")
    made.add_argument("--quick", action="store_true", help="a trial: next to nothing, in no time")
    made.add_argument(
        "--output",
        default=FOR_ONESELF,
        help=f"folder of the JSON file; the page shows {FOR_THE_PAGE}",
    )
    return made


def add_device(to: argparse.ArgumentParser) -> None:
    """Adds the option ``--device``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    to.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run")


def positive(text: str) -> int:
    """Type of options that take a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return value


def check(args: argparse.Namespace, name: str) -> str:
    """Finds out now what would otherwise fail when everything has been measured.

    Args:
        args: of :func:`parser`; with ``quick``, there is one round after one for warming up.
        name: of the file to write, without its folder.

    Returns:
        The path of the file.

    Raises:
        ValueError: if there is no GPU to run on.
        OSError: if the file cannot be written.
    """
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that PyTorch can use")
    if args.quick:
        args.repetitions = args.warmup = 1
    path = os.path.join(args.output, name)
    check_output(path)
    return path


def describe(device: torch.device) -> Results:
    """What times depend on: machine, versions, commit, command and date.

    Args:
        device: where the benchmark runs; GPU and CUDA are named for a GPU only.
    """
    machine = {
        "CPU": f"{_cpu_name()}, {_available_cores()} cores, {torch.get_num_threads()} threads used",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load of the CPU before": f"{os.getloadavg()[0]:.1f}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        capability = f"sm_{gpu.major}{gpu.minor}"
        machine["GPU"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
        machine["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        machine["TF32"] = (
            f"convolutions {_yes(torch.backends.cudnn.allow_tf32)}, "
            f"matrix products {_yes(torch.backends.cuda.matmul.allow_tf32)}"
        )
    machine["software"] = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}, wsbcn_d2 {__version__}"
    )
    machine["kernels of wsbcn_d2"] = ops.backend_name(device)
    return {
        "device": device.type,
        "machine": machine,
        "command": shlex.join(["python", "-m", f"benchmarks.{_module()}", *sys.argv[1:]]),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "commit": _commit(),
    }


def write(results: Results, path: str) -> None:
    """Writes results to a JSON file, a row on a line. It appears when it is complete."""
    rest = {key: value for key, value in results.items() if key != "rows"}
    rows = ",\n  ".join(map(json.dumps, results["rows"]))
    with atomic_write(path, "w") as file:
        file.write(f'{json.dumps(rest, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def _module() -> str:
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]


def _commit() -> str:
    """Of the checkout; with a mark if what is measured differs from it."""

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.c", "*.yaml").returncode
    except OSError:  # no git
        return "unknown"
    return f"{commit or 'unknown'}{' with changes' if commit and changed else ''}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _available_cores() -> int:
    # a container or a batch system may give us fewer than there are
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
