#!/usr/bin/env python
"""Writes MODEL_ZOO.md, the list of all configs, from them and docs/data/published_results.yaml."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import yaml
from detectron2.config import CfgNode

from wsbcn_d2.engine.checkpoint import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "MODEL_ZOO.md"
PUBLISHED = ROOT / "docs" / "data" / "published_results.yaml"

# The words for norms in file names, in the order of rows and links.
_NORMS = {
    "frozenbn": "FrozenBN",
    "bn": "BN",
    "syncbn": "SyncBN",
    "gn": "GN",
    "gn_ws": "GN+WS",
    "bcn": "BCN",
    "bcn_ws": "BCN+WS",
}

# Model, norm, schedule and images per GPU; the configs of the digits have the former two only.
_NAME = re.compile(
    rf"(?P<model>.+?)_(?P<norm>{'|'.join(_NORMS)})(?:_(?P<schedule>[^_]+)_(?P<images>\d)img)?"
)

# How models of Detectron2's projects begin, whose train_net.py runs them.
_OF_PROJECTS = ("pointrend", "deeplab", "panoptic_deeplab")

_HEADER = """\
# Model zoo

Which configs there are, how to change norm, GPUs and batch, and what others have published for
them. `tools/list_model_zoo.py` writes this page.

```
tools/train_net.py --num-gpus 8 \\
    --config-file configs/COCO-Detection/faster_rcnn_R_101_FPN_bcn_ws_1x_1img.yaml
```

A name says model, backbone, norm, schedule and images per GPU. There are {yaml} YAML configs and
{lazy} LazyConfigs to train; the other files in `configs` are what these are made of. Mask R-CNN
R-50-FPN and the small model of the digits have a file for each of many norms. Every other model
has one file for `GN+WS` and one for `BCN+WS`, from random weights, with 1 image per GPU on 8
GPUs. For anything else, add keys to the command:

- **Another norm**: the `NORM` keys of the parts, for example
  `MODEL.RESNETS.NORM GN MODEL.FPN.NORM GN MODEL.ROI_BOX_HEAD.NORM GN MODEL.ROI_MASK_HEAD.NORM GN`.
  RetinaNet has `MODEL.RETINANET.NORM` for the latter two, models with semantic segmentation also
  `MODEL.SEM_SEG_HEAD.NORM`, Panoptic-DeepLab also `MODEL.INS_EMBED_HEAD.NORM`.
- **Another number of GPUs**, with 1 image each: `SOLVER.REFERENCE_WORLD_SIZE 8`. This key of
  Detectron2 says for how many GPUs a config is meant. On N GPUs, Detectron2 multiplies batch and
  learning rate by N / 8, and divides steps and iterations by it.
- **More images per GPU**, on any number of GPUs: the same key with the value 4 for 2 images, 2 for
  4, 1 for 8.
- **Other weights**: `MODEL.WEIGHTS FILE`. [docs/weights.md](docs/weights.md) says how to convert
  them and what to freeze.
- **The 24 epochs** of mmdetection's GN+WS models, `20-23-24e`:
  `SOLVER.STEPS "(293200, 337180)" SOLVER.MAX_ITER 351840`.

Schedules: `1x` and `3x` are Detectron2's. `2x` is the authors': 180,000 batches of 16 images, with
decays at 150,000 and 170,000. `17e` and the like count epochs of the dataset, with Detectron2's own
decays.

**Of these configs, only those of the digits have been trained with this code.** The column
"published" has results of others, with their code, for the same model and the norm that is named.
In brackets: the source ([authors] are those of the paper), the images of all GPUs together, and the
schedule if it is another one. The published `FrozenBN` models have a box head of two fully
connected layers.

Published models start from ImageNet weights, unless they are called `scratch`. These configs start
from random weights, for which `1x` and `2x` are too short:
[convert weights](docs/weights.md) first, and name them by `MODEL.WEIGHTS`.
"""

_LAZY_HEADER = """\
## LazyConfig

Detectron2's own LazyConfigs. `train.norm` sets the norm. They start from random weights, with 8
images per step, for 8 GPUs; `configs/LazyConfig/common.py` says how to change that.

```
tools/lazyconfig_train_net.py --num-gpus 8 --config-file {example} train.norm=BCN+WS
```

