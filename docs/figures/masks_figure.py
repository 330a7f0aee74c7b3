"""Draws docs/masks.png: python docs/figures/masks_figure.py [FOLDER]

Why BCN+WS learns masks late (docs/results.md): the loss of the mask head for each setting,
and its mean over the iterations in which the norms part.

With a FOLDER of runs, named SETTING_sSEED, losses and offsets are read from them first, and added
to docs/results/masks-heads.json. The picture is drawn from that file, and the table printed, as are
the differences over equal seeds, with those of the mask AP of docs/results/masks.json.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Dict, List

import matplotlib
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from wsbcn_d2.analysis.comparison import seed_noise
from wsbcn_d2.engine import load_config

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

DOCS = Path(__file__).parents[1]
DATA = DOCS / "results" / "masks-heads.json"
COMPARISON = DOCS / "results" / "masks.json"
IMAGES = 12
# Iterations after those in which all settings are alike, and before the learning rate falls.
WINDOW = range(400, 700)
# By the name of a setting, its title and colour.
SETTINGS = {
    "gn_ws_bias10": ("GN+WS, biases learn 10 times as fast", "#0f2f58"),
    "gn_ws": ("GN+WS", "#1f5fa8"),
    "bias10": ("BCN+WS, biases learn 10 times as fast", "#8a5fc0"),
    "mask_gn": ("BCN+WS, mask head GN+WS", "#5f9fd8"),
    "mask_cn": ("BCN+WS, mask head CN+WS", "#3a9a5b"),
    "mask_in": ("BCN+WS, mask head CN(groups=64)+WS", "#90b040"),
    "mask_batch": ("BCN+WS, mask head BatchBCN+WS", "#e0a030"),
    "bcn_ws": ("BCN+WS", "#c8452d"),
}
# What the page compares over equal seeds.
PAIRS = (("mask_in", "mask_gn"), ("gn_ws", "bcn_ws"), ("mask_batch", "bcn_ws"))


def offsets(folder: Path) -> List[float]:
    """Of each normalization layer of the mask head of a trained model, how far its channels are
    from mean 0, in their standard deviations: the mean over channels of absolute values, on
    training images."""
    cfg = load_config(str(folder / "config.yaml"))
    model = build_model(cfg).train()
    DetectionCheckpointer(model).load(str(folder / "model_final.pth"))
    outputs: Dict[nn.Module, List[Tensor]] = {}
    for layer in (m for m in model.roi_heads.mask_head.modules() if isinstance(m, nn.GroupNorm)):
        layer.register_forward_hook(
            lambda layer, _, y: outputs.setdefault(layer, []).append(y.transpose(0, 1).flatten(1))
        )
    batches = iter(build_detection_train_loader(cfg))
    with EventStorage(), torch.no_grad():
        for _ in range(IMAGES):
            model(next(batches))
    values = (torch.cat(parts, 1) for parts in outputs.values())
    return [float((y.mean(1) / y.std(1)).abs().mean()) for y in values]


def losses(folder: Path) -> List[List[float]]:
    """Iterations, and the loss of the mask head there."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    found = [(line["iteration"], line["loss_mask"]) for line in lines if "loss_mask" in line]
    return [list(column) for column in zip(*found)]


def measure(runs: Path) -> None:
    data = json.loads(DATA.read_text())
    for folder in sorted(runs.iterdir()):
        if folder.name.rpartition("_s")[0] in SETTINGS:
            print(folder.name)
            data[folder.name] = {"loss_mask": losses(folder), "offsets": offsets(folder)}
    DATA.write_text(json.dumps(data) + "\n")


def draw() -> None:
    heads = json.loads(DATA.read_text())
    figure, (curves, points) = plt.subplots(
        1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2)
    )
    means: Dict[str, List[float]] = {}
    for row, (setting, (title, color)) in enumerate(reversed(SETTINGS.items())):
        runs = [heads[name] for name in heads if name.rpartition("_s")[0] == setting]
        columns = [torch.tensor(run["loss_mask"][1]) for run in runs]
        iterations = runs[0]["loss_mask"][0]
        curves.plot(iterations, sum(columns) / len(columns), color=color)
        own = means[setting] = [mean_loss(run) for run in runs]
        points.scatter(own, [row] * len(own), s=16, color=color, edgecolor="black", lw=0.5)
        points.vlines(statistics.mean(own), row - 0.3, row + 0.3, color=color, lw=2.5)
        offset = statistics.mean(statistics.mean(run["offsets"]) for run in runs)
        difference = statistics.mean(own) - statistics.mean(means["bcn_ws"])
        print(
            f"| {title} | {len(own)} | {statistics.mean(own):.3f} ± {statistics.stdev(own):.3f} "
            f"| {difference:+.3f} ± {seed_noise(own, means['bcn_ws']):.3f} | {offset:.2f} |"
        )
    curves.axvspan(WINDOW.start, WINDOW.stop, color="0.93", zorder=0)
    curves.set(xlabel="iteration", ylabel="loss of the mask head")
    points.set(xlabel=f"mean loss over iterations {WINDOW.start} to {WINDOW.stop}")
    points.set_yticks(range(len(SETTINGS)), [title for title, _ in reversed(SETTINGS.values())])
    points.tick_params(axis="y", labelsize=8)
    points.xaxis.set_major_locator(MaxNLocator(4))
    for axes in (curves, points):
        axes.grid(alpha=0.3)
    figure.savefig(DOCS / "masks.png", dpi=110)


def mean_loss(run: Dict[str, List[List[float]]]) -> float:
    """Of the mask head, over WINDOW."""
    return statistics.mean(loss for i, loss in zip(*run["loss_mask"]) if i in WINDOW)


def print_paired() -> None:
    losses = {name: mean_loss(run) for name, run in json.loads(DATA.read_text()).items()}
    runs = json.loads(COMPARISON.read_text())["runs"]
    mask_ap = {run["name"]: run["ap"]["segm"]["AP"]["value"] for run in runs}
    for setting, other in PAIRS:
        for kind, values in (("loss", losses), ("mask AP", mask_ap)):
            pairs = [
                (name, f"{other}_s{seed}")
                for name, (of, _, seed) in ((n, n.rpartition("_s")) for n in values)
                if of == setting and f"{other}_s{seed}" in values
            ]
            steps = [values[a] - values[b] for a, b in pairs]
            # Welch's interval with a constant is that of paired values.
            noise = seed_noise(steps, [0.0, 0.0])
            print(
                f"{setting} - {other}, {len(steps)} seeds: {kind} "
                f"{statistics.mean(steps):+.3f} ± {noise:.3f}"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    draw()
    print_paired()
