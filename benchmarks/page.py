"""Writes the measured parts of docs/benchmarks.md and docs/memory.md, from the JSON files in
benchmarks/results.

Those in its folder ``version-0.1.0`` are of that version, whose kernels and blocks were others.
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from wsbcn_d2.engine.checkpoint import atomic_write
from wsbcn_d2.modeling import CHECKPOINTED

from .layers import CONTENDERS, OURS, floor_ms
from .memory import GPUS, MODELS, largest_batch
from .results import FOR_THE_PAGE, ROOT, Results

DOCS = ROOT / "docs"
BEGIN = "<!-- begin: written by python -m benchmarks.page -->"
END = "<!-- end -->"

# The version of which there are files beside those of the present one, and their folder.
EARLIER = "version 0.1.0"
_EARLIER_FOLDER = "version-0.1.0"

_TITLES = {
    "layers": "Layers",
    "train": "Training steps",
    "memory": "Checkpointing",
    "import_time": "Import",
}
_NAMES = ("layers-*.json", "train-*.json", "memory-*.json", "import-time.json")
_MARKERS = "osD^v"
_FULL_SIZE = [800, 1333]
# The figures that a target is about, and what each is of.
Figures = List[Tuple[float, str]]


@dataclass(frozen=True)
class Measured:
    """What one file holds.

    Attributes:
        name: of the file, without ``.json``.
        earlier: whether it is of the version EARLIER.
        results: its content.
    """

    name: str
    earlier: bool
    results: Results

    @property
    def when(self) -> str:
        """Date and commit."""
        return f"{self.results['date']}, commit {self.results['commit']}"


@dataclass(frozen=True)
class Target:
    """A limit that is to be kept, set before anything was measured.

    Attributes:
        text: what is limited.
        device: whose results count.
        limit: the largest figure allowed.
        figures: from one file; none if it does not tell.
        at_least: the limit is the least figure allowed.
    """

    text: str
    device: str
    limit: float
    figures: Callable[[Results], Figures]
    at_least: bool = False


def load(folder: Path) -> List[Measured]:
    """Reads what the commands of this folder have measured, the earlier version last.

    Raises:
        ValueError: if a file with one of their names holds something else.
    """
    found = []
    for path in [path for place in (folder, folder / _EARLIER_FOLDER) for path in _files(place)]:
        try:
            results = json.loads(path.read_text())
            kind = results["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the output of a benchmark ({type(error).__name__}: {error})"
            ) from error
        if kind not in _TITLES:
            raise ValueError(f"{path}: kind must be of {', '.join(_TITLES)}, found {kind!r}")
        found.append(Measured(path.stem, path.parent != folder, results))
    return found


def _files(folder: Path) -> List[Path]:
    return [path for name in _NAMES for path in sorted(folder.glob(name))]


def render(measured: Sequence[Measured], plots: str) -> str:
    """The measured part of the page.

    Args:
        measured: from :func:`load`.
        plots: folder of the pictures, seen from the page.
    """
    parts = ["## Targets", "", targets_table(measured), ""]
    for title, device, earlier in (
        ("CPU", "cpu", False),
        ("GPU", "cuda", False),
        (f"GPU, {EARLIER}", "cuda", True),
    ):
        here = [m for m in measured if (m.results["device"], m.earlier) == (device, earlier)]
        if here or not earlier:
            parts += [f"## {title}", ""]
            parts += [] if here else ["Not measured.", ""]
        for one in here:
            parts += [f"### {_TITLES[one.results['kind']]}: {one.name}", "", *_origin(one), ""]
            if one.results["kind"] == "layers":
                parts += [f"![time over that of GroupNorm]({plots}/{_plot(one)})", ""]
            parts += _TABLES[one.results["kind"]](one.results)
    return "\n".join(parts).rstrip() + "\n"


def rewrite(docs: Path, folder: Path) -> List[Path]:
    """Rewrites the measured parts of the pages, and the pictures.

    Args:
        docs: folder with benchmarks.md and memory.md, which have the lines BEGIN and END; what is
            outside them stays.
        folder: with the JSON files.

    Returns:
        The files that were written.

    Raises:
        ValueError: if the lines are not there, or a JSON file is none of ours.
    """
    measured = load(folder)
    plots = "../" + folder.relative_to(docs.parent).as_posix()
    texts = {
        docs / "benchmarks.md": render(measured, plots),
        docs / "memory.md": memory_part(measured),
    }
    pages = {page: _with_part(page, part) for page, part in texts.items()}
    figures = {
        folder / _plot(one): figure(one.results)
        for one in measured
        if one.results["kind"] == "layers"
    }
    if timed := _timed(measured):
        figures[docs / "memory.png"] = memory_figure(timed)
    for path, drawn in figures.items():
        with atomic_write(str(path)) as file:
            drawn.savefig(file, format="png", dpi=80)
    for page, text in pages.items():
        with atomic_write(str(page), "w") as file:
            file.write(text)
    return [*figures, *pages]


def _with_part(page: Path, part: str) -> str:
    before, begin, rest = page.read_text().partition(BEGIN + "\n")
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise ValueError(f"{page} must have the lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{begin}\n{part}\n{end}{after}"


def targets_table(measured: Sequence[Measured]) -> str:
    """What the targets come to: with the present version or else with the earlier one."""
    rows = []
    for target in TARGETS:
        sign = "≥" if target.at_least else "≤"
        row = [target.text, f"{sign} {target.limit:.2f}", "", "not measured", ""]
        for earlier in (False, True):
            figures: Figures = []
            sources = []
            for one in measured:
                if (one.earlier, one.results["device"]) == (earlier, target.device):
                    own = target.figures(one.results)
                    figures += own
                    sources += [one.when] * bool(own)
            if figures:
                row[2:] = [*_verdict(target, figures), "; ".join(dict.fromkeys(sources))]
                row[3] += f", {EARLIER}" * earlier
                break
        rows.append(row)
    return table(["target", "limit", "figures", "", "measured"], rows, left=5)


def _verdict(target: Target, figures: Figures) -> Tuple[str, str]:
    (least, of_least), (most, of_most) = min(figures), max(figures)
    worst, where = (least, of_least) if target.at_least else (most, of_most)
    missing = sum(f < target.limit if target.at_least else f > target.limit for f, _ in figures)
    text = f"{worst:.2f} ({where})"
    if len(figures) > 1:
        text = f"{least:.2f} to {most:.2f}, worst {where}"
        text += f"; {missing} of {len(figures)} miss it" * bool(missing)
    return text, "**missed**" if missing else "met"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, its first ``left`` columns aligned to the left and the others to the
    right."""
    alignment = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, alignment, *rows])


