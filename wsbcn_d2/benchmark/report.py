"""Tables and pictures of what was measured, from the results alone."""

import json
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..engine.checkpoint import atomic_write
from .norms import floor_ms

Results = Dict[str, Any]

# The layers that a row of the tables of norms is compared with.
OURS, GROUP_NORM, REFERENCE = "BCN", "GroupNorm", "reference"
_MARKERS = "osD^vP*X<>hd"


def write_json(results: Results, path: str) -> None:
    """Writes results to a file, which appears when it is complete."""
    with atomic_write(path, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")


def write_markdown(results: Results, path: str) -> None:
    """Writes :func:`markdown` to a file, which appears when it is complete."""
    with atomic_write(path, "w") as file:
        file.write(markdown(results))


def write_plot(results: Results, path: str) -> None:
    """Writes :func:`figure` to a PNG file, which appears when it is complete."""
    with atomic_write(path) as file:
        figure(results).savefig(file, format="png", dpi=110)


def markdown(results: Results) -> str:
    """Machine, command and tables of the results of either benchmark."""
    tables = {"norms": _norms_tables, "train": _train_tables}[results["kind"]](results)
    skipped = [f"- not measured: {name}: {why}" for name, why in results["skipped"].items()]
    return "\n".join([*_origin(results), *skipped, "", *tables])


def figure(results: Results) -> Figure:
    """The picture of the results of either benchmark."""
    return {"norms": _norms_figure, "train": _train_figure}[results["kind"]](results)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, its first ``left`` columns aligned to the left and the others to the
    right."""
    alignment = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [header, alignment, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cases(results: Results) -> Dict[Tuple[str, str], Dict[str, Dict[str, Dict[str, Any]]]]:
    """The rows of the benchmark of norms: by (dtype, memory format), layer and contender."""
    grouped: Dict[Tuple[str, str], Dict[str, Dict[str, Dict[str, Any]]]] = {}
    for row in results["rows"]:
        layers = grouped.setdefault((row["dtype"], row["memory_format"]), {})
        layers.setdefault(row["layer"], {})[row["contender"]] = row
    return grouped


def ratio(rows: Dict[str, Dict[str, Any]], a: str, b: str, phase: str = "total") -> Optional[float]:
    """Median time of ``a`` over that of ``b``; None if either was not measured."""
    if a not in rows or b not in rows or phase not in rows[a] or phase not in rows[b]:
        return None
    return rows[a][phase]["median"] / rows[b][phase]["median"]


def floor_share(results: Results, row: Dict[str, Any], phase: str = "total") -> float:
    """The time at the bandwidth of a copy over the one measured; see :func:`floor_ms`."""
    floor = floor_ms(row["shape"], row["dtype"], results["copy_bandwidth"])
    return floor[phase] / row[phase]["median"]


def shape_text(shape: Sequence[int]) -> str:
    """For example 1×64×400×672."""
    return "×".join(map(str, shape))


def _origin(results: Results) -> List[str]:
    lines = [f"- {name}: {text}" for name, text in results["machine"].items()]
    if "copy_bandwidth" in results:
        bandwidth = results["copy_bandwidth"]
        lines.append(f"- copy bandwidth: {bandwidth / 1e9:.4g} GB/s (read and write, same run)")
    settings = results["settings"]
    rounds = f"{settings['repetitions']} rounds after {settings['warmup']} for warming up"
    lines.append(f"- `{results['command']}` ({rounds}; {results['date']})")
    if "remark" in results:  # added by hand
        lines.append(f"- {results['remark']}")
    return lines


def _norms_tables(results: Results) -> List[str]:
    parts: List[str] = []
    for (dtype, memory_format), layers in cases(results).items():
        names = list(dict.fromkeys(name for rows in layers.values() for name in rows))
        others = [name for name in (GROUP_NORM, REFERENCE) if name in names]
        times, details = [], []
        for layer, rows in layers.items():
            shape = shape_text(next(iter(rows.values()))["shape"])
            times.append(
                [
                    layer,
                    shape,
                    *(
                        _milliseconds(rows[n]["total"]["median"]) if n in rows else ""
                        for n in names
                    ),
                    *(_number(ratio(rows, OURS, other)) for other in others),
                ]
            )
            if OURS in rows:
                details.append([layer, *_details(results, rows, others)])
        parts += [
            f"**{dtype}, {memory_format}**: forward + backward, median ms",
            "",
            table(["layer", "input", *names, *(f"{OURS} / {other}" for other in others)], times),
            "",
        ]
        if details:
            header = ["layer", "forward ms (quartiles)", "backward ms (quartiles)"]
            header += [f"of the floor: {phase}" for phase in ("forward", "backward", "both")]
            header += [f"saved MiB: {name}" for name in (OURS, *others)]
            if results["device"] == "cuda":
                compared = [name for name in (OURS, GROUP_NORM) if name in names]
                header += [f"host ms: {name}" for name in compared]
                header += [f"peak MiB: {name}" for name in compared]
            title = f"{OURS} in detail, {dtype}, {memory_format}"
            parts += [f"<details><summary>{title}</summary>", "", table(header, details), ""]
            parts += ["</details>", ""]
    return parts


def _details(results: Results, rows: Dict[str, Dict[str, Any]], others: Sequence[str]) -> List[str]:
    """The cells of one layer after its name; ``others`` it is compared with."""
    ours = rows[OURS]
    cells = [_with_quartiles(ours[phase], _milliseconds) for phase in ("forward", "backward")]
    for phase in ("forward", "backward", "total"):
        cells.append(f"{100 * floor_share(results, ours, phase):.0f} %")

    def of(name: str, cell: Callable[[Dict[str, Any]], str]) -> str:
        return cell(rows[name]) if name in rows else ""

    cells += [of(name, lambda row: _mebibytes(row["saved_bytes"])) for name in (OURS, *others)]
    if results["device"] == "cuda":
        compared = [name for name in (OURS, *others) if name != REFERENCE]
        cells += [of(name, lambda row: _milliseconds(row["host"]["median"])) for name in compared]
        cells += [of(name, lambda row: _mebibytes(row["peak_bytes"])) for name in compared]
    return cells


def _train_tables(results: Results) -> List[str]:
    rows = results["rows"]
    header = ["norm", "step ms (quartiles)", "/ GN", "peak GiB", "/ GN", "saved MiB"]
    header += ["WS, ms", "WS, % of step", "inference images/s", "folded images/s"]
    profiled = any("kernels" in row for row in rows)
    if profiled:
        header += ["kernels, ms", "kernels"]
    memory_gib = results["settings"]["memory_gib"]
    if memory_gib is not None:
        header.append(f"largest batch in {memory_gib:g} GiB")
    parts = []
    for images in dict.fromkeys(row["images"] for row in rows):
        same = {row["norm"]: row for row in rows if row["images"] == images}
        lines = []
        for name, row in same.items():
            line = [
                name,
                _with_quartiles(row["step"], lambda ms: f"{ms:.0f}"),
                _number(ratio(same, name, "GN", "step")),
                f"{row['peak_bytes'] / 2**30:.2f}",
                _number(row["peak_bytes"] / same["GN"]["peak_bytes"] if "GN" in same else None),
                f"{row['saved_bytes'] / 2**20:.0f}",
                _milliseconds(row["standardization"]["median"]) if "standardization" in row else "",
                _number(_standardization_percent(row)),
                _number(_images_per_second(row, "inference")),
                _number(_images_per_second(row, "inference_folded")),
            ]
            if profiled:
                line += [_milliseconds(row["kernels_ms"]), str(row["kernels"])]
            if memory_gib is not None:
                line.append(str(row["largest_batch"]))
            lines.append(line)
        parts += [f"**{train_title(results, images)}**", "", table(header, lines), ""]
    return parts


def train_title(results: Results, images: int) -> str:
    """What was trained, for example ``2×800×1333, float16, channels_last``."""
    settings = results["settings"]
    height, width = settings["size"]
    options = [settings["amp"] or "float32"]
    if settings["channels_last"]:
        options.append("channels_last")
    return f"{images}×{height}×{width}, " + ", ".join(options)


def _standardization_percent(row: Dict[str, Any]) -> Optional[float]:
    if "standardization" not in row:
        return None
    return 100 * row["standardization"]["median"] / row["step"]["median"]


def _images_per_second(row: Dict[str, Any], phase: str) -> Optional[float]:
    return row["images"] / row[phase]["median"] * 1e3 if phase in row else None


def _norms_figure(results: Results) -> Figure:
    """The time of the contenders over that of GroupNorm, a panel for each dtype and format."""
    grouped = cases(results)
    names = list(dict.fromkeys(row["contender"] for row in results["rows"]))
    names = [name for name in names if name != GROUP_NORM]  # it is the line at 1
    figure = Figure(figsize=(12, 4.2 * len(grouped) + 0.8), constrained_layout=True)
    panels = figure.subplots(len(grouped), 1, squeeze=False, sharey=True)[:, 0]
    for axes, ((dtype, memory_format), layers) in zip(panels, grouped.items()):
        for index, name in enumerate(names):
            points = [
                (x, ratio(rows, name, GROUP_NORM))
                for x, rows in enumerate(layers.values())
                if ratio(rows, name, GROUP_NORM) is not None
            ]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                _MARKERS[index % len(_MARKERS)],
                label=name,
                markersize=10 if name == OURS else 7,
                markerfacecolor=f"C{index % 10}" if name == OURS else "none",
                markeredgecolor=f"C{index % 10}",
                markeredgewidth=1.5,
                zorder=3 if name == OURS else 2,
            )
        axes.set_yscale("log")
        axes.grid(True, axis="y", which="both", color="0.9", zorder=0)
        axes.axhline(1, color="0.4", linewidth=1, zorder=1)
        shapes = [shape_text(next(iter(rows.values()))["shape"]) for rows in layers.values()]
        labels = [f"{layer}\n{shape}" for layer, shape in zip(layers, shapes)]
        axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", fontsize=9)
        axes.set_ylabel(f"time / {GROUP_NORM}")
        axes.set_title(f"forward + backward, {results['device']}, {dtype}, {memory_format}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    panels[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return figure


def _train_figure(results: Results) -> Figure:
    """Time and peak memory of a step, a row of panels for each batch size."""
    sizes = list(dict.fromkeys(row["images"] for row in results["rows"]))
    figure = Figure(figsize=(11, 3.4 * len(sizes) + 0.4), constrained_layout=True)
    panels = figure.subplots(len(sizes), 2, squeeze=False)
    for (times, memory), images in zip(panels, sizes):
        rows = [row for row in results["rows"] if row["images"] == images]
        names = [row["norm"] for row in rows]
        colors = [f"C{i % 10}" for i in range(len(rows))]
        steps = [row["step"] for row in rows]
        errors = [
            [step["median"] - step["q1"] for step in steps],
            [step["q3"] - step["median"] for step in steps],
        ]
        medians = [step["median"] for step in steps]
        bars = times.barh(names, medians, xerr=errors, color=colors, alpha=0.8, ecolor="0.2")
        times.bar_label(bars, [f" {value:.0f}" for value in medians], padding=8)
        times.set_xlabel("ms a step (median, quartiles)")
        saved = [row["saved_bytes"] / 2**30 for row in rows]
        peak = [row["peak_bytes"] / 2**30 for row in rows]
        bars = memory.barh(names, peak, color=colors, alpha=0.3)
        memory.barh(names, saved, color=colors, alpha=0.8, height=0.4)
        memory.bar_label(bars, [f" {value:.2f}" for value in peak])
        memory.set_xlabel("GiB: peak (light), saved for the backward pass (dark)")
        for axes in (times, memory):
            axes.invert_yaxis()
            axes.margins(x=0.25)
        times.set_title(f"time of a step, {train_title(results, images)}")
        memory.set_title("memory of a step")
    figure.suptitle(f"Mask R-CNN R-50-FPN, {results['device']}")
    return figure


def _with_quartiles(spread: Dict[str, float], text: Any) -> str:
    return f"{text(spread['median'])} ({text(spread['q1'])}–{text(spread['q3'])})"


def _milliseconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:.2f}"
