"""Draws docs/overview.png: python docs/figures/overview_figure.py

Box and mask AP of the runs in docs/results/rates.json (1,000 steps) and docs/results/long.json
(4,000 steps): a small dot is a run, a bar the mean over the seeds.
"""

import json
from pathlib import Path
from typing import Dict, List

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DOCS = Path(__file__).parents[1]
KINDS = {"bbox": ("box AP", "#1f5fa8"), "segm": ("mask AP", "#d9822b")}
# Title, file, and the settings by the names below the bars.
PANELS = (
    (
        "1,000 steps of 1 image",
        "rates",
        {"BN": "bn_pre", "GN": "gn_pre", "GN+WS": "gn_ws_pre", "BCN+WS": "bcn_ws_pre"},
    ),
    (
        "4,000 steps of 1 image",
        "long",
        {
            "BN: 1,000 steps\nof 4 images": "bn_batch4",
            "GN": "gn",
            "GN+WS": "gn_ws",
            "BCN+WS": "bcn_ws",
        },
    ),
)


def read_runs(name: str) -> Dict[str, List[Dict[str, float]]]:
    """AP of the runs of each setting, by kind."""
    runs: Dict[str, List[Dict[str, float]]] = {}
    for run in json.loads((DOCS / "results" / f"{name}.json").read_text())["runs"]:
        ap = {kind: run["ap"][kind]["AP"]["value"] for kind in KINDS}
        runs.setdefault(run["label"], []).append(ap)
    return runs


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axes, (title, name, settings) in zip(panels, PANELS):
        runs = read_runs(name)
        for place, setting in enumerate(settings.values()):
            for offset, (kind, (_, color)) in zip((-0.19, 0.19), KINDS.items()):
                values = [run[kind] for run in runs[setting]]
                mean = sum(values) / len(values)
                axes.bar(place + offset, mean, 0.34, color=color, alpha=0.55)
                axes.text(place + offset, 2, f"{mean:.1f}", ha="center", fontsize=8)
                dots = dict(s=14, color=color, edgecolor="black", linewidth=0.6, zorder=3)
                axes.scatter([place + offset] * len(values), values, **dots)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(settings)), settings, fontsize=9)
        axes.set_ylim(0, 90)
        axes.set_yticks(range(0, 81, 20))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.55) for _, color in KINDS.values()]
    panels[0].legend(handles, [label for label, _ in KINDS.values()], ncol=2, frameon=False)
    panels[0].set_ylabel("AP")
    figure.tight_layout()
    figure.savefig(DOCS / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