def _plot(one: Measured) -> str:
    return f"{_EARLIER_FOLDER + '/' if one.earlier else ''}{one.name}.png"


def _origin(one: Measured) -> List[str]:
    results = one.results
    # The command of an earlier version is no longer there.
    lines = [f"- {one.when}" + ("" if one.earlier else f": `{results['command']}`")]
    if "remark" in results:  # added by hand
        lines.append(f"- {results['remark']}")
    lines.append("- " + "; ".join(f"{name}: {text}" for name, text in results["machine"].items()))
    if "copy_bandwidth" in results:
        lines.append(f"- bandwidth of a copy: {results['copy_bandwidth'] / 1e9:.4g} GB/s")
    settings = results["settings"]
    if settings["repetitions"]:
        lines.append(
            f"- {settings['repetitions']} rounds after {settings['warmup']} for warming up"
        )
    return lines


# Layers


def _cases(results: Results) -> Dict[Tuple[str, str], Dict[str, Dict[str, Dict[str, Any]]]]:
    """The rows: by (dtype, memory format), layer and contender."""
    grouped: Dict[Tuple[str, str], Dict[str, Dict[str, Dict[str, Any]]]] = {}
    for row in results["rows"]:
        if row["contender"] in CONTENDERS:  # earlier files have others
            layers = grouped.setdefault((row["dtype"], row["memory_format"]), {})
            layers.setdefault(row["layer"], {})[row["contender"]] = row
    return grouped


