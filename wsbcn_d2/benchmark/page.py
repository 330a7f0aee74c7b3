"""The part of docs/benchmarks.md that is measured: bars, tables and pictures, from JSON files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

from ..engine.checkpoint import atomic_write
from . import report
from .report import GROUP_NORM, OURS, REFERENCE, Results

BEGIN = "<!-- begin: written by python -m wsbcn_d2.benchmark -->"
END = "<!-- end -->"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}

# What one bar comes to: what was measured, in words, and whether it is met.
Verdict = Tuple[str, bool]

# (N, C) tables of float32 beside the activation, which a layer may save.
_TABLES = 8


@dataclass(frozen=True)
class Bar:
    """A limit that is to be kept.

    Attributes:
        text: what is limited, and the limit.
        device: "cpu" or "cuda", whose results count.
        judge: from those results; None if none of them tells.
    """

    text: str
    device: str
    judge: Callable[[Sequence[Results]], Optional[Verdict]]


def load_results(folder: Path) -> List[Tuple[str, Results]]:
    """The results in a folder, by the names of their files without ``.json``.

    Raises:
        ValueError: if a file holds something else.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            kind = content["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the output of a benchmark ({type(error).__name__}: {error})"
            ) from error
        if kind not in ("norms", "train"):
            raise ValueError(f"{path}: kind must be 'norms' or 'train', found {kind!r}")
        results.append((path.stem, content))
    return results


def render(results: Sequence[Tuple[str, Results]], page: str) -> str:
    """The measured part.

    Args:
        results: from :func:`load_results`.
        page: name of the page without ``.md``, with which the names of its pictures begin.
    """
    parts = [_bars_table([content for _, content in results]), ""]
    for device, title in DEVICES.items():
        parts += [f"## {title}", ""]
        here = [(name, content) for name, content in results if content["device"] == device]
        if not here:
            parts += [_not_measured(device), ""]
        for name, content in here:
            heading = {"norms": "Normalization layers", "train": "Training steps"}
            parts += [f"### {heading[content['kind']]} ({name})", ""]
            parts += [f"![{heading[content['kind']]}]({page}-{name}.png)", ""]
            parts += [report.markdown(content)]
    return "\n".join(parts).rstrip() + "\n"


def rewrite(page: Path, folder: Path) -> List[Path]:
    """Rewrites the measured part of a page, and its pictures beside it.

    Args:
        page: a Markdown file with the lines BEGIN and END; what is outside them stays.
        folder: with the JSON files.

    Returns:
        The files that were written.

    Raises:
        ValueError: if the lines are not there, or a JSON file is none of ours.
    """
    results = load_results(folder)
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise ValueError(f"{page} must have the lines {BEGIN!r} and {END!r}, in this order")
    written = []
    for name, content in results:
        picture = page.with_name(f"{page.stem}-{name}.png")
        report.write_plot(content, str(picture))
        written.append(picture)
    with atomic_write(str(page), "w") as file:
        file.write(before + begin + "\n" + render(results, page.stem) + "\n" + end + after)
    return [*written, page]


def _not_measured(device: str) -> str:
    reason = {"cuda": "no GPU at hand", "cpu": "not run"}[device]
    return f"not measured: {reason}. `python -m wsbcn_d2.benchmark --device {device}` does it."


def _bars_table(results: Sequence[Results]) -> str:
    rows = []
    for bar in BARS:
        verdict = bar.judge([r for r in results if r["device"] == bar.device])
        if verdict is None:
            rows.append([bar.text, _not_measured(bar.device), ""])
        else:
            rows.append([bar.text, verdict[0], "yes" if verdict[1] else "**no**"])
    return report.table(["bar", "measured", "met"], rows, left=3)


def _layers(
    results: Sequence[Results], memory_format: Optional[str] = None
) -> Iterator[Tuple[str, Results, dict]]:
    """Description, results and contenders of every measured layer."""
    for content in results:
        if content["kind"] == "norms":
            for (dtype, form), layers in report.cases(content).items():
                for rows in layers.values():
                    if memory_format in (None, form) and OURS in rows:
                        shape = report.shape_text(rows[OURS]["shape"])
                        yield f"{shape} {dtype} {form}", content, rows


def _elements(rows: dict) -> int:
    n, c, h, w = rows[OURS]["shape"]
    return n * c * h * w


