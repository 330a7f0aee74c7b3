#!/usr/bin/env python
"""Measures training steps and inference of Mask R-CNN R-50-FPN, one model for each normalization:
time, memory, the largest batch, the share of weight standardization."""

import argparse
import sys
from typing import Optional, Tuple

import torch

from wsbcn_d2.benchmark import command_line
from wsbcn_d2.benchmark.train import AMP_DTYPES, DEFAULT_NORMS, NORMS, benchmark_train
from wsbcn_d2.engine import ConfigError


def parse_size(text: Optional[str], device: torch.device) -> Tuple[int, int]:
    if text is None:
        return (800, 1333) if device.type == "cuda" else (256, 256)
    sizes = [int(size) if size.isdigit() else 0 for size in text.split("x")]
    if len(sizes) > 2 or min(sizes) < 32:
        raise ValueError(f"--size: must be like 256 or 800x1333, each at least 32, got {text!r}")
    return sizes[0], sizes[-1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command_line.add_common_options(parser)
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(DEFAULT_NORMS))
    parser.add_argument(
        "--size",
        metavar="S or HxW",
        help="of the images, in pixels; default: 800x1333 on a GPU, 256 on a CPU",
    )
    parser.add_argument(
        "--images", nargs="+", type=command_line.positive, default=[1], help="batch sizes"
    )
    parser.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision (GPU only)")
    parser.add_argument("--channels-last", action="store_true", help="memory format")
    parser.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="measure BCN+WS with MODEL.WSBCN.CHECKPOINT_ACTIVATIONS too",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        help="find the largest batch that trains in so much memory (GPU only)",
    )
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys, for all models"
    )
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    try:
        device = command_line.check(args)
        results = benchmark_train(
            args.norms,
            device=device,
            size=parse_size(args.size, device),
            images=args.images,
            amp=args.amp,
            channels_last=args.channels_last,
            checkpoint_activations=args.checkpoint_activations,
            memory_gib=args.memory_gib,
            repetitions=args.repetitions,
            warmup=args.warmup,
            opts=args.opts,
        )
    except (ConfigError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    command_line.deliver(results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
