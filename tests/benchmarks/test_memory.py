import json
import re

import pytest
import torch
from torch import nn

from benchmarks import page
from benchmarks.memory import _trainee, benchmark_memory, largest_batch
from benchmarks.page import DOCS, FOR_THE_PAGE, ROOT
from benchmarks.train import fixed_heads, make_batch
from wsbcn_d2 import BatchChannelNorm

CPU = torch.device("cpu")
SMALL = {"RESNETS.DEPTH": "18", "RESNETS.RES2_OUT_CHANNELS": "64", "FPN.OUT_CHANNELS": "64"}
SMALL.update({"ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8", "ROI_BOX_HEAD.FC_DIM": "32"})
OPTS = [text for key, value in SMALL.items() for text in (f"MODEL.{key}", value)]


@pytest.mark.parametrize("gib,expected", [(3.4, 0), (3.5, 1), (4.9, 1), (5.0, 2), (11, 6)])
def test_how_many_images_fit(gib, expected):
    """1 GiB is for others, 1 for what all images share, and each has 1.5."""
    assert largest_batch(int(2.5 * 2**30), int(4.0 * 2**30), gib) == expected


@pytest.mark.parametrize("model,numbers", [("Mask R-CNN", (1,)), ("RetinaNet", (1, 2))])
def test_peaks(model, numbers):
    measured = benchmark_memory(
        [model],
        ["GN", "BCN+WS"],
        device=CPU,
        dtypes=["float32"],
        images=numbers,
        size=(64, 96),
        opts=OPTS,
        repetitions=0,
        progress=False,
    )
    assert json.loads(json.dumps(measured)) == measured
    keys = ("images", "norm", "checkpointed")
    rows = {tuple(row[key] for key in keys): row for row in measured["rows"]}
    assert len(rows) == len(measured["rows"]) == len(numbers) * 2 * 3
    for (images, norm, checkpointed), row in rows.items():
        assert row["model"] == model and row["dtype"] == "float32" and "step" not in row
        if images == 2:
            assert row["saved_bytes"] > rows[1, norm, checkpointed]["saved_bytes"]
        if checkpointed:
            assert row["saved_bytes"] < 0.9 * rows[images, norm, ""]["saved_bytes"]


def test_times():
    (row,) = benchmark_memory(
        ["RetinaNet"],
        ["GN"],
        ["all"],
        device=CPU,
        dtypes=["bfloat16"],
        images=[1],
        size=(64, 96),
        opts=OPTS,
        repetitions=1,
        progress=False,
    )["rows"]
    assert 0 < row["step"]["median"] and row["checkpointed"] == "all"


def test_under_autocast_group_norm_computes_in_float32():
    """As CUDA's autocast has it, and BCN does not need."""
    dtypes = {}
    for norm in ("GN", "BCN+WS"):
        trainee = _trainee("R-50-FPN", norm, "bfloat16", CPU, OPTS)
        batch = make_batch(1, (64, 96), CPU)
        found = dtypes[norm] = set()
        for module in trainee.model.modules():
            if isinstance(module, (nn.GroupNorm, BatchChannelNorm)):
                module.register_forward_hook(lambda m, inputs, output: found.add(output.dtype))
        with fixed_heads(trainee.model, [batch]), torch.no_grad():
            trainee.loss(batch)
    assert dtypes == {"GN": {torch.float32}, "BCN+WS": {torch.bfloat16}}


class TestWords:
    """What docs/memory.md says beside its tables."""

    text = " ".join((DOCS / "memory.md").read_text().split())
    measured = page.load(ROOT / FOR_THE_PAGE)
    peaks = {key: row["peak_bytes"] for key, row in page._steps_on_cpu(measured).items()}

    def ratios(self, *pairs):
        return [self.peaks[ours] / self.peaks[other] for ours, other in pairs]

    def test_of_norms(self):
        with_ws = [key for key in self.peaks if key[2] == "GN+WS"]
        ratios = self.ratios(*((key, (*key[:2], "GN", *key[3:])) for key in with_ws))
        assert len(ratios) >= 24 and 0.96 < min(ratios) and max(ratios) < 1.02
        assert "GN+WS needs as much memory as GN" in self.text
        for model in ("Mask R-CNN", "RetinaNet"):
            mixed = [(model, "bfloat16", norm, "", 1) for norm in ("GN", "BCN+WS")]
            assert self.peaks[mixed[0]] > self.peaks[model, "float32", "GN", "", 1]
            assert self.peaks[mixed[1]] < 0.6 * self.peaks[mixed[0]]

    def test_of_everything_checkpointed(self):
        pairs = [
            ((model, "float32", "BCN+WS", "all", 1), (model, "float32", "GN", "", 1))
            for model in ("Mask R-CNN", "RetinaNet")
        ]
        mask, retina = self.ratios(*pairs)
        assert f'"all"` is {mask:.2f} in Mask R-CNN and {retina:.2f} in RetinaNet' in self.text

    def test_parts_of_the_peak(self):
        *parts, (_, peak) = re.findall(r"\| ([^|]+) \| \**(\d+)\** \|", self.text)
        assert len(parts) == 8 and sum(int(part) for _, part in parts) == int(peak)
        measured = self.peaks["Mask R-CNN", "float32", "BCN+WS", "all", 1]
        assert int(peak) == round(measured / 2**20)

    def test_of_bitmaps(self):
        (file,) = (m for m in self.measured if m.results["settings"].get("bitmasks"))
        of = {
            (r["norm"], r["checkpointed"]): r["peak_bytes"] / 2**30 for r in file.results["rows"]
        }
        gn, ours = of["GN", ""], of["BCN+WS", "all"]
        assert f'needs {gn:.2f} GiB with GN, and {ours:.2f} with BCN+WS and `"all"`' in self.text

    def test_of_times(self):
        steps = page._steps_on_cpu(self.measured)
        assert len(steps) == 72 and all("step" in row for row in steps.values())
        one = ("Mask R-CNN", "float32")
        of = {key[2:4]: row for key, row in steps.items() if key[:2] == one and key[4] == 1}
        step = {key: row["step"]["median"] for key, row in of.items()}
        ratios = [step["BCN+WS", what] / step["GN", ""] for what in ("", "backbone", "all")]
        none, backbone, everything = (f"{ratio:.2f}" for ratio in ratios)
        assert (
            f'`BCN+WS` takes {none} of GN\'s time, {backbone} with `"backbone"` and '
            f'{everything} with `"all"`'
        ) in self.text
