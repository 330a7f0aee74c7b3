#!/usr/bin/env python
"""Draws predictions beside the ground truth, for the first images of a dataset."""

import argparse
import sys

from wsbcn_d2.visualization import draw_predictions, load_predictions


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="digits_val", help="a registered dataset")
    parser.add_argument(
        "--predictions",
        required=True,
        help="coco_instances_results.json, which an evaluation writes to OUTPUT_DIR/inference",
    )
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument("--num-images", type=int, default=6, help="how many images to draw")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="lowest score drawn")
    args = parser.parse_args()
    try:
        predictions = load_predictions(args.predictions)
        path = draw_predictions(
            args.dataset, predictions, args.output, args.num_images, args.score_threshold
        )
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
