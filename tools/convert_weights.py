#!/usr/bin/env python
"""Converts weights of other projects for a config: ImageNet models and detectors, with or without
weight standardization. A report says what is converted, new or missing."""

import argparse
import sys

import torch

from wsbcn_d2.engine import load_config
from wsbcn_d2.engine.checkpoint import atomic_write, check_output
from wsbcn_d2.engine.setup import built_model
from wsbcn_d2.weights import LAYOUTS, ConversionReport, convert_state_dict, read_checkpoint
from wsbcn_d2.weights.formulas import FORMULAS
from wsbcn_d2.weights.training import as_options, keys_of


def _missing(report: ConversionReport) -> str:
    message = f"{len(report.missing)} weights are missing, as {report.missing[0]}"
    if not report.fitting:
        return f"{message}. No conversion makes them: use a config of the file's model"
    return f"{message}. With these keys the config fits: {as_options(report.fitting)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        required=True,
        help="the file of the other project, or its address, as detectron2://...",
    )
    parser.add_argument("--config-file", required=True, help="config of the model to convert for")
    parser.add_argument("--output", help="file to write, for MODEL.WEIGHTS")
    parser.add_argument(
        "--layout", choices=list(LAYOUTS), help="source of the file (default: by the names in it)"
    )
    parser.add_argument(
        "--formula",
        default="auto",
        choices=["auto", "none", *FORMULAS],
        help="weight standardization of the source (default: what the file or --layout says)",
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="weights that may be left over in parts of the model that are converted, as '*.se.*'",
    )
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="the weights were trained with the input format, the stride and the poolers of the "
        "config, whatever the file and its names tell",
    )
    parser.add_argument("--dry-run", action="store_true", help="report, and write nothing")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    if not args.dry_run and not args.output:
        parser.error("--output or --dry-run is needed")
    try:
        if not args.dry_run:
            check_output(args.output, source=args.input)
        opts = [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
        cfg = load_config(args.config_file, opts, needs=())
        checkpoint = read_checkpoint(args.input)
        model = built_model(cfg)
        model.input_format = cfg.INPUT.FORMAT  # semantic segmentors do not keep it
        state, report = convert_state_dict(
            checkpoint, model, args.layout, args.formula, args.leave_out, args.trust_config
        )
        written = not args.dry_run and not report.missing
        if written:  # before the report, whose reader may close it: | head
            author = f"wsbcn_d2, from {report.layout}"
            content = {"model": state, "__author__": author, "trained_with": keys_of(model)}
            with atomic_write(args.output) as file:
                torch.save(content, file)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(report)
    if written:
        print(f"written: {args.output}")
    if report.missing:
        print(f"{parser.prog}: {_missing(report)}", file=sys.stderr)
    return 1 if report.missing else 0


if __name__ == "__main__":
    sys.exit(main())
