#!/usr/bin/env python
"""Looks into the normalization layers of checkpoints: dead channels, estimates, smoothness."""

import argparse
import sys
from pathlib import Path
from typing import Iterator, List, Tuple

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from wsbcn_d2.analysis.norm_analysis import (
    Analysis,
    analyze_checkpoint,
    load_analyses,
    write_analyses,
)
from wsbcn_d2.analysis.norms_page import norms_page
from wsbcn_d2.analysis.probe import STEPS
from wsbcn_d2.analysis.runs import read_run, split_label
from wsbcn_d2.command_line import HelpFormatter, file_name, seed
from wsbcn_d2.engine import load_config
from wsbcn_d2.engine.checkpoint import check_output

_NEEDS = ("TRAIN", "WEIGHTS")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="[LABEL=]OUTPUT_DIR",
        help="folder of a run, of which config.yaml and the last checkpoint are used",
    )
    parser.add_argument("--config-file", help="a config instead of runs; weights by --opts")
    parser.add_argument("--num-images", type=int, default=20, help="how many training images")
    parser.add_argument(
        "--num-probe-images", type=int, default=8, help="how many of them to probe the loss with"
    )
    parser.add_argument(
        "--steps",
        type=float,
        nargs="+",
        default=list(STEPS),
        metavar="STEP",
        help="steps of the probe, in multiples of SOLVER.BASE_LR",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the choice of images")
    parser.add_argument("--output", default="norms", help="folder to write to")
    parser.add_argument(
        "--name", type=file_name, default="norms", help="name of the files, without extension"
    )
    parser.add_argument(
        "--from",
        dest="analyses",
        metavar="JSON",
        help="instead of runs: what this tool has written",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys to change, of all models; last on the command line",
    )
    args = parser.parse_args()
    if sum(map(bool, (args.runs, args.config_file, args.analyses))) != 1:
        parser.error("give one of OUTPUT_DIRs, --config-file and --from")
    file = str(Path(args.output) / f"{args.name}.json")
    try:
        check_output(file)
        if args.analyses:
            analyses = load_analyses(args.analyses)
        else:
            setup_logger(name="fvcore")
            setup_logger()
            analyses = _analyze(args, file)
        paths = norms_page(analyses).write(args.output, args.name)
        if not args.analyses:
            paths.append(file)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("\n".join(paths))
    return 0


def _analyze(args: argparse.Namespace, file: str) -> List[Analysis]:
    """Writes what there is after each checkpoint, so that an error or interruption keeps it."""
    analyses: List[Analysis] = []
    for label, cfg in list(_configs(args)):
        analysis = analyze_checkpoint(
            cfg,
            label,
            num_images=args.num_images,
            num_probe_images=args.num_probe_images,
            steps=args.steps,
            seed=args.seed,
            progress=True,
        )
        analyses.append(analysis)
        write_analyses(analyses, file)
    return analyses


def _configs(args: argparse.Namespace) -> Iterator[Tuple[str, CfgNode]]:
    if args.config_file:
        cfg = load_config(args.config_file, args.opts, needs=_NEEDS)
        yield Path(args.config_file).stem, cfg
    for argument in args.runs:
        label, (folder,) = split_label(argument)
        run = read_run(folder)
        if run.checkpoint is None:
            raise ValueError(f"{folder!r} has no checkpoint")
        opts = ["MODEL.WEIGHTS", str(run.checkpoint), *args.opts]
        cfg = load_config(str(run.folder / "config.yaml"), opts, needs=_NEEDS)
        yield label or run.name, cfg


if __name__ == "__main__":
    sys.exit(main())
