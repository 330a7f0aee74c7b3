#!/usr/bin/env python
"""Writes MODEL_ZOO.md, the list of all configs, from them and from docs/published_results.yaml."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import yaml
from detectron2.config import CfgNode

from wsbcn_d2.engine.checkpoint import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "MODEL_ZOO.md"
PUBLISHED = ROOT / "docs" / "published_results.yaml"

# The words for norms in file names, in the order of the rows.
_NORMS = {
    "frozenbn": "FrozenBN",
    "bn": "BN",
    "bn_ws": "BN+WS",
    "syncbn": "SyncBN",
    "gn": "GN",
    "gn_ws": "GN+WS",
    "cn": "CN",
    "cn_ws": "CN+WS",
    "batchbcn": "BatchBCN",
    "batchbcn_ws": "BatchBCN+WS",
    "bcn": "BCN",
    "bcn_ws": "BCN+WS",
}

# Model, norm, schedule and images per GPU; the configs of the digits have the former two only.
_NAME = re.compile(
    rf"(?P<model>.+?)_(?P<norm>{'|'.join(_NORMS)})(?:_(?P<schedule>[^_]+)_(?P<images>\d)img)?"
)

# Of the models of Detectron2's projects, which have config keys of their own.
_PROJECTS = {
    "Misc/pointrend": "PointRend",
    "Cityscapes/deeplab": "DeepLab",
    "Cityscapes/panoptic_deeplab": "Panoptic-DeepLab",
}

_HEADER = """\
# Model zoo

Every config of this repository; `tools/list_model_zoo.py` writes this page. A name says model,
backbone, norm and schedule. All but the digits are there for 1 and for 2 images per GPU on 8 GPUs;
with another number of GPUs add `SOLVER.REFERENCE_WORLD_SIZE 8` to the command, and Detectron2 keeps
the images per GPU and scales learning rate, steps and iterations itself.

Schedules: `1x`, `3x` and `9x` are Detectron2's; `2x` is the authors', 180,000 batches of 16 images
with decays at 150,000 and 170,000; `20-23-24e` has 24 epochs, with decays after the 20th and the
23rd; `484e` and the like are as many epochs of the dataset, with Detectron2's own decays.

**Nobody has trained these configs with this code yet.** The results are those that others have
published for the same model, norm and schedule, made with their code: `authors` are those of the
paper. In brackets: the source, and the images of all GPUs together. Where nothing has been
published, the cell is empty. Rows in italics are the same model with another norm.

`starts from`: the weights that the config loads. Those that Detectron2 hosts are downloaded; with
`random`, nothing is frozen. To start from others, give `MODEL.WEIGHTS FILE`; convert them first,
unless they were trained with the same norm by Detectron2 or this package.
[docs/weights.md](docs/weights.md) says how, and what to freeze.

