#!/usr/bin/env python
"""Recomputes the estimates of a checkpoint's BCN layers over training images."""

import argparse
import sys

from detectron2.utils.logger import setup_logger

from wsbcn_d2.command_line import HelpFormatter
from wsbcn_d2.engine import ConfigError, load_config
from wsbcn_d2.engine.recalibration import recalibrate_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config-file", required=True, help="config the checkpoint was made with")
    parser.add_argument(
        "--num-images",
        type=int,
        help="how many training images; TEST.PRECISE_BCN.NUM_IMAGES of the config if not given",
    )
    parser.add_argument("--output", required=True, help="checkpoint to write")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys to change, among them MODEL.WEIGHTS: the checkpoint to read",
    )
    args = parser.parse_args()
    try:
        cfg = load_config(args.config_file, args.opts, needs=("TRAIN", "WEIGHTS"))
        setup_logger(name="fvcore")
        setup_logger()
        if args.num_images is None:
            args.num_images = cfg.TEST.PRECISE_BCN.NUM_IMAGES
        recalibrate_checkpoint(cfg, args.output, args.num_images, progress=True)
    except (ConfigError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
