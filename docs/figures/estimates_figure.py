"""Draws docs/estimates.png: python docs/figures/estimates_figure.py [FOLDER]

How far estimates are from the statistics that they estimate, while a model trains (docs/results.md,
"Why does BCN+WS learn masks late?").

With the FOLDER of a run that kept a checkpoint every few iterations, the errors are measured first
and written to docs/results/estimates.json. The picture is drawn from that file.
"""

import json
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.engine import load_config

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DOCS = Path(__file__).parents[1]
DATA = DOCS / "results" / "estimates.json"
IMAGES = 16
# By where the layers are; the FPN is left out.
PARTS = {
    "backbone.bottom_up.": "backbone",
    "roi_heads.box_head.": "box head",
    "roi_heads.mask_head.": "mask head",
}
# What is drawn, with its title and colour.
LINES = {
    "estimate": ("running estimate", "#c8452d"),
    "image": ("statistics of one image", "#1f5fa8"),
}


def errors(cfg: CfgNode, checkpoint: Path) -> Dict[str, Dict[str, List[float]]]:
    """Errors of mean and deviation in each part, means over its layers and channels.

    True are the statistics of IMAGES training images with the weights of the checkpoint. Errors are
    in their standard deviations: |mean' - mean| / std, and |std' - std| / std.
    """
    model = build_model(cfg).train()
    DetectionCheckpointer(model).load(str(checkpoint))
    layers = {
        name: (module, module.running_mean.clone(), module.running_var.sqrt(), [])
        for name, module in model.named_modules()
        if isinstance(module, BatchChannelNorm)
    }
    for layer, _, _, inputs in layers.values():
        layer.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].transpose(0, 1).flatten(1))
        )
    batches = iter(build_detection_train_loader(cfg))
    with EventStorage(), torch.no_grad():
        for _ in range(IMAGES):
            model(next(batches))
    found: Dict[str, Dict[str, List[List[float]]]] = {}
    for name, (_, mean, std, inputs) in layers.items():
        part = next((title for prefix, title in PARTS.items() if name.startswith(prefix)), None)
        if part is None:
            continue
        true = _moments(torch.cat(inputs, 1))
        for kind, pairs in (("estimate", [(mean, std)]), ("image", map(_moments, inputs))):
            rows = [
                [_mean(((a - b) / true[1]).abs()) for a, b in zip(pair, true)] for pair in pairs
            ]
            found.setdefault(part, {}).setdefault(kind, []).extend(rows)
    return {
        part: {kind: torch.tensor(rows).mean(0).tolist() for kind, rows in kinds.items()}
        for part, kinds in found.items()
    }


def _moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    return x.mean(1), x.std(1)


def _mean(x: Tensor) -> float:
    return float(x.mean())


def measure(folder: Path) -> None:
    cfg = load_config(str(folder / "config.yaml"))
    data = {}
    for checkpoint in sorted(folder.glob("model_[0-9]*.pth")):
        iteration = int(checkpoint.stem.rpartition("_")[2]) + 1
        data[iteration] = errors(cfg, checkpoint)
        print(iteration, data[iteration], flush=True)
    DATA.write_text(json.dumps(data) + "\n")


def draw() -> None:
    data = json.loads(DATA.read_text())
    figure, rows = plt.subplots(
        2, 3, figsize=(10, 4.6), layout="constrained", sharex=True, sharey="row"
    )
    for i, (row, what) in enumerate(zip(rows, ("mean", "standard deviation"))):
        row[0].set_ylabel(f"error of the {what}")
        for axes, part in zip(row, PARTS.values()):
            for kind, (title, color) in LINES.items():
                values = [at[part][kind][i] for at in data.values()]
                axes.plot([int(iteration) for iteration in data], values, color=color, label=title)
            axes.grid(alpha=0.3)
    for axes, part in zip(rows[0], PARTS.values()):
        axes.set_title(part)
    for row in rows:
        row[0].set_ylim(bottom=0)
    for axes in rows[1]:
        axes.set_xlabel("iteration")
    rows[0][0].legend(fontsize=8)
    figure.savefig(DOCS / "estimates.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    draw()
