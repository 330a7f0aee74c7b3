"""Measures everything that docs/benchmarks.md shows, and rewrites it:

    python -m wsbcn_d2.benchmark [--device cpu|cuda] [--page-only | --list]

For a checkout of the repository. Every measurement is a command of its own, so that it can also be
run by hand (``--list``), followed by ``--page-only``.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, Tuple

import torch

from .norms import CONTENDERS
from .page import rewrite

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "docs" / "benchmarks"

_NORMS = "tools/benchmark_norms.py --device {device}"
_TRAIN = "tools/benchmark_train.py --device {device}"

_MOST = " ".join(shlex.quote(name) for name in CONTENDERS if name != "reference, compiled")

# For each device, the name of a file with results and the command that writes it.
COMMANDS: Dict[str, Dict[str, str]] = {
    "cpu": {
        "norms-cpu": _NORMS,
        "train-cpu": _TRAIN + " --size 256 --checkpoint-activations --repetitions 7 --warmup 2",
        "train-cpu-800x1333": _TRAIN
        + " --size 800x1333 --norms GN GN+WS BCN BCN+WS --repetitions 3 --warmup 1",
    },
    "cuda": {
        **{
            f"norms-cuda-{dtype}": _NORMS
            + f" --dtypes {dtype} --memory-formats nchw channels_last --contenders {_MOST}"
            for dtype in ("float32", "bfloat16", "float16")
        },
        # Of the compiled reference each input takes seconds to compile.
        "norms-cuda-compiled": _NORMS + " --dtypes float32 bfloat16 --memory-formats nchw"
        " --shapes 1x256x200x336 1x1024x50x84 512x256x7x7"
        " --contenders BCN reference 'reference, compiled' GroupNorm",
        "train-cuda": _TRAIN
        + " --size 800x1333 --images 1 2 --checkpoint-activations --memory-gib 16",
        "train-cuda-float16": _TRAIN + " --size 800x1333 --images 1 2 --amp float16",
        "train-cuda-float16-channels-last": _TRAIN
        + " --size 800x1333 --images 1 2 --amp float16 --channels-last",
    },
}


def commands(device: str) -> Tuple[str, ...]:
    """The commands for a device, each of which writes one file of results."""
    return tuple(
        f"{command.format(device=device)} --json docs/benchmarks/{name}.json"
        for name, command in COMMANDS[device].items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wsbcn_d2.benchmark",
        description=__doc__.partition(":\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted(COMMANDS), default=default)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--page-only", action="store_true", help="show what has been measured")
    group.add_argument("--list", action="store_true", help="print the commands, and do nothing")
    args = parser.parse_args()
    if args.list:
        print("\n".join(commands(args.device)))
        return 0
    if not args.page_only:
        if args.device == "cuda" and not torch.cuda.is_available():
            print(f"{parser.prog}: --device cuda: there is no GPU", file=sys.stderr)
            return 2
        RESULTS.mkdir(exist_ok=True)
        for command in commands(args.device):
            print(command, flush=True)
            code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode
            if code:
                print(f"{parser.prog}: failed with status {code}: {command}", file=sys.stderr)
                return code
    try:
        for path in rewrite(PAGE, RESULTS):
            print(path)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
