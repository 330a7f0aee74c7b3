"""The page of the analyses of one or more models, from their dictionaries alone."""

import math
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from .norm_analysis import Analysis
from .norms import NEARLY_DEAD
from .page import AS_WRITTEN, Block, Heading, Page, Picture, Table, Text

_MISSING = "–"
_MAX_COLUMNS = 4  # of small panels in a row


@AS_WRITTEN
def norms_page(analyses: Sequence[Analysis]) -> Page:
    """Pictures first, then the numbers.

    Args:
        analyses: from :func:`.norm_analysis.analyze_checkpoint` or ``load_analyses``.
    """
    labels = ", ".join(analysis["label"] for analysis in analyses)
    blocks: List[Block] = [
        Heading("Distance to elimination singularities"),
        Text(
            "A point is a channel: its mean and standard deviation over all images after "
            "normalization, before the affine transformation. The cross is (0, 1), where batch "
            "normalization puts every channel. Far from the cross, a channel can become dead: "
            "zero at every position after ReLU. Red channels are dead on all of the images."
        ),
        Picture(_channels_figure(analyses), "channels", "Statistics of the channels"),
        Text(
            "Layer by layer, in the order of the forward pass. **Distance**: mean over the "
            "channels of |mean| (solid) and |std − 1| (dashed). **Dead**: share of channels that "
            "ReLU sets to zero everywhere (solid), or at more than "
            f"{1 - NEARLY_DEAD:.0%} of the positions (dashed). **Drift** of the estimates, median "
            "over the channels: of the mean, in standard deviations, between the estimate and the "
            "statistics of the images (for BCN, the recalibrated estimate). **Filters**: standard "
            "deviation of the weights of a filter, before weight standardization; median and "
            "10 to 90 % of the filters."
        ),
        Picture(_layers_figure(analyses), "layers", "Layer by layer"),
        _summary_table(analyses),
    ]
    if any(analysis["probe"] for analysis in analyses):
        blocks += [
            Heading("Smoothness of the loss"),
            Text(
                "From the checkpoint, a step against the gradient of a batch; loss and gradient "
                "afterwards, on the same batch. Lines: median over the batches; bands: all. "
                "Smoother is a narrower band and a smaller change of the gradient. The effective "
                "β is the largest change of the gradient over the distance moved."
            ),
            Picture(_probe_figure(analyses), "probe", "Loss and gradient along the gradient"),
            _probe_table(analyses),
        ]
    blocks.append(Heading("Layers"))
    blocks += [_layers_table(analysis) for analysis in analyses]
    return Page(f"Normalization layers of {labels}", blocks)


