#!/usr/bin/env python
"""Pretrains the backbone of a config by classifying crops of handwritten digits at a large batch.

The config is then trained from it with MODEL.WEIGHTS OUTPUT. It needs scikit-learn, from which the
images come, and no dataset.
"""

import argparse
import inspect
import sys

from wsbcn_d2.engine import ConfigError, load_config
from wsbcn_d2.engine.pretraining import pretrain_backbone


def main() -> int:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(pretrain_backbone).parameters.items()
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of the detector")
    parser.add_argument("--output", required=True, help="checkpoint to write")
    for option, help_text in [
        ("--steps", "number of steps"),
        ("--batch-size", "crops in a step"),
        ("--crop-size", "width and height of the crops in pixels"),
        ("--learning-rate", "the highest; it rises, and then falls as a cosine"),
        ("--eval-crops", "crops of held-out digits to report the accuracy on"),
        ("--seed", "seed of everything random"),
    ]:
        default = defaults[option[2:].replace("-", "_")]
        parser.add_argument(option, type=type(default), default=default, help=help_text)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change"
    )
    args = vars(parser.parse_args())
    try:
        opts = [*args.pop("opts"), "MODEL.WEIGHTS", ""]  # those of the detector
        cfg = load_config(args.pop("config_file"), opts, needs=())
        result = pretrain_backbone(cfg, progress=True, **args)
    except (ConfigError, FloatingPointError, ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(
        f"{args['output']}: {result.norm}, accuracy {100 * result.accuracy:.1f} % on "
        f"{args['eval_crops']} crops of held-out digits, {result.seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
