"""The page of a comparison, from its results alone."""

import re
from statistics import median
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .coco import IOU_TYPES, METRICS
from .comparison import Results, difference, verdict
from .page import AS_WRITTEN, Block, Heading, Page, Picture, Table, Text

_MISSING = "–"


def check_baseline(baseline: Optional[str], labels: Sequence[str]) -> None:
    """Raises ValueError if there is a baseline, and no group with that label."""
    if baseline is not None and baseline not in labels:
        groups = ", ".join(dict.fromkeys(labels))
        raise ValueError(f"there is no baseline {baseline!r}; the groups are {groups}")


@AS_WRITTEN
def comparison_page(results: Results, baseline: Optional[str] = None) -> Page:
    """Tables and pictures of a comparison.

    Args:
        results: from :func:`.comparison.compare_runs` or :func:`.comparison.load_results`.
        baseline: label of the group that the others are compared with. Default: the first.

    Raises:
        ValueError: if there is no such group.
    """
    labels = [group["label"] for group in results["groups"]]
    check_baseline(baseline, labels)
    if baseline is None:
        baseline = labels[0]
    kinds = [kind for kind in IOU_TYPES if any(kind in g["ap"] for g in results["groups"])]
    blocks: List[Block] = [Text(_introduction(results))]
    if kinds:
        description = "AP of all groups with intervals over images; a dot is a run"
        blocks.append(Picture(_ap_figure(results, kinds), "ap", description))
        for kind in kinds:
            blocks += [Heading(f"{IOU_TYPES[kind].capitalize()} AP"), _ap_table(results, kind)]
    if sum(bool(group["ap"]) for group in results["groups"]) > 1:
        blocks += _difference_blocks(results, kinds, baseline)
    blocks += [Heading("Cost"), _cost_table(results)]
    if any(run["curves"] for run in results["runs"]):
        blocks += [
            Heading("Learning curves"),
            Picture(_curves_figure(results), "curves", "Total loss and AP over the iterations"),
        ]
    if kinds:
        blocks.append(Heading("Details"))
        blocks += [_class_table(results, kind) for kind in kinds]
    blocks += [
        _runs_table(results, kinds),
        Text(f"`{results['command']}` ({results['date']}, wsbcn_d2 {results['version']})"),
    ]
    return Page(f"Comparison on {results['dataset']['name']}", blocks)


def _introduction(results: Results) -> str:
    dataset, bootstrap = results["dataset"], results["bootstrap"]
    runs, groups = len(results["runs"]), len(results["groups"])
    text = f"{runs} {_plural('run', runs)} of {groups} {_plural('setting', groups)}."
    if "images" in dataset:
        classes = len(dataset["classes"])
        text += (
            f" {dataset['images']} images with {dataset['instances']} objects of {classes} "
            f"{'class' if classes == 1 else 'classes'}. AP in percent, as pycocotools computes it."
        )
    if bootstrap["draws"]:
        text += (
            f" [Intervals]: {bootstrap['confidence']} %, over images ({bootstrap['draws']} draws "
            "of the bootstrap, the same for all runs): what another set of as many images would "
            "change. ±: standard deviation over the runs of a setting (seeds), which is apart "
            "from that."
        )
    return text


def _ap_table(results: Results, kind: str) -> Table:
    metrics = _known_metrics(results, kind)
    rows = []
    for group in results["groups"]:
        entries = group["ap"].get(kind, {})
        cells = [_with_interval(entries.get(metric)) for metric in metrics]
        sd = entries.get("AP", {}).get("sd")
        evaluated = len(entries.get("AP", {}).get("seeds", []))
        runs = str(group["runs"]) + (f", {evaluated} evaluated" * (evaluated < group["runs"]))
        rows.append([group["label"], runs, *cells, _decimal(sd, "± {:.1f}")])
    header = ["setting", "runs", *metrics, "AP over seeds"]
    return Table(header, rows)


def _difference_blocks(results: Results, kinds: Sequence[str], baseline: str) -> List[Block]:
    blocks: List[Block] = [
        Heading(f"Differences from {baseline}"),
        Text(
            "Thick: interval over images, paired. Thin: interval over seeds (Welch), where both "
            "settings have at least two runs. A difference that either of them lets be zero may "
            "be noise."
        ),
        Picture(_difference_figure(results, kinds, baseline), "differences", "Differences of AP"),
    ]
    for kind in kinds:
        rows = []
        metrics = _known_metrics(results, kind)
        for label in _others(results, baseline):
            entries = difference(results, label, baseline).get(kind)
            if entries is None:
                continue
            cells = [_with_interval(entries.get(metric), "{:+.1f}") for metric in metrics]
            seeds = _decimal(entries["AP"]["seeds"], "± {:.1f}")
            rows.append([label, verdict(entries["AP"]), *cells, seeds])
        header = [f"{IOU_TYPES[kind]}, − {baseline}", "AP is", *metrics, "AP, seeds"]
        blocks.append(Table(header, rows, left=2))
    if sum(bool(group["ap"]) for group in results["groups"]) > 2:
        description = "AP of the row minus AP of the column; bold if clear of the noise of images"
        blocks += [
            Heading("Every setting against every other"),
            Text(description + ". A frame: clear of the noise of seeds too."),
            Picture(_pairs_figure(results, kinds), "pairs", description),
        ]
    return blocks


