#!/usr/bin/env python
"""Compares training runs: AP with intervals, differences, cost and learning curves on one page."""

import argparse
import sys
from pathlib import Path
from typing import Iterable, List, Tuple

from wsbcn_d2.analysis.comparison import (
    Results,
    compare_runs,
    load_results,
    merge_results,
    write_results,
)
from wsbcn_d2.analysis.comparison_page import check_baseline, comparison_page
from wsbcn_d2.analysis.runs import (
    Run,
    label_by_config,
    label_by_folder,
    label_by_name,
    read_run,
    split_label,
)
from wsbcn_d2.command_line import HelpFormatter, file_name, seed
from wsbcn_d2.engine.checkpoint import check_output

GROUPINGS = {
    "config": label_by_config,
    "folder": label_by_folder,
    "none": label_by_name,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="OUTPUT_DIR",
        help="output folder of a run of Detectron2; LABEL=OUTPUT_DIR,OUTPUT_DIR names a group",
    )
    parser.add_argument(
        "--group",
        choices=GROUPINGS,
        default="config",
        help="which runs are seeds of one setting: those whose configs say the same but for the "
        "seed, those whose folders have the same name but for _s1 at its end, or none",
    )
    parser.add_argument("--baseline", help="label of the setting that others are compared with")
    parser.add_argument("--output", default="comparison", help="folder to write to")
    parser.add_argument(
        "--name", type=file_name, default="comparison", help="name of the files, without extension"
    )
    parser.add_argument(
        "--from",
        dest="files",
        nargs="+",
        default=(),
        metavar="JSON",
        help="what this tool has written, instead of runs or to add them to; those of several "
        "files are compared with one another",
    )
    parser.add_argument(
        "--dataset", help="dataset of the predictions; default: DATASETS.TEST of the runs"
    )
    parser.add_argument("--annotations", help="COCO annotations, of a dataset not registered")
    parser.add_argument(
        "--draws", type=int, default=1000, help="draws of the bootstrap; 0: no intervals"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the bootstrap")
    args = parser.parse_args()
    if not args.runs and not args.files:
        parser.error("give OUTPUT_DIRs, --from JSON files, or both")
    try:
        check_output(str(Path(args.output) / args.name))
        parts = {file: load_results(file) for file in args.files}
        if args.runs:
            parts["the runs given"] = _compare(args, parts.values())
        results = merge_results(parts) if len(parts) > 1 else next(iter(parts.values()))
        numbers = []
        if args.runs or len(parts) > 1:  # before the page, which can be made of them again
            numbers = [str(Path(args.output) / f"{args.name}.json")]
            write_results(results, numbers[0])
        paths = comparison_page(results, args.baseline).write(args.output, args.name) + numbers
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for run in results["runs"]:
        for note in run["notes"]:
            print(f"{run['name']}: {note}")
    print("\n".join(paths))
    return 0


def _compare(args: argparse.Namespace, others: Iterable[Results]) -> Results:
    runs, labels = _read_runs(args.runs, args.group)
    known = [*labels, *(group["label"] for results in others for group in results["groups"])]
    check_baseline(args.baseline, known)
    return compare_runs(
        runs,
        labels,
        dataset=args.dataset,
        annotations=args.annotations,
        num_draws=args.draws,
        seed=args.seed,
        progress=True,
    )


def _read_runs(arguments: List[str], grouping: str) -> Tuple[List[Run], List[str]]:
    runs: List[Run] = []
    given: List[str] = []
    for argument in arguments:
        label, folders = split_label(argument, separator=",")
        for folder in folders:
            run = read_run(folder)
            if any(run.folder.samefile(other.folder) for other in runs):
                raise ValueError(f"{folder!r} is given twice; a run is one seed of its setting")
            runs.append(run)
            given.append(label)
    return runs, [own or label for own, label in zip(given, GROUPINGS[grouping](runs))]


if __name__ == "__main__":
    sys.exit(main())