def _channels_figure(analyses: Sequence[Analysis]) -> Figure:
    columns = min(_MAX_COLUMNS, len(analyses))
    rows = -(-len(analyses) // columns)
    figure = Figure(figsize=(3.3 * columns + 1.2, 3.4 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    points = None
    for axes, analysis in zip(panels, analyses):
        layers = analysis["layers"]
        mean, std = _joined(layers, "normalized_mean"), _joined(layers, "normalized_std")
        depth = np.concatenate(
            [np.full(len(x["normalized_mean"]), i + 1) for i, x in enumerate(layers)]
        )
        points = axes.scatter(
            mean, std, c=depth, cmap="viridis", s=5, alpha=0.5, linewidths=0, rasterized=True
        )
        dead = np.concatenate(
            [
                np.array(x["active"]) == 0
                if x["active"] is not None
                else np.zeros(len(x["normalized_mean"]), bool)
                for x in layers
            ]
        )
        axes.plot(mean[dead], std[dead], "o", mfc="none", mec="crimson", ms=6, mew=1.1)
        axes.plot(0, 1, "+", color="black", ms=16, mew=1.8)
        relu = sum(len(x["active"]) for x in layers if x["active"] is not None)
        axes.set_title(
            f"{analysis['label']}\n{np.abs(mean).mean():.2f} from the mean, "
            f"{np.abs(std - 1).mean():.2f} from the std of BN\n{dead.sum()} of {relu} dead",
            fontsize=9,
        )
        axes.grid(True, color="0.93")
    for axes in panels[len(analyses) :]:
        axes.set_visible(False)
    for axes in figure.axes[::columns][:rows]:
        axes.set_ylabel("standard deviation")
    for axes in panels[max(0, len(analyses) - columns) : len(analyses)]:
        axes.set_xlabel("mean")
        axes.tick_params(labelbottom=True)
    figure.colorbar(points, ax=list(panels), label="layer (order of the forward pass)", aspect=40)
    return figure


def _layers_figure(analyses: Sequence[Analysis]) -> Figure:
    """One row of the figure for each quantity, over the layers."""
    names = list(dict.fromkeys(x["name"] for a in analyses for x in a["layers"]))
    drawn = [_draw_distance, _draw_dead, _draw_drift, _draw_filters]
    figure = Figure(figsize=(max(7.0, 0.27 * len(names) + 3.2), 10.5), layout="constrained")
    panels = figure.subplots(len(drawn), 1, sharex=True)
    for index, analysis in enumerate(analyses):
        layers = {layer["name"]: layer for layer in analysis["layers"]}
        for axes, draw in zip(panels, drawn):
            draw(axes, [layers.get(name) for name in names], f"C{index % 10}")
    titles = ("distance from BN", "dead channels", "drift of the mean", "std of filters")
    for axes, title in zip(panels, titles):
        axes.set_ylabel(title)
        axes.grid(True, color="0.93")
        axes.margins(x=0.01)
        if not axes.has_data():
            axes.text(0.5, 0.5, "none here", transform=axes.transAxes, ha="center", color="0.5")
    panels[1].yaxis.set_major_formatter("{x:.0%}")
    if panels[3].has_data():
        panels[3].set_yscale("log")
        # The formatters of a logarithmic axis write formulas, and those are off.
        panels[3].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[3].yaxis.set_major_formatter("{x:g}")
        panels[3].yaxis.set_minor_formatter(NullFormatter())
    for axes in panels[:3]:
        axes.set_ylim(bottom=0)
    panels[-1].set_xticks(range(len(names)), [_short(name) for name in names], fontsize=7)
    panels[-1].tick_params(axis="x", rotation=90)
    for index, analysis in enumerate(analyses):
        panels[0].plot([], [], color=f"C{index % 10}", label=analysis["label"])
    panels[0].legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=9)
    return figure


def _draw_distance(axes: Axes, layers: Sequence[Optional[Dict[str, Any]]], color: str) -> None:
    axes.plot(_over_layers(layers, "normalized_mean", _mean_distance), "-", color=color)
    std = _over_layers(layers, "normalized_std", _std_distance)
    axes.plot(std, "--", color=color, linewidth=1)


def _draw_dead(axes: Axes, layers: Sequence[Optional[Dict[str, Any]]], color: str) -> None:
    axes.plot(_over_layers(layers, "active", _dead), ".-", color=color, ms=4)
    nearly = _over_layers(layers, "active", lambda layer: _dead(layer, NEARLY_DEAD))
    axes.plot(nearly, ".--", color=color, ms=3, linewidth=1)


def _draw_drift(axes: Axes, layers: Sequence[Optional[Dict[str, Any]]], color: str) -> None:
    drift = _over_layers(
        layers, "drift_mean", lambda layer: np.median(np.array(layer["drift_mean"], float))
    )
    if np.isfinite(drift).any():
        axes.plot(drift, "-", color=color)


def _draw_filters(axes: Axes, layers: Sequence[Optional[Dict[str, Any]]], color: str) -> None:
    low, middle, high = (
        _over_layers(layers, "filter_std", lambda layer: np.percentile(layer["filter_std"], at))
        for at in (10, 50, 90)
    )
    if np.isfinite(middle).any():
        axes.plot(middle, "-", color=color)
        axes.fill_between(range(len(middle)), low, high, color=color, alpha=0.15, linewidth=0)


def _over_layers(
    layers: Sequence[Optional[Dict[str, Any]]],
    key: str,
    value: Callable[[Dict[str, Any]], float],
) -> np.ndarray:
    """A number for each layer, NaN for one that the model lacks or that has nothing under key."""
    return np.array(
        [np.nan if x is None or x.get(key) is None else value(x) for x in layers], dtype=float
    )


def _probe_figure(analyses: Sequence[Analysis]) -> Figure:
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    probed = [(i, a) for i, a in enumerate(analyses) if a["probe"]]
    all_sizes = sorted(
        {step * a["probe"]["learning_rate"] for _, a in probed for step in a["probe"]["steps"]}
    )
    for i, analysis in probed:
        probe, color = analysis["probe"], f"C{i % 10}"
        sizes = np.array(probe["steps"]) * probe["learning_rate"]
        for axes, key in zip(panels, ("loss_change", "gradient_change")):
            values = np.array(probe[key], dtype=float)  # None: not finite
            middle = _over_batches(np.nanmedian, values)
            axes.plot(sizes, middle, "o-", color=color, ms=4, label=analysis["label"])
            axes.fill_between(
                sizes,
                _over_batches(np.nanmin, values),
                _over_batches(np.nanmax, values),
                color=color,
                alpha=0.12,
                linewidth=0,
            )
    for axes, title in zip(
        panels, ("loss after the step − loss before", "change of the gradient (L2 norm)")
    ):
        axes.set_xscale("log")
        axes.set_xticks(all_sizes, [f"{size:g}" for size in all_sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("step size η")
        axes.set_title(title)
    panels[0].axhline(0, color="0.3", linewidth=1)
    panels[1].legend(loc="upper left", fontsize=8, frameon=False)
    rng = np.random.default_rng(0)
    for row, (i, analysis) in enumerate(probed):
        values = np.array(analysis["probe"]["smoothness"], dtype=float)
        values = values[np.isfinite(values)]
        jitter = rng.uniform(-0.12, 0.12, len(values))
        panels[2].plot(values, row + jitter, "o", color=f"C{i % 10}", alpha=0.5, ms=5)
        if len(values):
            panels[2].plot(np.median(values), row, "|", color="black", ms=20, mew=2)
    panels[2].set_yticks(range(len(probed)), [analysis["label"] for _, analysis in probed])
    panels[2].set_ylim(len(probed) - 0.5, -0.5)
    panels[2].set_xlim(left=0)
    panels[2].xaxis.set_major_locator(MaxNLocator(5))
    panels[2].set_title("effective β (a dot is a batch, | the median)")
    for axes in panels:
        axes.grid(True, color="0.93")
    return figure


def _summary_table(analyses: Sequence[Analysis]) -> Table:
    rows = []
    for analysis in analyses:
        layers = analysis["layers"]
        mean, std = _joined(layers, "normalized_mean"), _joined(layers, "normalized_std")
        relu = [layer for layer in layers if layer["active"] is not None]
        active = _joined(relu, "active")
        drift = _joined([x for x in layers if "drift_mean" in x], "drift_mean")
        spread = _joined([x for x in layers if "drift_log_std" in x], "drift_log_std")
        filters = _joined([x for x in layers if "filter_std" in x], "filter_std")
        rows.append(
            [
                analysis["label"],
                f"{np.abs(mean).mean():.3f}",
                f"{np.abs(std - 1).mean():.3f}",
                _share(active, active == 0),
                _share(active, active < NEARLY_DEAD),
                _median(drift),
                _median(np.abs(spread)),
                _median(filters),
            ]
        )
    header = ["model", "|mean|", "|std − 1|", "dead", "nearly dead", "drift of the mean"]
    return Table([*header, "|log| drift of the std", "std of filters"], rows)


def _layers_table(analysis: Analysis) -> Table:
    rows = []
    for layer in analysis["layers"]:
        active = None if layer["active"] is None else np.array(layer["active"])
        rows.append(
            [
                layer["name"],
                layer["kind"] + ("+WS" if layer.get("weight_standardization") else ""),
                str(len(layer["normalized_mean"])),
                f"{_mean_distance(layer):.3f}",
                f"{_std_distance(layer):.3f}",
                _MISSING if active is None else f"{np.median(active):.2f}",
                _MISSING if active is None else str(int((active == 0).sum())),
                _MISSING if active is None else str(int((active < NEARLY_DEAD).sum())),
                _median(layer.get("drift_mean")),
                _median(np.abs(layer["drift_log_std"]) if "drift_log_std" in layer else None),
                _median(np.abs(layer["filter_mean"]) if "filter_mean" in layer else None),
                _median(layer.get("filter_std")),
            ]
        )
    header = ["layer", "kind", "channels", "|mean|", "|std − 1|", "active (median)", "dead"]
    header += ["nearly dead", "drift of the mean", "|log| drift of the std"]
    header += ["|mean| of filters", "std of filters"]
    return Table(header, rows, left=2, summary=f"{analysis['label']}: {len(rows)} layers")


def _probe_table(analyses: Sequence[Analysis]) -> Table:
    rows = []
    for analysis in analyses:
        probe: Optional[Dict[str, Any]] = analysis["probe"]
        if probe is None:
            continue
        at_one = int(np.argmin(np.abs(np.array(probe["steps"]) - 1)))
        step = probe["steps"][at_one] * probe["learning_rate"]
        changes = np.array(probe["loss_change"], dtype=float)[:, at_one]
        gradients = np.array(probe["gradient_change"], dtype=float)[:, at_one]
        rows.append(
            [
                analysis["label"],
                str(len(probe["loss"])),
                _median(probe["loss"]),
                _median(probe["gradient_norm"]),
                _number(float(probe["weight_norm"] or math.nan)),
                f"{step:g}",
                f"{_number(changes.min())} to {_number(changes.max())}",
                _median(gradients),
                _median(np.array(probe["smoothness"], dtype=float)),
            ]
        )
    header = ["model", "batches", "loss", "‖gradient‖", "‖weights‖", "step", "change of the loss"]
    return Table([*header, "change of the gradient", "effective β"], rows)


def _joined(layers: Sequence[Dict[str, Any]], key: str) -> np.ndarray:
    return np.concatenate([np.array(layer[key], float) for layer in layers] or [np.zeros(0)])


def _mean_distance(layer: Dict[str, Any]) -> float:
    return float(np.abs(np.array(layer["normalized_mean"], float)).mean())


def _std_distance(layer: Dict[str, Any]) -> float:
    return float(np.abs(np.array(layer["normalized_std"], float) - 1).mean())


def _dead(layer: Dict[str, Any], below: float = 0.0) -> float:
    active = np.array(layer["active"])
    return float(np.mean((active == 0) | (active < below)))


def _over_batches(function: Any, values: np.ndarray) -> np.ndarray:
    return np.array([function(v) if np.isfinite(v).any() else np.nan for v in values.T])


def _share(values: np.ndarray, chosen: np.ndarray) -> str:
    return f"{chosen.mean():.1%}" if len(values) else _MISSING


def _median(values: Any) -> str:
    values = np.zeros(0) if values is None else np.asarray(values, float)
    values = values[np.isfinite(values)]
    return _number(np.median(values)) if len(values) else _MISSING


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if np.isfinite(value) else "not finite"


def _short(name: str) -> str:
    """Without what all names have and what says nothing."""
    drop = ("backbone", "bottom_up", "norm", "roi_heads")
    return ".".join(part for part in name.split(".") if part not in drop) or name
