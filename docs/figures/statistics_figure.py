"""Draws docs/statistics.png: python docs/figures/statistics_figure.py

A channel whose mean differs from image to image, as in a detector that sees one image at a time,
goes through the real layers.
"""

from pathlib import Path
from typing import Dict, List

import matplotlib
import torch
from torch import Tensor, nn

from wsbcn_d2 import BatchChannelNorm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

STEPS = 100
RATE = 0.1


def trace(layer: nn.Module, images: List[Tensor], warmup: bool = False) -> List[float]:
    """The mean estimate after every step."""
    means = []
    for step, image in enumerate(images):
        layer.update_rate = max(RATE, 1 / (step + 1)) if warmup else RATE
        layer(image)
        means.append(layer.running_mean.item())
    return means


def main() -> None:
    torch.manual_seed(0)
    ranks = [[2 + torch.randn(1) + torch.randn(1, 1, 8, 8) for _ in range(STEPS)] for _ in range(2)]
    both = [torch.cat(pair) for pair in zip(*ranks)]

    def layer() -> nn.Module:
        return BatchChannelNorm(1, 1, update_rate=RATE)

    panels: Dict[str, Dict[str, List[float]]] = {
        "the first iterations": {
            "update rate 0.1": trace(layer(), ranks[0]),
            "0.1 with UPDATE_RATE_WARMUP": trace(layer(), ranks[0], warmup=True),
        },
        "two processes": {
            "process 1, SYNC_PERIOD: 0": trace(layer(), ranks[0], warmup=True),
            "process 2, SYNC_PERIOD: 0": trace(layer(), ranks[1], warmup=True),
            "both, SYNC_PERIOD: 1": trace(layer(), both, warmup=True),
        },
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True, constrained_layout=True)
    for axis, (title, curves) in zip(axes, panels.items()):
        for rank, marker in zip(ranks[: 1 if axis is axes[0] else 2], ("o", "x")):
            values = [image.mean().item() for image in rank]
            axis.plot(values, marker, color="0.75", markersize=4, zorder=0)
        for label, values in curves.items():
            axis.plot(values, label=label, linewidth=2)
        axis.axhline(2, color="0.5", linestyle=":", zorder=0)
        axis.set_title(title)
        axis.set_xlabel("iteration")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=3, fontsize=9)
    axes[0].set_ylabel("mean of a channel\n(grey: of each image)")
    figure.savefig(Path(__file__).parents[1] / "statistics.png", dpi=110)


if __name__ == "__main__":
    main()