def _worst_ratio(
    other: str, limit: float, memory_format: Optional[str] = None, least_elements: int = 0
) -> Callable[[Sequence[Results]], Optional[Verdict]]:
    def judge(results: Sequence[Results]) -> Optional[Verdict]:
        ratios = [
            (report.ratio(rows, OURS, other), text)
            for text, _, rows in _layers(results, memory_format)
            if other in rows and _elements(rows) >= least_elements
        ]
        return _most(ratios, limit)

    return judge


def _most(
    values: Sequence[Tuple[float, str]], limit: float, form: str = ".2f"
) -> Optional[Verdict]:
    """Whether all values are within the limit; None if there are none."""
    if not values:
        return None
    (best, _), (worst, where) = min(values), max(values)
    return f"{best:{form}} to {worst:{form}} (most: {where})", worst <= limit


def _floor(results: Sequence[Results]) -> Optional[Verdict]:
    shares = [
        (report.floor_share(content, rows[OURS]), text)
        for text, content, rows in _layers(results)
        if _elements(rows) >= 8e6
    ]
    if not shares:
        return None
    (least, where), (most, _) = min(shares), max(shares)
    return f"{least:.0%} to {most:.0%} (least: {where})", least >= 0.75


def _saved(results: Sequence[Results]) -> Optional[Verdict]:
    ratios, met = [], True
    for text, _, rows in _layers(results):
        if GROUP_NORM in rows:
            ours, theirs = (rows[name]["saved_bytes"] for name in (OURS, GROUP_NORM))
            tables = _TABLES * 4 * rows[OURS]["shape"][0] * rows[OURS]["shape"][1]
            met = met and ours <= theirs + tables
            ratios.append((ours / theirs, text))
    verdict = _most(ratios, limit=0)
    return verdict and (verdict[0] + ", the rest tables" * met, met)


def _step(
    value: Callable[[dict, dict], float], limit: float, form: str = ".2f"
) -> Callable[[Sequence[Results]], Optional[Verdict]]:
    """A bar on BCN+WS, with GN beside it, in every measured setting of the training step."""

    def judge(results: Sequence[Results]) -> Optional[Verdict]:
        values = []
        for content in results:
            if content["kind"] == "train":
                rows = {(row["norm"], row["images"]): row for row in content["rows"]}
                for norm, images in rows:
                    if norm == "BCN+WS" and ("GN", images) in rows:
                        measured = value(rows[norm, images], rows["GN", images])
                        values.append((measured, report.train_title(content, images)))
        return _most(values, limit, form)

    return judge


def _time_ratio(ours: dict, group_norm: dict) -> float:
    return ours["step"]["median"] / group_norm["step"]["median"]


def _memory_ratio(ours: dict, group_norm: dict) -> float:
    return ours["peak_bytes"] / group_norm["peak_bytes"]


def _standardization_share(ours: dict, group_norm: dict) -> float:
    return ours["standardization"]["median"] / ours["step"]["median"]


BARS = (
    Bar(
        "GPU, BCN / GroupNorm, forward + backward, NCHW, 1 M elements or more: ≤ 1.00",
        "cuda",
        _worst_ratio(GROUP_NORM, 1.0, "nchw", 1_000_000),
    ),
    Bar(
        "GPU, the same in channels_last: ≤ 0.80",
        "cuda",
        _worst_ratio(GROUP_NORM, 0.8, "channels_last", 1_000_000),
    ),
    Bar("GPU, BCN, share of the floor, 8 M elements or more: ≥ 75 %", "cuda", _floor),
    Bar("GPU, BCN / GroupNorm, saved for backward: ≤ 1.00 + tables", "cuda", _saved),
    Bar("GPU, step of Mask R-CNN, BCN+WS / GN, time: ≤ 1.02", "cuda", _step(_time_ratio, 1.02)),
    Bar("GPU, the same, peak memory: ≤ 1.00", "cuda", _step(_memory_ratio, 1.0, ".3f")),
    Bar(
        "GPU, WS standardization, share of that step: ≤ 1 %",
        "cuda",
        _step(_standardization_share, 0.01, ".2%"),
    ),
    Bar("CPU, BCN / reference, forward + backward: ≤ 1/3", "cpu", _worst_ratio(REFERENCE, 1 / 3)),
    Bar("CPU, BCN / GroupNorm, saved for backward: ≤ 1.00 + tables", "cpu", _saved),
    Bar("CPU, step of Mask R-CNN, BCN+WS / GN, time: ≤ 1.10", "cpu", _step(_time_ratio, 1.10)),
)
