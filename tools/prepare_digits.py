#!/usr/bin/env python
"""Makes the digits dataset, an instance segmentation dataset in COCO format, in seconds.

It needs scikit-learn, from which its images come, and no network.
"""

import argparse
import inspect
import logging
import sys

from wsbcn_d2.data import default_digits_root, make_digits_dataset


def main() -> int:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make_digits_dataset).parameters.items()
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--root",
        default=default_digits_root(),
        help="folder to make; digits_train and digits_val are looked for in "
        "$DETECTRON2_DATASETS/digits, or datasets/digits if that variable is not set",
    )
    for option, help_text in [
        ("--num-train", "number of training images"),
        ("--num-val", "number of validation images"),
        ("--image-size", "width and height of the images in pixels"),
        ("--seed", "seed of everything random"),
    ]:
        default = defaults[option[2:].replace("-", "_")]
        parser.add_argument(option, type=int, default=default, help=help_text)
    args = parser.parse_args()
    # The package's logger says what was made, or that it was there.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        make_digits_dataset(**vars(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
