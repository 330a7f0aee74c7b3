#!/usr/bin/env python
"""Measures normalization layers side by side: time, memory, share of the memory bandwidth."""

import argparse
import sys
from typing import Dict

from wsbcn_d2.benchmark import command_line
from wsbcn_d2.benchmark.norms import (
    CONTENDERS,
    DTYPES,
    MEMORY_FORMATS,
    SHAPES,
    Shape,
    benchmark_norms,
)


def parse_shapes(texts: "list[str]") -> Dict[str, Shape]:
    shapes: Dict[str, Shape] = {}
    for text in texts:
        sizes = [int(size) for size in text.split("x") if size.isdigit()]
        if len(sizes) != 4 or len(text.split("x")) != 4 or min(sizes) < 1:
            raise ValueError(f"--shapes: must be like 1x64x400x672, got {text!r}")
        shapes[text] = tuple(sizes)
    return shapes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command_line.add_common_options(parser)
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NxCxHxW",
        help="inputs; default: those of a Mask R-CNN R-50-FPN for an image of 800 x 1333 pixels",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--memory-formats", nargs="+", choices=MEMORY_FORMATS, default=["nchw"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--copy-mib",
        type=command_line.positive,
        default=512,
        help="size of the tensor whose copy gives the bandwidth, more than the caches hold",
    )
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    try:
        device = command_line.check(args)
        shapes = parse_shapes(args.shapes) if args.shapes else SHAPES
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    results = benchmark_norms(
        shapes,
        device=device,
        dtypes=args.dtypes,
        memory_formats=args.memory_formats,
        contenders=args.contenders,
        repetitions=args.repetitions,
        warmup=args.warmup,
        copy_mebibytes=args.copy_mib,
    )
    command_line.deliver(results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
