"""The folder that a training run of Detectron2 leaves behind."""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import yaml
from detectron2.config import get_cfg

from ..config import add_wsbcn_config, flatten_config
from ..data import register_coco_format

RESULTS_FILE = "coco_instances_results.json"

# Keys that do not change what is trained, or are what seeds of one setting differ in.
_NOT_A_SETTING = (
    "OUTPUT_DIR",
    "SEED",
    "VERSION",
    "VIS_PERIOD",
    "CUDNN_BENCHMARK",
    "DATASETS.COCO_FORMAT",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)
# A backbone of this package computes the same as Detectron2's of this name.
_OUR_BACKBONE, _STOCK_BACKBONE = "build_wsbcn_", "build_"
# Two seeds of a setting may be told apart by the end of the folder's name: gn_s1, gn-seed2.
_SEED_SUFFIX = re.compile(r"[-_.](?:s|seed)[-_]?\d+$")


@dataclass
class Run:
    """What there is in the folder of a run; whatever is missing is None or empty.

    Attributes:
        folder: path.
        settings: the config as ``{"MODEL.FPN.NORM": "GN", ...}``, with the defaults of Detectron2
            and of this package for keys that it lacks.
        test_datasets: DATASETS.TEST.
        predictions_file: COCO results of the last evaluation.
        metrics: the lines of metrics.json, in order of iteration.
        peak_memory: largest memory that was allocated on the GPU, in MiB, from log.txt.
        checkpoint: file of the last checkpoint.
        parameters: number of parameters and buffers in the checkpoint.
        notes: what is missing or odd, in words.
    """

    folder: Path
    settings: Dict[str, Any] = field(default_factory=dict)
    test_datasets: Tuple[str, ...] = ()
    predictions_file: Optional[Path] = None
    metrics: List[Dict[str, Any]] = field(default_factory=list)
    peak_memory: Optional[float] = None
    checkpoint: Optional[Path] = None
    parameters: Optional[int] = None
    notes: List[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def norm(self) -> Optional[str]:
        """The norm options of the config in one string, for example ``GN`` or ``GN, FPN BN``."""
        norms = {
            key.split(".")[-2]: value
            for key, value in self.settings.items()
            if key.endswith(".NORM") and _is_used(key, self.settings) and isinstance(value, str)
        }
        if not norms:
            return None
        common = norms.get("RESNETS", Counter(norms.values()).most_common(1)[0][0])
        others = [f"{part} {value or 'none'}" for part, value in norms.items() if value != common]
        return ", ".join([common or "none", *others])

    @property
    def seconds_per_iteration(self) -> Optional[float]:
        """Median over the training."""
        times = [line["time"] for line in self.metrics if "time" in line]
        return median_high(times) if times else None

    @property
    def iterations(self) -> Optional[int]:
        """How many were trained."""
        counts = [line["iteration"] + 1 for line in self.metrics if "total_loss" in line]
        return max(counts, default=None)

    def curve(self, key: str) -> Tuple[List[int], List[float]]:
        """Iterations and finite values of an entry of metrics.json."""
        points = {
            line["iteration"]: line[key]
            for line in self.metrics
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        }
        return list(points), list(points.values())

    def load_predictions(self) -> List[Dict[str, Any]]:
        """The detections of the last evaluation, in COCO's result format.

        Raises:
            ValueError: if there are none, or the file is broken.
        """
        if self.predictions_file is None:
            raise ValueError(f"{self.folder} has no {RESULTS_FILE}")
        return _load_json(self.predictions_file)


def read_run(folder: str) -> Run:
    """Reads what there is in the output folder of a run.

    Args:
        folder: OUTPUT_DIR of any training with Detectron2.

    Returns:
        The run; what is missing, and what cannot be read, is said in its ``notes``.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds nothing of a run.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {folder!r}")
    run = Run(path)
    _read_config(run)
    _read_metrics(run)
    _read_log(run)
    _find_checkpoint(run)
    _find_predictions(run)
    if not (run.settings or run.metrics or run.checkpoint or run.predictions_file):
        raise ValueError(
            f"{folder!r} is not the output folder of a run: it has none of config.yaml, "
            f"metrics.json, inference/{RESULTS_FILE} and a checkpoint"
        )
    return run


def register_datasets(run: Run) -> None:
    """Registers the datasets of ``DATASETS.COCO_FORMAT`` in the config of a run.

    Raises:
        ValueError: if one of them has the name of another.
    """
    register_coco_format(run.settings.get("DATASETS.COCO_FORMAT") or ())


def split_label(argument: str, separator: str = "") -> Tuple[str, List[str]]:
    """Splits ``LABEL=PATH`` of a command line where a path begins; both may have a "=", too.

    Args:
        argument: a path, or a label, "=" and a path.
        separator: between several paths; empty: there is one.

    Returns:
        The label, empty if there is none, and the paths. If there is nothing at any of the paths
        that it could be, they are what is behind the first "=", unless a "/" is before it.
    """
    choices = [("", argument)] + [
        (argument[:i], argument[i + 1 :]) for i, sign in enumerate(argument) if sign == "="
    ]
    for label, path in choices:
        if os.path.exists(path):
            return label, [path]
        if separator and all(map(os.path.exists, path.split(separator))):
            return label, path.split(separator)
    has_label = len(choices) > 1 and not os.path.dirname(choices[1][0])
    label, path = choices[1] if has_label else choices[0]
    return label, path.split(separator) if separator else [path]


def label_by_config(runs: Sequence[Run]) -> List[str]:
    """A label for each run: its norm, and the other settings in which it differs from most.

    Runs with the same label differ in nothing but the seed and what does not matter. A run without
    a config has the name of its folder.
    """
    settings = [_relevant(run.settings) for run in runs]
    known = [s for s in settings if s]
    # Norms of parts are in the norm of the run.
    in_norm = [key for s in known for key in s if key.endswith(".NORM") and _is_known(key, s)]
    keys = sorted({key for s in known for key in s} - set(in_norm))
    differing = []
    for key in keys:
        values = Counter(repr(s.get(key)) for s in known)
        if len(values) > 1:
            differing.append((key, values.most_common(1)[0][0]))
    short = Counter(key.rsplit(".", 1)[-1] for key, _ in differing)
    short["ENABLED"] += 1  # says nothing on its own
    labels, names = [], dict(zip((run.folder for run in runs), label_by_name(runs)))
    for run, own in zip(runs, settings):
        if not own:
            labels.append(names[run.folder])
            continue
        parts = [run.norm or "no norm"]
        for key, usual in differing:
            if repr(own.get(key)) != usual:
                last = key.rsplit(".", 1)[-1]
                parts.append(f"{last if short[last] == 1 else key}={own.get(key)}")
        labels.append(", ".join(parts))
    return labels


def label_by_folder(runs: Sequence[Run]) -> List[str]:
    """A label for each run: the name of its folder without the seed at its end, ``gn_s1``."""
    return [_SEED_SUFFIX.sub("", run.name) or run.name for run in runs]


def label_by_name(runs: Sequence[Run]) -> List[str]:
    """A label for each run: the name of its folder, with those above where names are equal."""
    folders = [run.folder.resolve() for run in runs]
    most = max((len(folder.parts) for folder in folders), default=1)
    for length in range(1, most + 1):
        labels = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(labels)) == len(set(folders)):
            break
    return labels


def _read_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    if not path.is_file():
        run.notes.append("no config.yaml")
        return
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        run.notes.append(f"config.yaml cannot be read ({str(error).splitlines()[0]})")
        return
    if not isinstance(content, dict) or "MODEL" not in content:
        run.notes.append("config.yaml is not one of Detectron2's YACS configs")
        return
    run.settings = {**_defaults(), **flatten_config(content)}
    run.test_datasets = tuple(run.settings.get("DATASETS.TEST") or ())


def _read_metrics(run: Run) -> None:
    path = run.folder / "metrics.json"
    if not path.is_file():
        run.notes.append("no metrics.json: no learning curve, no times")
        return
    broken = 0
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            entry["iteration"] = int(entry["iteration"])
            run.metrics.append(entry)
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
            broken += 1
    if broken:
        run.notes.append(f"metrics.json: {broken} lines cannot be read")
    run.metrics.sort(key=lambda entry: entry["iteration"])  # stable; a resumed run overlaps


def _read_log(run: Run) -> None:
    path = run.folder / "log.txt"
    if path.is_file():
        peaks = re.findall(r"max_mem: (\d+)M", path.read_text(errors="replace"))
        run.peak_memory = max(map(float, peaks), default=None)


def _find_checkpoint(run: Run) -> None:
    names = ["model_final.pth"]
    last = run.folder / "last_checkpoint"
    if last.is_file():
        names.insert(0, os.path.basename(last.read_text().strip()))
    found = [run.folder / name for name in names if name and (run.folder / name).is_file()]
    if not found:
        run.notes.append("no checkpoint")
        return
    run.checkpoint = found[0]
    try:
        content = torch.load(run.checkpoint, map_location="meta", weights_only=True)
        weights = content.get("model", content)
        run.parameters = sum(w.numel() for w in weights.values() if torch.is_tensor(w))
    except Exception as error:  # of many kinds, for files that are cut short or of other programs
        run.notes.append(f"{run.checkpoint.name} cannot be read ({type(error).__name__})")


def _find_predictions(run: Run) -> None:
    folder = run.folder / "inference"
    found = sorted(folder.rglob(RESULTS_FILE), key=lambda path: len(path.parts))
    if found:
        run.predictions_file = found[0]
        if len(found) > 1:
            run.notes.append(
                f"{len(found)} files {RESULTS_FILE}; used {found[0].relative_to(run.folder)}"
            )
        return
    note = f"no inference/{RESULTS_FILE}: no intervals"
    if run.checkpoint is not None:
        note += ". Evaluating the checkpoint (train_net.py --eval-only) writes it"
    run.notes.append(note)


def _load_json(path: Path) -> List[Dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, list):
        raise ValueError(
            f"{path} must hold a list in COCO's result format, not {type(content).__name__}"
        )
    return content


def _defaults() -> Dict[str, Any]:
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    return flatten_config(yaml.safe_load(cfg.dump()))


def _relevant(settings: Dict[str, Any]) -> Dict[str, Any]:
    relevant = {key: value for key, value in settings.items() if key not in _NOT_A_SETTING}
    name = relevant.get("MODEL.BACKBONE.NAME")
    if isinstance(name, str):
        relevant["MODEL.BACKBONE.NAME"] = name.replace(_OUR_BACKBONE, _STOCK_BACKBONE)
    return relevant


_WITH_ROI_HEADS = ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork")
_ARCHITECTURES = (*_WITH_ROI_HEADS, "RetinaNet", "SemanticSegmentor", "PanopticDeepLab")


def _is_known(norm_key: str, settings: Dict[str, Any]) -> bool:
    """Whether :func:`_is_used` knows the part of the model that a NORM key belongs to."""
    if norm_key.split(".")[-2] in ("RESNETS", "FPN"):
        return "resnet" in str(settings.get("MODEL.BACKBONE.NAME", "resnet"))
    return settings.get("MODEL.META_ARCHITECTURE", "") in ("", *_ARCHITECTURES)


def _is_used(norm_key: str, settings: Dict[str, Any]) -> bool:
    """Whether the part of the model that a NORM key belongs to is there, where that is known."""
    part = norm_key.split(".")[-2]
    architecture = settings.get("MODEL.META_ARCHITECTURE", "")
    roi_heads = architecture in _WITH_ROI_HEADS
    if part == "RESNETS":
        return "resnet" in str(settings.get("MODEL.BACKBONE.NAME", "resnet"))
    if part == "FPN":
        return "fpn" in str(settings.get("MODEL.BACKBONE.NAME", "fpn"))
    if part == "ROI_BOX_HEAD":
        return roi_heads and (settings.get("MODEL.ROI_BOX_HEAD.NUM_CONV") or 0) > 0
    if part == "ROI_MASK_HEAD":
        return roi_heads and bool(settings.get("MODEL.MASK_ON"))
    if part == "RETINANET":
        return architecture == "RetinaNet"
    if part == "SEM_SEG_HEAD":
        return architecture in ("PanopticFPN", "SemanticSegmentor", "PanopticDeepLab")
    return bool(settings[norm_key])