def _cost_table(results: Results) -> Table:
    rows = []
    for group in results["groups"]:
        runs = [run for run in results["runs"] if run["label"] == group["label"]]
        seconds = [r["seconds_per_iteration"] for r in runs if r["seconds_per_iteration"]]
        millions = [r["checkpoint_numbers"] / 1e6 for r in runs if r["checkpoint_numbers"]]
        memory = [r["peak_memory_mib"] for r in runs if r["peak_memory_mib"]]
        rows.append(
            [
                group["label"],
                _all_of(r["images_per_step"] for r in runs),
                _all_of(r["iterations"] for r in runs),
                _decimal(median(seconds) * 1e3 if seconds else None, "{:.0f}"),
                _decimal(max(memory) if memory else None, "{:.0f}"),
                _decimal(max(millions) if millions else None, "{:.2f}"),
            ]
        )
    header = ["setting", "images a step", "iterations", "ms an iteration", "peak GPU MiB"]
    return Table([*header, "millions of numbers in the checkpoint"], rows)


def _class_table(results: Results, kind: str) -> Table:
    groups = [group for group in results["groups"] if kind in group["ap"]]
    names = list(dict.fromkeys(m for g in groups for m in g["ap"][kind] if m.startswith("AP-")))
    rows = [[n[3:], *(_with_interval(g["ap"][kind].get(n)) for g in groups)] for n in names]
    header = ["class", *(group["label"] for group in groups)]
    return Table(header, rows, summary=f"{IOU_TYPES[kind].capitalize()} AP of each class")


def _runs_table(results: Results, kinds: Sequence[str]) -> Table:
    rows = []
    for run in results["runs"]:
        seed = _MISSING if run["seed"] is None else str(run["seed"])
        cells = [_with_interval(run["ap"].get(kind, {}).get("AP")) for kind in kinds]
        rows.append([run["name"], run["label"], "; ".join(run["notes"]), seed, *cells])
    header = ["run", "setting", "missing or odd", "seed", *(f"{IOU_TYPES[k]} AP" for k in kinds)]
    return Table(header, rows, left=3, summary="Every run, and what is missing")


def _ap_figure(results: Results, kinds: Sequence[str]) -> Figure:
    groups = results["groups"]
    figure, panels = _panels(len(kinds), len(groups))
    for axes, kind in zip(panels, kinds):
        for y, group in enumerate(groups):
            entry = group["ap"].get(kind, {}).get("AP")
            if entry is None or entry["value"] is None:
                axes.text(0, y, "  not evaluated", va="center", color="0.5", fontsize=9)
                continue
            axes.barh(y, entry["value"], height=0.7, color=f"C{y % 10}", alpha=0.45)
            right = entry["value"]
            if entry["low"] is not None:
                errors = _errors(entry)
                axes.errorbar(entry["value"], y, xerr=errors, color="0.2", capsize=4, lw=1.5)
                right = entry["high"]
            seeds = [value for value in entry["seeds"] if value is not None]
            if len(seeds) > 1:
                axes.plot(seeds, [y] * len(seeds), "o", color=f"C{y % 10}", mec="black", ms=5)
            right = max([right, *seeds])
            axes.annotate(
                f"{entry['value']:.1f}",
                (right, y),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_xlim(left=0)
        axes.margins(x=0.12)
        axes.set_title(f"{IOU_TYPES[kind]} AP")
    _name_rows(panels, [_row_name(group) for group in groups])
    return figure


def _difference_figure(results: Results, kinds: Sequence[str], baseline: str) -> Figure:
    runs = {group["label"]: group for group in results["groups"]}
    labels = [label for label in _others(results, baseline) if runs[label]["ap"]]
    figure, panels = _panels(len(kinds), len(labels))
    for axes, kind in zip(panels, kinds):
        axes.axvline(0, color="0.3", linewidth=1)
        for y, label in enumerate(labels):
            entry = difference(results, label, baseline).get(kind, {}).get("AP")
            if entry is None or entry["value"] is None:
                continue
            color = f"C{list(runs).index(label) % 10}"
            if entry["seeds"] is not None:
                axes.errorbar(
                    entry["value"], y, xerr=entry["seeds"], color=color, capsize=4, lw=1.2
                )
            if entry["low"] is not None:
                axes.errorbar(entry["value"], y, xerr=_errors(entry), color=color, lw=5, alpha=0.5)
            axes.plot(entry["value"], y, "o", color=color, mec="black", ms=6)
        axes.set_title(f"{IOU_TYPES[kind]} AP minus that of {baseline}")
        axes.margins(x=0.08)
    _name_rows(panels, [_row_name(runs[label]) for label in labels])
    return figure


def _pairs_figure(results: Results, kinds: Sequence[str]) -> Figure:
    labels = [group["label"] for group in results["groups"] if group["ap"]]
    n = len(labels)
    side = 0.62 * n + 2.2
    figure = Figure(figsize=(side * len(kinds), side), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds):
        entries = {
            (row, column): difference(results, a, b).get(kind, {}).get("AP")
            for row, a in enumerate(labels)
            for column, b in enumerate(labels)
            if a != b
        }
        known = {at: e for at, e in entries.items() if e is not None and e["value"] is not None}
        sizes = [abs(entry["value"]) for entry in known.values()]
        # so that a setting that failed does not take all the colours
        limit = max(2 * float(np.percentile(sizes, 75)), 1e-9) if sizes else 1.0
        table = np.full((n, n), np.nan)
        for (row, column), entry in known.items():
            table[row, column] = entry["value"]
            clear = entry["low"] is not None and not entry["low"] <= 0 <= entry["high"]
            dark = abs(entry["value"]) > 0.65 * limit
            axes.text(
                column,
                row,
                _decimal(entry["value"], "{:+.1f}"),
                ha="center",
                va="center",
                fontsize=8,
                weight="bold" if clear else "normal",
                color="white" if dark else "black" if clear else "0.4",
            )
            if clear and entry["seeds"] is not None and abs(entry["value"]) > entry["seeds"]:
                corner = (column - 0.45, row - 0.45)
                axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, ec="black", lw=1.2))
        axes.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), labels if axes is panels[0] else [""] * n)
        axes.tick_params(labelsize=8, length=0)
        axes.set_title(f"{IOU_TYPES[kind]} AP, row − column", fontsize=10)
    return figure


