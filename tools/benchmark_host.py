#!/usr/bin/env python
"""Measures what the layers cost the host that issues the work of a GPU; needs no GPU."""

import argparse
import sys

from wsbcn_d2.benchmark.command_line import positive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repetitions", type=positive, default=300, help="rounds that count")
    parser.add_argument("--warmup", type=positive, default=30, help="rounds before those")
    args = parser.parse_args()
    try:
        from wsbcn_d2.benchmark.host import benchmark_host, markdown

        print(markdown(benchmark_host(args.repetitions, args.warmup)))
    except ImportError as error:
        print(f"{parser.prog}: Triton 3.3 or newer is needed ({error})", file=sys.stderr)
        return 2
    except RuntimeError as error:  # Triton's interpreter
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