def _ratio(rows: Dict[str, Dict[str, Any]], a: str, b: str) -> float:
    """Median time of ``a`` over that of ``b``."""
    return rows[a]["total"]["median"] / rows[b]["total"]["median"]


def _floor_share(results: Results, row: Dict[str, Any]) -> float:
    """The time at the bandwidth of a copy over the one measured."""
    floor = floor_ms(row["shape"], row["dtype"], results["copy_bandwidth"])
    return floor["total"] / row["total"]["median"]


def _layers_tables(results: Results) -> List[str]:
    parts: List[str] = []
    for (dtype, memory_format), layers in _cases(results).items():
        names = list(next(iter(layers.values())))
        others = [name for name in ("GroupNorm", "reference") if name in names]
        header = ["layer", "input", *(f"{name}, ms" for name in names)]
        header += [*(f"BCN / {other}" for other in others), "floor / BCN"]
        header += [f"{name}, saved MiB" for name in (OURS, *others)]
        lines = []
        for layer, rows in layers.items():
            line = [layer, "×".join(map(str, rows[OURS]["shape"]))]
            line += [_spread(rows[name]["total"]) for name in names]
            line += [f"{_ratio(rows, OURS, other):.2f}" for other in others]
            line.append(f"{_floor_share(results, rows[OURS]):.0%}")
            line += [f"{rows[name]['saved_bytes'] / 2**20:.2f}" for name in (OURS, *others)]
            lines.append(line)
        parts += [f"**{dtype}, {memory_format}**", "", table(header, lines, left=2), ""]
    return parts


