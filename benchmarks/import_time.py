"""Measures how long imports take, each in a process of its own."""

import subprocess
import sys
from typing import Callable, Dict

import torch

from . import results
from .measure import Times, interleaved, spread

# `import detectron2` alone is hardly more than torch. Its parts in the third line are what a
# program that trains imports, and what this package needs.
STATEMENTS = (
    "import torch",
    "import detectron2",
    "import detectron2.engine, detectron2.modeling",
    "import wsbcn_d2",
)
_PROGRAM = """
import time
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""


def benchmark_imports(repetitions: int = 9, warmup: int = 2) -> results.Results:
    """Measures the imports of STATEMENTS.

    Args:
        repetitions, warmup: rounds, see :func:`~benchmarks.measure.interleaved`.

    Returns:
        What :mod:`benchmarks.page` shows, and JSON can hold: :func:`benchmarks.results.describe`,
        ``settings``, and ``rows``, with ``statement`` and ``time`` (median and quartiles of
        milliseconds).
    """
    described = results.describe(torch.device("cpu"))
    runs: Dict[str, Callable[[], Times]] = {s: _run(s) for s in STATEMENTS}
    times = interleaved(runs, repetitions, warmup)
    rows = [{"statement": s, "time": spread(times[s]["time"])} for s in STATEMENTS]
    settings = {"repetitions": repetitions, "warmup": warmup}
    return {"kind": "import_time", **described, "settings": settings, "rows": rows}


def _run(statement: str) -> Callable[[], Times]:
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM.format(statement)]

    def run() -> Times:
        done = subprocess.run(
            command, cwd=results.ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        return {"time": float(done.stdout.splitlines()[-1]) * 1e3}

    return run


def main() -> int:
    parser = results.parser(__doc__, repetitions=9)
    args = parser.parse_args()
    try:
        path = results.check(args, "import-time.json")
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    results.write(benchmark_imports(args.repetitions, args.warmup), path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
