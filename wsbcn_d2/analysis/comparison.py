"""Runs side by side: AP with intervals, differences, time, memory and learning curves.

Two kinds of chance are kept apart. *Images*: another validation set of the same size and kind would
give another AP; the bootstrap over images estimates by how much, and because all runs are evaluated
on the same draws, the interval of a difference is that of the difference itself (paired). *Seeds*:
the same training with another seed gives another AP; only repeated runs tell by how much.
"""

import datetime
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from tqdm import tqdm

from ..data import check_datasets
from ..data.coco_format import load_coco
from ..engine.checkpoint import atomic_write
from ..engine.evaluation import AP_AT_100, COCO_MAX_DETECTIONS
from ..version import __version__
from .coco import IOU_TYPES, METRICS, CocoEvaluation, resample_images
from .files import load_kind
from .runs import Run, register_datasets

Results = Dict[str, Any]  # what is written to JSON

KIND = "comparison"
CONFIDENCE = 95  # percent
_CURVE_POINTS = 60

# Draws evaluated between two steps of the progress bar.
_DRAWS_PER_STEP = 50

# Two-sided 95 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
_STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)

# (draws,) of each metric of a run or a group, by type of IoU
_Draws = Dict[str, Dict[str, np.ndarray]]

# by type of IoU and metric: "value" in percent, "low" and "high"; None where unknown
_AP = Dict[str, Dict[str, Dict[str, Any]]]


