"""Draws docs/masks.png: python docs/figures/masks_figure.py [FOLDER]

Why BCN+WS learns masks late (docs/results.md): the loss of the mask head for each setting,
and its mean over the iterations in which the norms part.

With a FOLDER of runs, named SETTING_sSEED, their losses are read first, and added to
docs/results/masks-heads.json. The picture is drawn from that file. Printed are when the mean loss
leaves its plateau, the losses, and the differences from BCN+WS over equal seeds, with those of the
mask AP of docs/results/masks.json.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Dict, List

import matplotlib
import torch

from wsbcn_d2.analysis.comparison import seed_noise

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

DOCS = Path(__file__).parents[1]
DATA = DOCS / "results" / "masks-heads.json"
COMPARISON = DOCS / "results" / "masks.json"
# Most of the fall of the loss, before the learning rate falls.
WINDOW = range(400, 700)
PLATEAU = 0.6  # the loss is ln 2 at first
BASE = "bcn_ws"
# By the name of a setting, its title and colour.
SETTINGS = {
    "gn_ws_predictor100": ("GN+WS, mask predictor × 100", "#0f2f58"),
    "bcn_ws_predictor100": ("BCN+WS, mask predictor × 100", "#7a1f12"),
    "gn_ws": ("GN+WS", "#1f5fa8"),
    "backbone_gn": ("BCN+WS, backbone GN+WS", "#5f9fd8"),
    "backbone_cn": ("BCN+WS, backbone CN+WS", "#d070a8"),
    "all_groups8": ("BCN+WS with 8 groups", "#3a9a5b"),
    "heads_gn": ("BCN+WS, FPN and heads GN+WS", "#90b040"),
    "all_batch": ("BatchBCN+WS", "#e0a030"),
    BASE: ("BCN+WS", "#c8452d"),
    "half": ("BCN+WS, half the output of heads", "#8a8a8a"),
}

Columns = List[List[float]]  # iterations, and the loss of the mask head there


def read(runs: Path) -> None:
    """Adds the losses of the runs in a folder."""
    data = json.loads(DATA.read_text())
    for file in sorted(runs.glob("*/metrics.json")):
        lines = map(json.loads, file.read_text().splitlines())
        found = [(line["iteration"], line["loss_mask"]) for line in lines if "loss_mask" in line]
        data[file.parent.name] = list(zip(*found))
    DATA.write_text(json.dumps(data) + "\n")


def mean_loss(columns: Columns) -> float:
    """Over WINDOW."""
    return statistics.mean(loss for i, loss in zip(*columns) if i in WINDOW)


def mean_curve(runs: Dict[str, Columns], setting: str) -> Columns:
    """Over the runs of a setting."""
    own = [columns for name, columns in runs.items() if name.rpartition("_s")[0] == setting]
    return [own[0][0], torch.tensor([losses for _, losses in own]).mean(0).tolist()]


def draw(runs: Dict[str, Columns]) -> None:
    figure, (curves, points) = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=(3, 2)
    )
    for row, (setting, (_, color)) in enumerate(reversed(SETTINGS.items())):
        own = [runs[name] for name in runs if name.rpartition("_s")[0] == setting]
        curves.plot(*mean_curve(runs, setting), color=color)
        means = list(map(mean_loss, own))
        points.scatter(means, [row] * len(means), s=16, color=color, edgecolor="black", lw=0.5)
        points.vlines(statistics.mean(means), row - 0.3, row + 0.3, color=color, lw=2.5)
    curves.axvspan(WINDOW.start, WINDOW.stop, color="0.93", zorder=0)
    curves.set(xlabel="iteration", ylabel="loss of the mask head")
    points.set(xlabel=f"mean loss over iterations {WINDOW.start} to {WINDOW.stop}")
    points.set_yticks(range(len(SETTINGS)), [title for title, _ in reversed(SETTINGS.values())])
    points.tick_params(axis="y", labelsize=8)
    points.xaxis.set_major_locator(MaxNLocator(4))
    for axes in (curves, points):
        axes.grid(alpha=0.3)
    figure.savefig(DOCS / "masks.png", dpi=110)


def compare(what: str, values: Dict[str, float]) -> None:
    """Prints settings, and their paired differences from BASE."""
    for setting in dict.fromkeys(name.rpartition("_s")[0] for name in values):
        names = [name for name in values if name.rpartition("_s")[0] == setting]
        own = [values[name] for name in names]
        text = f"{what} of {setting}, {len(own)} runs: {statistics.mean(own):.3f}"
        pairs = [(name, f"{BASE}_s{name.rpartition('_s')[2]}") for name in names]
        steps = [values[a] - values[b] for a, b in pairs if b in values]
        if len(steps) > 1 and setting != BASE:
            # Welch's interval with a constant is that of paired values.
            noise = seed_noise(steps, [0.0, 0.0])
            text += f"; {statistics.mean(steps):+.3f} ± {noise:.3f} over {len(steps)} equal seeds"
        print(text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read(Path(sys.argv[1]))
    losses: Dict[str, Columns] = json.loads(DATA.read_text())
    draw(losses)
    for setting in SETTINGS:
        ends = [i for i, loss in zip(*mean_curve(losses, setting)) if loss < PLATEAU]
        print(f"loss of {setting} below {PLATEAU} from iteration {ends[0] if ends else 'none'}")
    compare("loss", {name: mean_loss(columns) for name, columns in losses.items()})
    compared = json.loads(COMPARISON.read_text())["runs"]
    compare("mask AP", {run["name"]: run["ap"]["segm"]["AP"]["value"] for run in compared})