"""

# The files of a model and schedule, by norm and images per GPU.
Files = Dict[str, Dict[str, Path]]
# Those of a folder, by model and schedule.
Folder = Dict[str, Dict[str, Files]]


def find_configs(configs: Path) -> Dict[str, Folder]:
    """The configs by the parts of their names, and by folder.

    Raises:
        ValueError: naming a file whose name has other parts.
    """
    found: Dict[str, Folder] = {}
    for path in sorted(configs.rglob("*.yaml")):
        if path.name.startswith("Base-") or "_base_" in path.parts:
            continue
        match = _NAME.fullmatch(path.stem)
        if match is None:
            raise ValueError(
                f"{path}: the name must be MODEL_NORM.yaml or MODEL_NORM_SCHEDULE_IMAGESimg.yaml, "
                f"and NORM one of {', '.join(_NORMS)}"
            )
        schedules = found.setdefault(path.parent.name, {}).setdefault(match["model"], {})
        files = schedules.setdefault(match["schedule"] or "", {})
        files.setdefault(match["norm"], {})[match["images"] or "1"] = path
    return found


def weights(path: Path) -> str:
    """What a config starts from, in a word."""
    value = CfgNode.load_yaml_with_base(str(path))["MODEL"].get("WEIGHTS", "")
    return re.sub(r"^.*?//(?:ImageNetPretrained/)?", "", value) or "random"


def published(entry: Dict[str, Any]) -> str:
    """Metrics, source, batch and schedule of a result."""
    about = ("norm", "source", "batch", "schedule")
    metrics = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in about)
    source = [f"[{entry['source']}]", str(entry["batch"]), entry.get("schedule", "")]
    return f"{metrics} ({', '.join(filter(None, source))})"


def _links(files: Dict[str, Path]) -> str:
    return ", ".join(f"[{images}]({path.relative_to(ROOT)})" for images, path in files.items())


def _table(header: List[str], rows: List[List[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def table_of_models(folder: str, models: Folder, results: Dict[str, Any]) -> str:
    """The table of models with one recipe per norm; takes what it shows out of ``results``."""
    rows = []
    for model, schedules in models.items():
        for schedule, files in schedules.items():
            links = [
                f"[{_NORMS[norm]}]({files[norm]['1'].relative_to(ROOT)})"
                for norm in sorted(files, key=list(_NORMS).index)
            ]
            found = results.pop(f"{folder}/{model}_{schedule}", [])
            cell = "<br>".join(f"{entry['norm']}: {published(entry)}" for entry in found)
            mark = " \\*" if model.startswith(_OF_PROJECTS) else ""
            rows.append([model + mark, schedule, " ".join(links), cell])
    return _table(["model", "schedule", "configs", "published"], rows)


def table_of_norms(
    folder: str, model: str, schedules: Dict[str, Files], results: Dict[str, Any]
) -> str:
    """The table of a model with many norms; takes what it shows out of ``results``."""
    cells: Dict[str, List[str]] = {}
    for schedule in schedules:
        for entry in results.pop(f"{folder}/{model}_{schedule}", []):
            of_schedule = "" if "schedule" in entry else f"{schedule}: "
            cells.setdefault(entry["norm"], []).append(of_schedule + published(entry))
    rows = []
    for norm in (norm for norm in _NORMS if all(norm in files for files in schedules.values())):
        paths = [files[norm] for files in schedules.values()]
        cell = "<br>".join(cells.pop(_NORMS[norm], []))
        rows.append([_NORMS[norm], weights(paths[0]["1"]), *map(_links, paths), cell])
    if cells:
        raise ValueError(f"{PUBLISHED}: {folder}/{model} has no config with {', '.join(cells)}")
    columns = [f"{schedule}, images per GPU".lstrip(", ") for schedule in schedules]
    return _table(["norm", "starts from", *columns, "published"], rows)


def lazy_configs() -> List[Path]:
    """The LazyConfigs, relative to the root of the repository."""
    files = sorted((ROOT / "configs" / "LazyConfig").glob("*_*.py"))
    return [path.relative_to(ROOT) for path in files]


def section_of_lazy_configs() -> str:
    """The section on LazyConfigs."""
    paths = lazy_configs()
    links = "".join(f"- [{path.stem}]({path})\n" for path in paths)
    return _LAZY_HEADER.format(example=paths[0]) + links


def page() -> str:
    """The text of MODEL_ZOO.md.

    Raises:
        ValueError: if a published result is of a config that does not exist.
    """
    data = yaml.safe_load(PUBLISHED.read_text())
    results = data["results"]
    found = find_configs(ROOT / "configs")
    files = [f for models in found.values() for s in models.values() for f in s.values()]
    count = sum(len(by_images) for by_norm in files for by_images in by_norm.values())
    parts = [_HEADER.format(yaml=count, lazy=len(lazy_configs()))]
    for folder, models in found.items():
        parts.append(f"## {folder}\n")
        recipes = {
            model: schedules
            for model, schedules in models.items()
            if all(len(files) == 2 for files in schedules.values())
        }
        if recipes:
            parts.append(table_of_models(folder, recipes, results))
        if any(model.startswith(_OF_PROJECTS) for model in recipes):
            parts.append(
                "\\* For the `train_net.py` of Detectron2's project of that name, with "
                "`import wsbcn_d2` in it:\n[docs/in_your_project.md](docs/in_your_project.md).\n"
            )
        for model, schedules in models.items():
            if model not in recipes:
                parts.append(f"### {model}\n")
                parts.append(table_of_norms(folder, model, schedules, results))
    if results:
        raise ValueError(f"{PUBLISHED}: there is no config for {', '.join(sorted(results))}")
    parts.append(section_of_lazy_configs())
    parts.append("".join(f"[{name}]: {url}\n" for name, url in data["sources"].items()))
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