def compare_runs(
    runs: Sequence[Run],
    labels: Sequence[str],
    *,
    dataset: Optional[str] = None,
    annotations: Optional[str] = None,
    num_draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Results:
    """Evaluates runs on the same dataset and compares them.

    Args:
        runs: from :func:`.runs.read_run`. Those without predictions take part with what they have.
        labels: one for each run; runs with the same label are seeds of one setting, a group.
        dataset: name of the registered dataset of the predictions. Default: the last one of the
            runs' DATASETS.TEST, whose predictions are those that remain.
        annotations: its COCO annotation file, for a dataset that is not registered.
        num_draws: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
        progress: show progress bars.

    Returns:
        What :mod:`.comparison_page` shows, of types that JSON knows. All AP are in percent.

    Raises:
        ValueError: if the runs do not fit together, or their predictions to the dataset.
        FileNotFoundError: if the annotations are missing.
    """
    if len(runs) != len(labels) or not runs:
        raise ValueError(f"{len(runs)} runs and {len(labels)} labels: as many, at least 1, needed")
    if num_draws < 0:
        raise ValueError(f"the number of draws must not be negative, got {num_draws}")
    notes = [list(run.notes) for run in runs]
    name, file = _find_annotations(runs, dataset, annotations)
    evaluated: List[Dict[str, Dict[str, float]]] = [{} for _ in runs]
    draws: List[_Draws] = [{} for _ in runs]
    description: Dict[str, Any] = {"name": name}
    if file is not None:
        ground_truth = load_coco(file)
        if "annotations" not in ground_truth.dataset:
            raise ValueError(f"{file!r} has no annotations, so there is no AP to compare")
        description.update(
            images=len(ground_truth.getImgIds()),
            instances=len(ground_truth.getAnnIds(iscrowd=False)),
            classes=[c["name"] for c in ground_truth.loadCats(ground_truth.getCatIds())],
        )
        weights = resample_images(description["images"], num_draws, seed)
        with_predictions = [i for i, run in enumerate(runs) if run.predictions_file is not None]
        steps = (
            len(with_predictions) * len(IOU_TYPES) * math.ceil(max(num_draws, 1) / _DRAWS_PER_STEP)
        )
        with tqdm(total=steps, desc="AP and bootstrap", disable=not progress) as bar:
            for i in with_predictions:
                bar.set_postfix_str(runs[i].name)
                evaluated[i], draws[i] = _evaluate(ground_truth, runs[i], weights, bar)
                notes[i] += _disagreements(runs[i], evaluated[i]) + _limits(runs[i], evaluated[i])
    for i, run in enumerate(runs):
        if not evaluated[i]:
            evaluated[i] = _last_metrics(run, name)

    return _assemble(
        description,
        {"draws": num_draws, "seed": seed, "confidence": CONFIDENCE},
        [
            _describe(run, label, values, own, note)
            for run, label, values, own, note in zip(runs, labels, evaluated, draws, notes)
        ],
        draws,
    )


def merge_results(parts: Mapping[str, Results]) -> Results:
    """Several comparisons on one dataset as one, whose groups are the runs with the same label.

    A group, or a pair of groups, that comes whole from one part is as it is there. Of the others
    only AP has intervals: a file has the draws of no other metric.

    Args:
        parts: comparisons by what to call them in errors.

    Raises:
        ValueError: if they differ in the dataset or the bootstrap, or have a run in common.
    """
    first = next(iter(parts))
    # that of runs without predictions is known by its name only
    fullest = max(parts, key=lambda name: len(parts[name]["dataset"]))
    dataset, bootstrap = parts[fullest]["dataset"], parts[first]["bootstrap"]
    runs: List[Dict[str, Any]] = []
    origin: List[str] = []
    for name, part in parts.items():
        if part["dataset"] not in (dataset, {"name": dataset["name"]}):
            datasets = f"{_dataset(dataset)} and {_dataset(part['dataset'])}"
            raise ValueError(f"{fullest} and {name} are of different datasets: {datasets}")
        if part["bootstrap"] != bootstrap:
            raise ValueError(
                f"{first} and {name} differ in the bootstrap: {bootstrap} and {part['bootstrap']}"
            )
        for run in part["runs"]:
            for other, where in zip(runs, origin):
                if _is_same(run, other):
                    raise ValueError(
                        f"the run {run['name']!r} is both in {where} and in {name}; a run is one "
                        "seed of its setting"
                    )
            runs.append(run)
            origin.append(name)
    draws: List[_Draws] = [
        {kind: {"AP": np.array(own, dtype=float)} for kind, own in run.get("draws", {}).items()}
        for run in runs
    ]
    merged = _assemble(dataset, bootstrap, runs, draws)
    size = {group["label"]: group["runs"] for group in merged["groups"]}
    for part in parts.values():
        whole = {g["label"]: g["ap"] for g in part["groups"] if g["runs"] == size[g["label"]]}
        for group in merged["groups"]:
            group["ap"] = whole.get(group["label"], group["ap"])
        for pair in merged["differences"]:
            if pair["of"] in whole and pair["minus"] in whole:
                pair["ap"] = difference(part, pair["of"], pair["minus"])
    return merged


def write_results(results: Results, path: str) -> None:
    """Writes the results to a JSON file, a line for each run, group and pair."""
    lines = []
    for key, value in results.items():
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value)
            lines.append(f"{json.dumps(key)}: [\n  {items}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    with atomic_write(path, "w") as file:
        file.write("{\n " + ",\n ".join(lines) + "\n}\n")


def load_results(path: str) -> Results:
    """Reads what :func:`write_results` has written.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else.
    """
    return load_kind(path, KIND, ["runs", "groups"])


def difference(results: Results, of: str, minus: str) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """The difference of two groups, whichever way round it was stored.

    Returns:
        By type of IoU and metric: ``value``, ``low`` and ``high`` of the interval over images, and
        ``seeds``, half the interval over seeds; those that are unknown are None.
    """
    for pair in results["differences"]:
        if (pair["of"], pair["minus"]) == (of, minus):
            return pair["ap"]
        if (pair["of"], pair["minus"]) == (minus, of):
            return {
                kind: {metric: _negative(entry) for metric, entry in metrics.items()}
                for kind, metrics in pair["ap"].items()
            }
    raise KeyError(f"no difference of {of!r} and {minus!r}")


def verdict(entry: Dict[str, Any]) -> str:
    """What a difference amounts to: "better", "worse", or why that cannot be said."""
    value, low, high, seeds = (entry[key] for key in ("value", "low", "high", "seeds"))
    if value is None:
        return ""
    if low is None and seeds is None:
        return "no intervals"
    if low is not None and low <= 0 <= high:
        return "within the noise of images"
    if seeds is not None and abs(value) <= seeds:
        return "within the noise of seeds"
    word = "better" if value > 0 else "worse"
    if seeds is None:
        return f"{word} on these images; seeds unknown"
    return word if low is not None else f"{word} over seeds; images unknown"


def _assemble(
    dataset: Dict[str, Any],
    bootstrap: Dict[str, Any],
    runs: Sequence[Dict[str, Any]],
    draws: Sequence[_Draws],
) -> Results:
    """The results of described runs: their groups, and every group against every other."""
    members: Dict[str, List[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        members[run["label"]].append(i)
    groups = {
        label: _Group([runs[i]["ap"] for i in m], [draws[i] for i in m])
        for label, m in members.items()
    }
    return {
        "kind": KIND,
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "command": _command(),
        "dataset": dataset,
        "bootstrap": bootstrap,
        "runs": list(runs),
        "groups": [
            {"label": label, "runs": len(members[label]), "ap": group.summary()}
            for label, group in groups.items()
        ],
        "differences": [
            {"of": a, "minus": b, "ap": _difference(groups[a], groups[b])}
            for a, b in combinations(groups, 2)
        ],
    }


class _Group:
    """Values and draws of the runs of a group, as far as they have any."""

    def __init__(self, runs: Sequence[_AP], draws: Sequence[_Draws]) -> None:
        self.values: Dict[str, Dict[str, List[float]]] = {}
        self.draws: _Draws = {}
        for kind in IOU_TYPES:
            having = [i for i, ap in enumerate(runs) if kind in ap]
            if not having:
                continue
            metrics = list(runs[having[0]][kind])
            self.values[kind] = {m: [_value(runs[i][kind].get(m)) for i in having] for m in metrics}
            own = [draws[i].get(kind, {}) for i in having]
            self.draws[kind] = {
                m: np.mean([d[m] for d in own], axis=0) for m in metrics if all(m in d for d in own)
            }

    def summary(self) -> _AP:
        """Mean over the runs, its interval over images, and the spread over seeds."""
        return {
            kind: {
                metric: {
                    **_ap_interval(float(np.mean(values)), self.draws[kind].get(metric)),
                    "sd": _number(np.std(values, ddof=1)) if len(values) > 1 else None,
                    "seeds": [_number(v) for v in values],
                }
                for metric, values in metrics.items()
            }
            for kind, metrics in self.values.items()
        }


def _difference(a: _Group, b: _Group) -> _AP:
    result: _AP = {}
    for kind in IOU_TYPES:
        if kind not in a.values or kind not in b.values:
            continue
        result[kind] = {}
        for metric in METRICS:
            of, minus = a.values[kind].get(metric), b.values[kind].get(metric)
            if of is None or minus is None:
                continue
            draws = None
            if metric in a.draws[kind] and metric in b.draws[kind]:
                draws = a.draws[kind][metric] - b.draws[kind][metric]
            result[kind][metric] = {
                **_interval(float(np.mean(of) - np.mean(minus)), draws),
                "seeds": _number(seed_noise(of, minus)),
            }
    return result


def seed_noise(a: Sequence[float], b: Sequence[float]) -> float:
    """Half of Welch's 95 % interval for the difference of the means over seeds; NaN with one."""
    if len(a) < 2 or len(b) < 2:
        return math.nan
    squares = [np.var(x, ddof=1) / len(x) for x in (a, b)]
    total = sum(squares)
    if not total > 0:
        return float(total)
    freedom = total**2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, (a, b)))
    return _student_t(freedom) * math.sqrt(total)


def _student_t(degrees_of_freedom: float) -> float:
    whole = max(1, int(degrees_of_freedom))  # rounded down: a wider interval
    return _STUDENT_T[whole - 1] if whole <= len(_STUDENT_T) else 2.086


def _interval(value: float, draws: Optional[np.ndarray]) -> Dict[str, Any]:
    """The value with its bootstrap interval.

    The interval is that of the deviation of a draw from the mean of the draws: what another set of
    images of this size would change. It is not that of the draws themselves, whose mean is above
    the value: images that occur twice are fewer different ones, and the precision that AP takes at
    each recall is the maximum of a curve that is then more jagged.
    """
    low = high = math.nan
    if draws is not None and np.isfinite(draws).any():
        tail = (100 - CONFIDENCE) / 2
        low, high = value + np.nanpercentile(draws, [tail, 100 - tail]) - np.nanmean(draws)
    return {"value": _number(value), "low": _number(low), "high": _number(high)}


def _ap_interval(value: float, draws: Optional[np.ndarray]) -> Dict[str, Any]:
    """The interval of an AP, which is not below 0 nor above 100."""
    entry = _interval(value, draws)
    for end in ("low", "high"):
        if entry[end] is not None:
            entry[end] = min(max(entry[end], 0.0), 100.0)
    return entry


def _is_same(a: Dict[str, Any], b: Dict[str, Any]) -> bool:
    """Whether two descriptions are of one run, whose files may have gone in part between them."""
    if (a["name"], a["seed"]) != (b["name"], b["seed"]):
        return False
    losses = [run["curves"].get("total_loss") for run in (a, b)]
    return losses[0] == losses[1] if all(losses) else a["ap"] == b["ap"]


def _dataset(description: Dict[str, Any]) -> str:
    text = repr(description["name"])
    if "images" in description:
        text += " of {images} images, {instances} objects and ".format(**description)
        text += f"{len(description['classes'])} classes"
    return text


def _command() -> str:
    """The command line, with the last part of paths only: the rest is of no use elsewhere."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(re.sub(r"[^=,]*/(?=[^=,/])", "", word.rstrip("/")) for word in words)


def _number(value: float, digits: int = 4) -> Optional[float]:
    """For JSON, which has no NaN. Rounding keeps the files small; AP are shown with 1 digit."""
    return round(float(value), digits) if math.isfinite(value) else None


def _value(entry: Optional[Dict[str, Any]]) -> float:
    return math.nan if entry is None or entry["value"] is None else entry["value"]


def _negative(entry: Dict[str, Any]) -> Dict[str, Any]:
    value, low, high = (None if entry[k] is None else -entry[k] for k in ("value", "high", "low"))
    return {**entry, "value": value, "low": low, "high": high}


def _find_annotations(
    runs: Sequence[Run], dataset: Optional[str], annotations: Optional[str]
) -> Tuple[str, Optional[str]]:
    """Name and annotation file of the dataset; no file if nothing needs one."""
    if annotations is not None:
        if not Path(annotations).is_file():
            raise FileNotFoundError(f"there is no annotation file {annotations!r}")
        return dataset or Path(annotations).stem, annotations
    if dataset is None:
        names = {run.test_datasets[-1]: run for run in runs if run.test_datasets}
        if len(names) > 1:
            found = ", ".join(f"{name!r} ({run.name})" for name, run in names.items())
            raise ValueError(
                f"the runs were evaluated on different datasets: {found}. Only runs on one can be "
                "compared; if the predictions of all are of one, name it as the dataset"
            )
        if names:
            dataset = next(iter(names))
    if not any(run.predictions_file for run in runs):
        return dataset or "unknown", None
    if dataset is None:
        raise ValueError(
            "no config.yaml says which dataset the predictions are of: name the dataset or its "
            "annotation file"
        )
    for run in runs:
        register_datasets(run)
    check_datasets([dataset])
    file = MetadataCatalog.get(dataset).get("json_file")
    if file is None:
        raise ValueError(f"{dataset!r} is no dataset in COCO format: it has no json_file")
    return dataset, file


def _max_detections(run: Run, predictions: Sequence[Dict[str, Any]]) -> int:
    """How many detections of an image the config of a run allows, at least COCO's number."""
    limit = run.settings.get("TEST.DETECTIONS_PER_IMAGE", COCO_MAX_DETECTIONS)
    return max(len(predictions) if limit < 0 else limit, COCO_MAX_DETECTIONS)


def _evaluate(
    ground_truth: COCO, run: Run, weights: np.ndarray, bar: "tqdm[Any]"
) -> Tuple[Dict[str, Dict[str, float]], _Draws]:
    predictions = run.load_predictions()
    kinds = ["bbox"]
    if _has_masks(ground_truth, predictions, run):
        kinds.append("segm")
    values: Dict[str, Dict[str, float]] = {}
    draws: _Draws = {}
    limit = _max_detections(run, predictions)
    for kind in kinds:
        try:
            evaluation = CocoEvaluation(ground_truth, predictions, kind, limit)
            values[kind] = {name: float(value[0]) for name, value in evaluation.evaluate().items()}
            if limit > COCO_MAX_DETECTIONS:
                standard = CocoEvaluation(ground_truth, predictions, kind).evaluate()
                values[kind][AP_AT_100] = float(standard["AP"][0])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run.predictions_file}: {error}") from error
        parts = []
        for start in range(0, len(weights), _DRAWS_PER_STEP):
            parts.append(evaluation.evaluate(weights[start : start + _DRAWS_PER_STEP]))
            bar.update()
        if parts:
            draws[kind] = {m: np.concatenate([part[m] for part in parts]) for m in parts[0]}
        else:
            bar.update()
    return values, draws