def figure(results: Results) -> Figure:
    """The time of the contenders over that of GroupNorm, a panel for each dtype and format."""
    grouped = _cases(results)
    made = Figure(figsize=(11, 3.6 * len(grouped) + 0.8), constrained_layout=True)
    panels = made.subplots(len(grouped), 1, squeeze=False, sharey=True)[:, 0]
    for axes, ((dtype, memory_format), layers) in zip(panels, grouped.items()):
        others = [name for name in next(iter(layers.values())) if name != "GroupNorm"]
        for name, marker in zip(others, _MARKERS):
            values = [_ratio(rows, name, "GroupNorm") for rows in layers.values()]
            axes.plot(range(len(values)), values, marker, label=name)
        axes.set_yscale("log")
        axes.grid(True, axis="y", which="both", color="0.9")
        axes.axhline(1, color="0.4", linewidth=1)
        axes.set_xticks(range(len(layers)), list(layers), rotation=35, ha="right", fontsize=9)
        axes.set_ylabel("time / GroupNorm")
        axes.set_title(f"forward + backward, {results['device']}, {dtype}, {memory_format}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    panels[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return made


# Training steps


def _by_images(results: Results) -> Dict[int, Dict[str, Dict[str, Any]]]:
    """The rows: by images in a step and contender."""
    grouped: Dict[int, Dict[str, Dict[str, Any]]] = {}
    for row in results["rows"]:
        grouped.setdefault(row["images"], {})[row["contender"]] = row
    return grouped


def _step_title(results: Results, images: int) -> str:
    """For example ``R-50-FPN, 2×800×1333, float16, channels_last``."""
    settings = results["settings"]
    sizes = " and ".join(f"{images}×{height}×{width}" for height, width in settings["sizes"])
    options = [settings["model"], sizes, settings["amp"] or "float32"]
    return ", ".join(options + ["channels_last"] * settings["channels_last"])


def _train_tables(results: Results) -> List[str]:
    parts: List[str] = []
    for images, rows in _by_images(results).items():
        columns: List[Tuple[str, Callable[[Dict[str, Any]], float], Callable[..., str]]] = [
            ("step, ms", lambda row: row["step"]["median"], lambda row: _spread(row["step"])),
            ("peak, GiB", lambda row: row["peak_bytes"], lambda row: _gib(row["peak_bytes"])),
            ("saved, GiB", lambda row: row["saved_bytes"], lambda row: _gib(row["saved_bytes"])),
        ]
        if all("kernels_ms" in row for row in rows.values()):
            columns.append(
                ("kernels, ms", lambda r: r["kernels_ms"], lambda r: _three(r["kernels_ms"]))
            )
        lines = []
        for name, row in rows.items():
            line = [name]
            for _, value, text in columns:
                gn = rows.get("GN")
                line += [text(row), _number(value(row) / value(gn) if gn else None)]
            lines.append(line)
        header = ["", *(text for title, _, _ in columns for text in (title, "/ GN"))]
        parts += [f"**{_step_title(results, images)}**", "", table(header, lines), ""]
    return parts


# Checkpointing

# By model, dtype, norm, what is checkpointed, and number of images.
Steps = Dict[Tuple[Any, ...], Dict[str, Any]]


def _steps(results: Results) -> Steps:
    """Those of images of the full size with polygons."""
    settings = results["settings"]
    if results["kind"] != "memory" or settings["size"] != _FULL_SIZE or settings["bitmasks"]:
        return {}
    keys = ("model", "dtype", "norm", "checkpointed", "images")
    return {tuple(row[key] for key in keys): row for row in results["rows"]}


def _steps_on_cpu(measured: Sequence[Measured]) -> Steps:
    found: Steps = {}
    for one in measured:
        if (one.earlier, one.results["device"]) == (False, "cpu"):
            for key, row in _steps(one.results).items():
                found[key] = {**found.get(key, {}), **row}  # one file may have the time
    return found


def _memory_tables(results: Results) -> List[str]:
    tables: Dict[str, List[Dict[str, Any]]] = {}
    height, width = results["settings"]["size"]
    for row in results["rows"]:
        title = f"{row['model']}, {row['images']}×{height}×{width}, {row['dtype']}"
        tables.setdefault(title + ", bitmaps" * results["settings"]["bitmasks"], []).append(row)
    parts = []
    for title, rows in tables.items():
        gn = next((r for r in rows if (r["norm"], r["checkpointed"]) == ("GN", "")), None)
        lines = []
        for row in rows:
            line = [row["norm"], f'`"{row["checkpointed"]}"`', _gib(row["peak_bytes"])]
            line.append(_number(_peak(row) / _peak(gn) if gn else None))
            if "step" in row:
                line += [_spread(row["step"]), _number(_time(row) / _time(gn) if gn else None)]
            lines.append(line)
        header = ["", "checkpointed", "peak, GiB", "/ GN", "step, ms", "/ GN"]
        parts += [f"**{title}**", "", table(header[: len(lines[0])], lines, left=2), ""]
    return parts


def memory_part(measured: Sequence[Measured]) -> str:
    """The measured part of docs/memory.md: how many images fit, and GiB against time.

    Args:
        measured: from :func:`load`.
    """
    steps = _steps_on_cpu(measured)
    parts = []
    for dtype, title in (("float32", "float32"), ("bfloat16", "mixed precision")):
        lines = []
        for model, norm in itertools.product(MODELS, ("GN", "BCN+WS")):
            keys = [(model, dtype, norm, what) for what in CHECKPOINTED]
            if all((*key, images) in steps for key in keys for images in (1, 2)):
                peaks = [[_peak(steps[(*key, images)]) for images in (1, 2)] for key in keys]
                cells = [" · ".join(f"{largest_batch(*of, gib)}" for of in peaks) for gib in GPUS]
                lines.append([model, norm, *cells, " · ".join(_gib(one) for one, _ in peaks)])
        header = [f"**{title}**", "", *(f"{gib} GiB" for gib in GPUS), "GiB for 1 image"]
        parts += [table(header, lines, left=2), ""] if lines else []
    if _timed(measured):
        parts.append("![peak memory against the time of a step](memory.png)\n")
    return "\n".join(parts)


def _timed(measured: Sequence[Measured]) -> Steps:
    """Those with one image and a time."""
    steps = _steps_on_cpu(measured)
    return {key: row for key, row in steps.items() if "step" in row and key[4] == 1}


def memory_figure(timed: Steps) -> Figure:
    """The peak with one image against the time of a step: a panel for each model and dtype, a line
    for each norm."""
    titles = list(dict.fromkeys(key[:2] for key in timed))
    made = Figure(figsize=(3.6 * len(titles) + 1.6, 3.8), constrained_layout=True)
    panels = made.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    colors = {norm: f"C{i}" for i, norm in enumerate(dict.fromkeys(key[2] for key in timed))}
    for axes, title in zip(panels, titles):
        own = {key[2:4]: row for key, row in timed.items() if key[:2] == title}
        for norm, color in colors.items():
            line = {what: row for (its, what), row in own.items() if its == norm}
            x = [_time(row) / _time(own["GN", ""]) for row in line.values()]
            y = [_peak(row) / 2**30 for row in line.values()]
            axes.plot(x, y, color=color, label=norm)
            for what, *at in zip(line, x, y):
                axes.plot(*at, _MARKERS[CHECKPOINTED.index(what)], color=color)
        axes.set(title=", ".join(title), xlabel="time of a step, that of GN = 1")
        axes.grid(color="0.9")
    most = max(map(_peak, timed.values())) / 2**30
    panels[0].set(ylim=(0, 1.05 * most), ylabel="peak with 1 image, GiB")
    names = [Line2D([], [], color=color, label=norm) for norm, color in colors.items()]
    for marker, what in zip(_MARKERS, CHECKPOINTED):
        label = f"{what or 'nothing'} checkpointed"
        names.append(Line2D([], [], color="0.4", marker=marker, linestyle="", label=label))
    made.legend(handles=names, loc="outside right upper", fontsize=9, frameon=False)
    return made


# Import


def _import_tables(results: Results) -> List[str]:
    rows = [[f"`{row['statement']}`", _spread(row["time"])] for row in results["rows"]]
    return [table(["", "ms"], rows), ""]


_TABLES: Dict[str, Callable[[Results], List[str]]] = {
    "layers": _layers_tables,
    "train": _train_tables,
    "memory": _memory_tables,
    "import_time": _import_tables,
}


def _spread(values: Dict[str, float]) -> str:
    return f"{_three(values['median'])} ({_three(values['q1'])}–{_three(values['q3'])})"


def _three(value: float) -> str:
    """Three significant digits of what is less than 100."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f}"


# Targets


def _of_layers(
    value: Callable[[Results, Dict[str, Dict[str, Any]]], float],
    accepts: Callable[[str, str], bool] = lambda dtype, memory_format: True,
    least_elements: float = 0,
) -> Callable[[Results], Figures]:
    def figures(results: Results) -> Figures:
        if results["kind"] != "layers":
            return []
        return [
            (value(results, rows), f"{layer}, {dtype}, {memory_format}")
            for (dtype, memory_format), layers in _cases(results).items()
            if accepts(dtype, memory_format)
            for layer, rows in layers.items()
            if math.prod(rows[OURS]["shape"]) >= least_elements
        ]

    return figures


def _over(other: str) -> Callable[[Results, Dict[str, Dict[str, Any]]], float]:
    return lambda results, rows: _ratio(rows, OURS, other)


def _of_steps(
    value: Callable[[Dict[str, Any]], Optional[float]],
    model: str = "R-50-FPN",
    sizes: Optional[List[List[int]]] = None,
) -> Callable[[Results], Figures]:
    """The value of BCN+WS over that of GN."""

    def figures(results: Results) -> Figures:
        found: Figures = []
        if results["kind"] != "train" or results["settings"]["model"] != model:
            return found
        if sizes is not None and results["settings"]["sizes"] != sizes:
            return found
        for images, rows in _by_images(results).items():
            if {"GN", "BCN+WS"} <= set(rows):
                ours, group_norm = value(rows["BCN+WS"]), value(rows["GN"])
                if ours is not None and group_norm is not None:
                    found.append((ours / group_norm, _step_title(results, images)))
        return found

    return figures


def _of_checkpointed(
    value: Callable[[Dict[str, Any]], float], images: int = 1
) -> Callable[[Results], Figures]:
    """The value of BCN+WS with everything checkpointed over that of GN with one image."""

    def figures(results: Results) -> Figures:
        steps, found = _steps(results), []
        if value is _time and not results["settings"]["repetitions"]:
            return []
        for model in MODELS:
            ours, gn = (model, "float32", "BCN+WS", "all", images), (model, "float32", "GN", "", 1)
            if {ours, gn} <= set(steps):
                found.append((value(steps[ours]) / value(steps[gn]), f"{model}, float32"))
        return found

    return figures


def _time(row: Dict[str, Any]) -> float:
    return row["step"]["median"]


def _saved(row: Dict[str, Any]) -> float:
    return row["saved_bytes"]


def _peak(row: Dict[str, Any]) -> float:
    return row["peak_bytes"]


def _kernels(row: Dict[str, Any]) -> Optional[float]:
    return row.get("kernels_ms")


def _plain(dtype: str, memory_format: str) -> bool:
    return (dtype, memory_format) == ("float32", "nchw")


def _harder(dtype: str, memory_format: str) -> bool:
    return dtype == "bfloat16" or (dtype, memory_format) == ("float32", "channels_last")


TARGETS = (
    Target(
        "CPU, layer, BCN / GroupNorm, float32 nchw, 1 M elements or more",
        "cpu",
        1.10,
        _of_layers(_over("GroupNorm"), _plain, 1e6),
    ),
    Target(
        "CPU, layer, BCN / reference, float32 nchw",
        "cpu",
        1 / 3,
        _of_layers(_over("reference"), _plain),
    ),
    Target(
        "CPU, layer, BCN / GroupNorm, float32 channels_last, and bfloat16",
        "cpu",
        2.0,
        _of_layers(_over("GroupNorm"), _harder),
    ),
    Target(
        "CPU, time of a step, BCN+WS / GN, R-18-FPN, 192 pixels, one thread",
        "cpu",
        1.10,
        _of_steps(_time, "R-18-FPN", sizes=[[192, 192]]),
    ),
    Target(
        "CPU, time of a step, BCN+WS / GN, R-50-FPN, 256 pixels",
        "cpu",
        1.00,
        _of_steps(_time, sizes=[[256, 256]]),
    ),
    Target("CPU, saved for backward, BCN+WS / GN, R-50-FPN", "cpu", 0.86, _of_steps(_saved)),
    Target("CPU, peak of a step, BCN+WS / GN, R-50-FPN", "cpu", 0.92, _of_steps(_peak)),
    Target(
        "CPU, peak of a step, BCN+WS checkpointed / GN, 1×800×1333",
        "cpu",
        0.50,
        _of_checkpointed(_peak),
    ),
    Target(
        "CPU, peak, the same with 2 images / GN with 1", "cpu", 1.00, _of_checkpointed(_peak, 2)
    ),
    Target("CPU, time, the same with 1 image / GN", "cpu", 1.35, _of_checkpointed(_time)),
    Target(
        "GPU, layer, BCN / GroupNorm, nchw, 1 M elements or more",
        "cuda",
        1.00,
        _of_layers(_over("GroupNorm"), lambda dtype, form: form == "nchw", 1e6),
    ),
    Target(
        "GPU, the same, channels_last",
        "cuda",
        0.80,
        _of_layers(_over("GroupNorm"), lambda dtype, form: form == "channels_last", 1e6),
    ),
    Target(
        "GPU, layer, floor / BCN, 8 M elements or more",
        "cuda",
        0.75,
        _of_layers(lambda results, rows: _floor_share(results, rows[OURS]), least_elements=8e6),
        at_least=True,
    ),
    Target("GPU, kernels of a step, BCN+WS / GN, R-50-FPN", "cuda", 1.00, _of_steps(_kernels)),
    Target("GPU, time of a step, BCN+WS / GN, R-50-FPN", "cuda", 1.10, _of_steps(_time)),
    Target("GPU, peak of a step, BCN+WS / GN, R-50-FPN", "cuda", 0.95, _of_steps(_peak)),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=(__doc__ or "").partition("\n")[0]
    )
    parser.parse_args()
    try:
        for path in rewrite(DOCS, ROOT / FOR_THE_PAGE):
            print(path)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
