"""What the two benchmark tools have in common: options, and where the results go."""

import argparse
import os
import shlex
import sys
from datetime import datetime, timezone
from typing import Any, Dict

import torch

from ..engine.checkpoint import check_output
from . import report


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for device, rounds and outputs."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run")
    parser.add_argument("--repetitions", type=positive, default=15, help="rounds that count")
    parser.add_argument("--warmup", type=positive, default=3, help="rounds before those")
    parser.add_argument("--json", metavar="FILE", help="write the results, from which all else is")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables")
    parser.add_argument("--plot", metavar="FILE", help="write the picture, a PNG")


def positive(text: str) -> int:
    """Type of options that take a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return value


def check(args: argparse.Namespace) -> torch.device:
    """Finds out now what would otherwise fail when everything has been measured.

    Returns:
        The device.

    Raises:
        ValueError: if there is no GPU to run on.
        OSError: if an output cannot be written.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that PyTorch can use")
    for path in filter(None, (args.json, args.markdown, args.plot)):
        check_output(path)
    return torch.device(args.device)


def deliver(results: Dict[str, Any], args: argparse.Namespace) -> None:
    """Adds date and command to the results, writes the outputs and prints the tables."""
    tool = os.path.join("tools", os.path.basename(sys.argv[0]))
    results["command"] = shlex.join([tool, *sys.argv[1:]])
    results["date"] = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    if args.json:
        report.write_json(results, args.json)
    if args.markdown:
        report.write_markdown(results, args.markdown)
    if args.plot:
        report.write_plot(results, args.plot)
    print(report.markdown(results))