def _has_masks(ground_truth: COCO, predictions: Sequence[Dict[str, Any]], run: Run) -> bool:
    if not any(a.get("segmentation") for a in ground_truth.anns.values()):
        return False
    if predictions:
        return any("segmentation" in p for p in predictions if isinstance(p, dict))
    return bool(run.settings.get("MODEL.MASK_ON"))


def _disagreements(run: Run, values: Dict[str, Dict[str, float]]) -> List[str]:
    """Whether the last AP that the run itself logged is another one."""
    for kind, metrics in values.items():
        _, logged = run.curve(f"{kind}/AP")
        # Detectron2's own trainer logs COCO's, whatever the config says.
        computed = [metrics[name] for name in ("AP", AP_AT_100) if name in metrics]
        if logged and all(abs(logged[-1] - value) > 1e-3 for value in computed):
            return [
                f"the last {IOU_TYPES[kind]} AP in metrics.json is {logged[-1]:.2f}, but the "
                f"predictions have {metrics['AP']:.2f}: they are of another evaluation"
            ]
    return []


def _limits(run: Run, values: Dict[str, Dict[str, float]]) -> List[str]:
    """That AP is not COCO's, whose limit of detections would change it."""
    with_100 = [
        f"{IOU_TYPES[kind]} AP {metrics[AP_AT_100]:.2f} instead of {metrics['AP']:.2f}"
        for kind, metrics in values.items()
        if AP_AT_100 in metrics
    ]
    if not with_100:
        return []
    return [
        "all detections that TEST.DETECTIONS_PER_IMAGE "
        f"({run.settings['TEST.DETECTIONS_PER_IMAGE']}) allows count; with COCO's "
        f"{COCO_MAX_DETECTIONS} for each class of an image it is {', '.join(with_100)}"
    ]