The files are written by `tools/make_configs.py` from the few that people write: `Base-*.yaml` in
each folder, and `configs/_base_`. For another norm, take the file of the model whose weights suit
it (a `_ws` file for an option with `+WS`), and give the `NORM` options as arguments of the command.
"""


def command(group: str, example: str) -> str:
    """How the configs of a group are trained."""
    for prefix, project in _PROJECTS.items():
        if group.startswith(prefix):
            return (
                f"cd DETECTRON2/projects/{project}  # with `import wsbcn_d2` in its train_net.py: "
                "docs/in_your_project.md\n"
                f"python train_net.py --num-gpus 8 --config-file WSBCN_D2/{example}"
            )
    gpus = "" if group.startswith("Digits") else "--num-gpus 8 "
    return f"tools/train_net.py {gpus}--config-file {example}"


def published(entries: List[Dict[str, Any]], sources: Dict[str, str]) -> str:
    """A cell: metrics, source and batch of each entry."""
    cells = []
    for entry in entries:
        metrics = ", ".join(
            f"{key} {value}"
            for key, value in entry.items()
            if key not in ("source", "batch", "norm")
        )
        source = entry["source"]
        cells.append(f"{metrics} ([{source}]({sources[source]}), {entry['batch']})")
    return "; ".join(cells)


def weights(path: Path) -> str:
    """What a config starts from, in a word."""
    value = CfgNode.load_yaml_with_base(str(path))["MODEL"].get("WEIGHTS", "")
    return re.sub(r"^.*?//(?:ImageNetPretrained/)?", "", value) or "random"


def groups(configs: Path) -> Dict[str, List[Tuple[Path, Dict[str, str]]]]:
    """The configs with the parts of their names, by folder and model.

    Raises:
        ValueError: naming a file whose name has other parts.
    """
    found: Dict[str, List[Tuple[Path, Dict[str, str]]]] = {}
    for path in sorted(configs.rglob("*.yaml")):
        if path.name.startswith("Base-") or "_base_" in path.parts:
            continue
        match = _NAME.fullmatch(path.stem)
        if match is None:
            raise ValueError(
                f"{path}: the name must be MODEL_NORM.yaml or MODEL_NORM_SCHEDULE_IMAGESimg.yaml"
            )
        found.setdefault(f"{path.parent.name}/{match['model']}", []).append(
            (path, match.groupdict(default=""))
        )
    return found


def lazy_configs() -> str:
    """The section on LazyConfigs."""
    folder = ROOT / "configs" / "LazyConfig"
    files = [
        path.relative_to(ROOT) for path in sorted(folder.glob("*.py")) if path.stem != "common"
    ]
    rows = [f"| [{path.stem}]({path}) |" for path in files]
    return (
        "## LazyConfig\n\n"
        "Detectron2's own, each with every norm, from random weights, at 1 image per GPU; for 2,\n"
        "see `configs/LazyConfig/common.py`.\n\n"
        "```\ntools/lazyconfig_train_net.py --num-gpus 8 "
        f"--config-file {files[0]} train.norm=BCN+WS\n```\n\n"
        "| config |\n|---|\n" + "\n".join(rows) + "\n"
    )


def _order(file: Tuple[Path, Dict[str, str]]) -> Tuple[int, str, int, str]:
    schedule, images = file[1]["schedule"], file[1]["images"]
    return len(schedule), schedule, list(_NORMS).index(file[1]["norm"]), images


def page() -> str:
    """The text of MODEL_ZOO.md.

    Raises:
        ValueError: if a published result is of a config that does not exist.
    """
    data = yaml.safe_load(PUBLISHED.read_text())
    sources, results, baselines = data["sources"], data["results"], data["baselines"]
    known = set()
    parts, folder = [_HEADER], ""
    for group, files in groups(ROOT / "configs").items():
        if group.split("/")[0] != folder:
            folder = group.split("/")[0]
            parts.append(f"## {folder}\n")
        files = sorted(files, key=_order)
        example = files[-1][0].relative_to(ROOT)
        parts.append(f"### {group.split('/')[1]}\n\n```\n{command(group, str(example))}\n```\n")
        rows: Dict[Tuple[str, str], Dict[str, Path]] = {}
        for path, name in files:
            rows.setdefault((name["schedule"], name["norm"]), {})[name["images"]] = path
        lines = [
            "| norm | schedule | images per GPU | starts from | published |",
            "|---|---|---|---|---|",
        ]
        schedules = dict.fromkeys(schedule for schedule, _ in rows)
        for schedule in schedules:
            key = f"{group}_{schedule}"
            known.add(key)
            for entry in baselines.get(key, []):
                cell = published([entry], sources)
                lines.append(f"| *{entry['norm']}* | {schedule} | | | {cell} |")
            for (of_schedule, norm), paths in rows.items():
                if of_schedule != schedule:
                    continue
                key = "_".join(filter(None, (group, norm, schedule)))
                known.add(key)
                links = ", ".join(
                    f"[{images or 1}]({path.relative_to(ROOT)})" for images, path in paths.items()
                )
                start = weights(next(iter(paths.values())))
                cell = published(results.get(key, []), sources)
                lines.append(f"| {_NORMS[norm]} | {schedule} | {links} | {start} | {cell} |")
        parts.append("\n".join(line.replace("|  |", "| |") for line in lines) + "\n")
    parts.append(lazy_configs())
    unknown = sorted({*results, *baselines} - known)
    if unknown:
        raise ValueError(f"{PUBLISHED}: there is no config for {', '.join(unknown)}")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, exit with 1 if the page is not up to date",
    )
    args = parser.parse_args()
    try:
        text = page()
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if args.check:
        current = PAGE.is_file() and PAGE.read_text() == text
        print(f"{PAGE.name} is {'up to date' if current else 'not up to date'}")
        return 0 if current else 1
    with atomic_write(str(PAGE), "w") as file:
        file.write(text)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