def _curves_figure(results: Results) -> Figure:
    """Losses; and AP, if it was evaluated several times."""
    groups = [group["label"] for group in results["groups"]]
    keys = ["total_loss"]
    for kind in IOU_TYPES:
        if any(len(run["curves"].get(f"{kind}/AP", [[]])[0]) > 1 for run in results["runs"]):
            keys.append(f"{kind}/AP")
    width = 10 if len(keys) == 1 else 6 * len(keys)
    figure = Figure(figsize=(width, 5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for index, label in enumerate(groups):
            curves = [
                run["curves"][key]
                for run in results["runs"]
                if run["label"] == label and key in run["curves"]
            ]
            if not curves:
                continue
            x, mean, low, high = _average(curves)
            style = "-" if index < 10 else "--"  # colours repeat
            axes.plot(x, mean, style, color=f"C{index % 10}", label=label, linewidth=1.4)
            if len(curves) > 1:
                axes.fill_between(x, low, high, color=f"C{index % 10}", alpha=0.15, linewidth=0)
        axes.set_xlabel("iteration")
        axes.grid(True, color="0.92")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if key == "total_loss":
            axes.set_title("total loss (mean and range of the runs)")
        else:
            axes.set_title(f"{IOU_TYPES[key.split('/')[0]]} AP")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return figure


def _average(curves: Sequence[Any]) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Iterations, mean, lowest and highest of several curves, where all of them are."""
    start = max(x[0] for x, _ in curves)
    end = min(x[-1] for x, _ in curves)
    x = np.array([i for i in curves[0][0] if start <= i <= end] or [curves[0][0][0]])
    values = np.stack([np.interp(x, *curve) for curve in curves])
    return x, values.mean(0), values.min(0), values.max(0)


def _panels(columns: int, rows: int) -> Tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1.8 + 4.6 * columns, 1.1 + 0.36 * rows), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for axes in panels:
        axes.grid(True, axis="x", color="0.92", zorder=0)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    return figure, panels


def _name_rows(panels: Sequence[Axes], names: Sequence[str]) -> None:
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top
    for axes in panels:
        axes.tick_params(axis="y", length=0)


def _row_name(group: Dict[str, Any]) -> str:
    runs = group["runs"]
    return group["label"] + (f" ({runs} runs)" if runs > 1 else "")


def _errors(entry: Dict[str, Any]) -> List[List[float]]:
    # An interval around the mean of the draws need not hold the value: bars cannot be negative.
    value = entry["value"]
    return [[max(0.0, value - entry["low"])], [max(0.0, entry["high"] - value)]]


def _others(results: Results, baseline: str) -> List[str]:
    return [group["label"] for group in results["groups"] if group["label"] != baseline]


def _known_metrics(results: Results, kind: str) -> List[str]:
    """Those that at least one group has a value of."""
    entries = [group["ap"].get(kind, {}) for group in results["groups"]]
    return [m for m in METRICS if any(e.get(m, {}).get("value") is not None for e in entries)]


def _with_interval(entry: Optional[Dict[str, Any]], form: str = "{:.1f}") -> str:
    if entry is None or entry["value"] is None:
        return _MISSING
    text = _decimal(entry["value"], form)
    if entry["low"] is None:
        return text
    return f"{text} [{_decimal(entry['low'], form)}, {_decimal(entry['high'], form)}]"


def _decimal(value: Optional[float], form: str) -> str:
    if value is None:
        return _MISSING
    text = form.format(value)
    return text.replace("-", "−") if float(re.sub("[^0-9.]", "", text)) else text.replace("-", "+")


def _all_of(values: Any) -> str:
    different = list(dict.fromkeys(str(v) for v in values if v is not None))
    return ", ".join(different) or _MISSING


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