def _last_metrics(run: Run, dataset: str) -> Dict[str, Dict[str, float]]:
    """AP from metrics.json, which has no intervals."""
    values: Dict[str, Dict[str, float]] = {}
    of_one = not run.test_datasets or run.test_datasets[-1] == dataset
    for kind in IOU_TYPES:
        # The latter with several datasets.
        for prefix in [f"{kind}/"] * of_one + [f"{dataset}/{kind}/"]:
            lines = [line for line in run.metrics if prefix + "AP" in line]
            if lines:
                values[kind] = {
                    key[len(prefix) :]: float(value)
                    for key, value in lines[-1].items()
                    if key.startswith(prefix)
                }
    return values


def _describe(
    run: Run,
    label: str,
    values: Dict[str, Dict[str, float]],
    draws: _Draws,
    notes: List[str],
) -> Dict[str, Any]:
    curves = {}
    for key in ("total_loss", "bbox/AP", "segm/AP"):
        iterations, points = run.curve(key)
        if points:
            step = math.ceil(len(points) / _CURVE_POINTS)
            # from the end, so that the last point is there
            curves[key] = [iterations[::-step][::-1], [_number(p) for p in points[::-step][::-1]]]
    seconds = run.seconds_per_iteration
    return {
        "name": run.name,
        "label": label,
        "norm": run.norm,
        "seed": run.settings.get("SEED"),
        "images_per_step": run.settings.get("SOLVER.IMS_PER_BATCH"),
        "iterations": run.iterations,
        "seconds_per_iteration": None if seconds is None else round(seconds, 5),
        "peak_memory_mib": run.peak_memory,
        "checkpoint_numbers": run.parameters,
        "ap": {
            kind: {m: _ap_interval(v, draws.get(kind, {}).get(m)) for m, v in metrics.items()}
            for kind, metrics in values.items()
        },
        # those of AP alone: all would make the file ten times as large
        "draws": {kind: [_number(v, 2) for v in own["AP"]] for kind, own in draws.items()},
        "curves": curves,
        "notes": notes,
    }
