#!/usr/bin/env python
"""Folds a trained model into stock layers, and writes it for Detectron2, TorchScript or ONNX."""

import argparse
import sys

from detectron2.utils.logger import setup_logger

from wsbcn_d2.command_line import HelpFormatter
from wsbcn_d2.engine import ConfigError, load_config
from wsbcn_d2.export.checkpoint import FORMATS, export_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config-file", required=True, help="config the checkpoint was made with")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="what to write")
    parser.add_argument(
        "--output", required=True, help="folder to write for detectron2, else the file"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys to change, among them MODEL.WEIGHTS: the checkpoint to read",
    )
    args = parser.parse_args()
    try:
        cfg = load_config(args.config_file, args.opts, needs=("WEIGHTS",))
        setup_logger(name="fvcore")
        setup_logger()
        print(export_checkpoint(cfg, args.output, args.format))
    except (ConfigError, ImportError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
