#!/usr/bin/env python
"""Draws predictions beside the ground truth: of one model, for the first images of a dataset, or of
two, for the images in which they differ most."""

import argparse
import os
import sys
from typing import Optional, Tuple

from wsbcn_d2.analysis.runs import read_run, register_datasets, split_label
from wsbcn_d2.command_line import HelpFormatter
from wsbcn_d2.visualization import draw_comparison, draw_predictions, load_predictions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--dataset",
        help="registered dataset, or one of the first run; default: the one it was tested on",
    )
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
        dataset = _dataset(args.dataset, files[0])
        options = (args.output, args.num_images, args.score_threshold)
        if len(predictions) == 1:
            path = draw_predictions(dataset, predictions[0], *options)
        else:
            path = draw_comparison(dataset, predictions, labels, *options)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _split_label(argument: str) -> Tuple[str, str]:
    """A model is called like the folder of its run if it has no label."""
    label, (file,) = split_label(argument)
    return label or os.path.basename(_folder_of_run(file)), file


def _folder_of_run(file: str) -> str:
    folder = os.path.dirname(os.path.abspath(file))
    return os.path.dirname(folder) if os.path.basename(folder) == "inference" else folder


def _dataset(name: Optional[str], file: str) -> str:
    """The dataset that is asked for, or else the one that the config of the run says that
    predictions are of. Registers those of the config."""
    try:
        run = read_run(_folder_of_run(file))
    except ValueError:
        run = None
    if run is not None:
        register_datasets(run)
    if name:
        return name
    if run is None or not run.test_datasets:
        raise ValueError(
            f"{file!r} is not in the folder of a run whose config names a dataset: give --dataset"
        )
    return run.test_datasets[-1]


if __name__ == "__main__":
    sys.exit(main())
