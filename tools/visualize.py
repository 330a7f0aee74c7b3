#!/usr/bin/env python
"""Draws predictions beside the ground truth: of one model, for the first images of a dataset, or of
two, for the images in which they differ most."""

import argparse
import os
import sys
from typing import Tuple

from wsbcn_d2.visualization import draw_comparison, draw_predictions, load_predictions


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="digits_val", help="a registered dataset")
    parser.add_argument(
        "--predictions",
        required=True,
        nargs="+",
        metavar="FILE",
        help="coco_instances_results.json, which an evaluation writes to OUTPUT_DIR/inference; "
        "with two, those of two models are compared. LABEL=FILE names a model",
    )
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument("--num-images", type=int, default=6, help="how many images to draw")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="lowest score drawn")
    args = parser.parse_args()
    try:
        labels, files = zip(*map(_split_label, args.predictions))
        predictions = [load_predictions(file) for file in files]
        options = (args.output, args.num_images, args.score_threshold)
        if len(predictions) == 1:
            path = draw_predictions(args.dataset, predictions[0], *options)
        else:
            path = draw_comparison(args.dataset, predictions, labels, *options)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _split_label(argument: str) -> Tuple[str, str]:
    """A model is called like the folder of its run if it has no label."""
    label, _, file = argument.rpartition("=")
    if not label or os.path.exists(argument):
        label, file = "", argument
    folder = os.path.dirname(os.path.abspath(file))
    if os.path.basename(folder) == "inference":
        folder = os.path.dirname(folder)
    return label or os.path.basename(folder), file


if __name__ == "__main__":
    sys.exit(main())
