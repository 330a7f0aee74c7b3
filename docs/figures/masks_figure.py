"""Draws docs/masks.png: python docs/figures/masks_figure.py [FOLDER]

Why BCN+WS learns masks late (docs/results.md). On the left is the loss of the mask head, on the
right how far the outputs of its normalization layers are from mean 0, and the mask AP.

With a FOLDER of runs, named SETTING_sSEED, losses and distances are read from them first and
written to docs/results/masks-heads.json. The picture is drawn from that file, and AP from
docs/results/masks.json.
"""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import matplotlib
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from wsbcn_d2.engine import load_config

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DOCS = Path(__file__).parents[1]
DATA = DOCS / "results" / "masks-heads.json"
IMAGES = 12
# By the name of a setting, its title and colour.
SETTINGS = {
    "gn_ws": ("GN+WS", "#1f5fa8"),
    "mask_gn": ("BCN+WS, mask head GN+WS", "#5f9fd8"),
    "mask_cn": ("BCN+WS, mask head CN+WS", "#3a9a5b"),
    "bias10": ("BCN+WS, biases learn 10 times as fast", "#8a5fc0"),
    "mask_batch": ("BCN+WS, mask head BatchBCN+WS", "#e0a030"),
    "bcn_ws": ("BCN+WS", "#c8452d"),
}


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
    data: Dict[str, Dict[str, Any]] = {}
    for folder in sorted(runs.iterdir()):
        if folder.name.rpartition("_s")[0] in SETTINGS:
            print(folder.name)
            data[folder.name] = {"loss_mask": losses(folder), "offsets": offsets(folder)}
    DATA.write_text(json.dumps(data) + "\n")


def draw() -> None:
    heads = json.loads(DATA.read_text())
    runs = json.loads((DOCS / "results" / "masks.json").read_text())["runs"]
    ap = {run["name"]: run["ap"]["segm"]["AP"]["value"] for run in runs}
    figure, (curves, points) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for setting, (title, color) in SETTINGS.items():
        names = [name for name in heads if name.rpartition("_s")[0] == setting]
        columns = [torch.tensor(heads[name]["loss_mask"][1]) for name in names]
        curves.plot(
            heads[names[0]]["loss_mask"][0], sum(columns) / len(columns), color=color, label=title
        )
        x = [sum(heads[name]["offsets"]) / len(heads[name]["offsets"]) for name in names]
        y = [ap[name] for name in names]
        points.scatter(x, y, color=color, edgecolor="black", linewidth=0.6, zorder=3)
    curves.set(xlabel="iteration", ylabel="loss of the mask head")
    points.set(xlabel="offsets in the mask head after training", ylabel="mask AP", xlim=(0, None))
    curves.legend(fontsize=7, loc="lower left")
    for axes in (curves, points):
        axes.grid(alpha=0.3)
    figure.savefig(DOCS / "masks.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    draw()
