"""The commands of the documentation on two small runs that are made here, in processes of their
own."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng

from demo.digits import make_digits_dataset
from wsbcn_d2.engine import Trainer, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Digits-InstanceSegmentation"
# a step of this takes a tenth of a second
SMALL = [
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("TEST.DETECTIONS_PER_IMAGE", "5", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()"),
]


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module_patch):
    """With a dataset and two runs, and a third that was stopped before its first iteration."""
    folder = tmp_path_factory.mktemp("runs")
    root = folder / "datasets" / "digits"
    make_digits_dataset(str(root), num_train=4, num_val=3, image_size=64, progress=False)
    for catalog in (DatasetCatalog, MetadataCatalog):
        module_patch.setattr(catalog, "data", dict(catalog.data))
    module_patch.setenv("DETECTRON2_DATASETS", str(root.parent))
    for norm in ("gn", "bcn_ws"):
        seed_all_rng(1)
        opts = [*SMALL, "OUTPUT_DIR", str(folder / norm)]
        cfg = load_config(str(CONFIGS / f"mask_rcnn_R_18_FPN_{norm}.yaml"), opts)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        (folder / norm / "config.yaml").write_text(cfg.dump())  # as tools/train_net.py does
    (folder / "stopped").mkdir()
    (folder / "stopped" / "config.yaml").write_text(cfg.dump())
    return folder


def run(tool, arguments, folder):
    env = {**os.environ, "DETECTRON2_DATASETS": str(folder / "datasets"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)],
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        text=True,
        capture_output=True,
    )


def run_here(tool, arguments, folder, monkeypatch):
    """The same in this process, which takes no time to start; returns the exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    return exit_info.value.code


def test_compare(folder, monkeypatch, capsys):
    result = run("compare.py", ["gn", "BCN=bcn_ws", "stopped", "--draws", "60"], folder)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["ap.png", "differences.png", "curves.png"]
    files = [f"comparison/comparison-{name}" for name in names]
    files += [f"comparison/comparison.{kind}" for kind in ("md", "html", "json")]
    assert result.stdout.splitlines()[-6:] == files
    assert "stopped: no checkpoint" in result.stdout
    assert "AP and bootstrap" in result.stderr, "progress"

    # the AP of the runs' own evaluations, by Detectron2
    results = json.loads((folder / "comparison" / "comparison.json").read_text())
    for run_result, name in zip(results["runs"], ("gn", "bcn_ws")):
        last = (folder / name / "metrics.json").read_text().splitlines()[-1]
        logged = json.loads(last)
        for kind in ("bbox", "segm"):
            assert run_result["ap"][kind]["AP"]["value"] == round(logged[f"{kind}/AP"], 4)
        assert not run_result["notes"]
        assert run_result["iterations"] == 3 and run_result["seconds_per_iteration"] > 0
    assert [group["label"] for group in results["groups"]] == ["GN", "BCN", "BCN+WS"]
    text = (folder / "comparison" / "comparison.json").read_text()
    assert str(folder) not in text

    # the committed tables are made anew by one command
    arguments = ["--from", "comparison/comparison.json", "--output", "again"]
    assert run_here("compare.py", arguments, folder, monkeypatch) == 0
    for name in ["comparison.md", "comparison.html", "comparison-ap.png"]:
        first, second = ((folder / where / name).read_bytes() for where in ("comparison", "again"))
        assert first == second

    # and runs are added to them when the others are long gone
    arguments = ["BCN=stopped", "--draws", "60", "--output", "more"]
    arguments += ["--from", "comparison/comparison.json"]
    assert run_here("compare.py", arguments, folder, monkeypatch) == 2  # that one is there already
    assert "the run 'stopped' is both in" in capsys.readouterr().err
    shutil.copytree(folder / "bcn_ws", folder / "bcn_ws_s2")
    arguments[0] = "BCN=bcn_ws_s2"
    assert run_here("compare.py", arguments, folder, monkeypatch) == 0
    more = json.loads((folder / "more" / "comparison.json").read_text())
    assert [(group["label"], group["runs"]) for group in more["groups"]] == [
        ("GN", 1),
        ("BCN", 2),
        ("BCN+WS", 1),
    ]


def test_analyze_norms(folder, monkeypatch):
    arguments = ["gn", "BCN=bcn_ws", "--num-images", "2", "--num-probe-images", "1"]
    arguments += ["--steps", "0.5", "1", "--output", "out"]
    before = (folder / "bcn_ws" / "model_final.pth").read_bytes()
    result = run("analyze_norms.py", arguments, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-6:] == [
        *(f"out/norms-{name}.png" for name in ("channels", "layers", "probe")),
        *(f"out/norms.{kind}" for kind in ("md", "html", "json")),
    ]
    assert (folder / "bcn_ws" / "model_final.pth").read_bytes() == before
    content = json.loads((folder / "out" / "norms.json").read_text())
    group_norm, bcn = content["models"]
    assert (group_norm["label"], bcn["label"]) == ("gn", "BCN")
    assert {layer["kind"] for layer in bcn["layers"]} == {"BatchChannelNorm"}
    assert all(layer["weight_standardization"] for layer in bcn["layers"])
    assert all("drift_mean" in layer for layer in bcn["layers"])
    assert not any("drift_mean" in layer for layer in group_norm["layers"])
    weights = torch.load(folder / "bcn_ws" / "model_final.pth", weights_only=True)["model"]
    for layer in bcn["layers"]:
        conv = weights[layer["name"].replace("norm", "weight")].double().flatten(1)
        torch.testing.assert_close(
            torch.tensor(layer["filter_std"], dtype=torch.float64),
            conv.std(1, correction=0),
            atol=0,
            rtol=1e-3,
        )
    assert len(bcn["probe"]["loss_change"][0]) == 2
    page = (folder / "out" / "norms.md").read_text()
    assert "| BCN | 1 |" in page and "backbone.bottom_up.res5.1.conv2.norm" in page

    arguments = ["--from", "out/norms.json", "--output", "again"]
    assert run_here("analyze_norms.py", arguments, folder, monkeypatch) == 0
    assert (folder / "again" / "norms.html").read_text() == (
        folder / "out" / "norms.html"
    ).read_text()


def test_an_error_keeps_what_is_there(folder, monkeypatch):
    (folder / "bad").mkdir()
    (folder / "bad" / "config.yaml").write_text((folder / "gn" / "config.yaml").read_text())
    (folder / "bad" / "model_final.pth").write_text("no checkpoint")
    (folder / "bad" / "last_checkpoint").write_text("model_final.pth")
    options = ["--num-images", "1", "--num-probe-images", "0", "--output", "kept"]
    assert run_here("analyze_norms.py", ["gn", "bad", *options], folder, monkeypatch) == 2
    kept = json.loads((folder / "kept" / "norms.json").read_text())
    assert [analysis["label"] for analysis in kept["models"]] == ["gn"]


@pytest.mark.parametrize(
    "tool, arguments, message",
    [
        ("compare.py", ["nowhere"], "compare.py: there is no folder 'nowhere'"),
        (
            "compare.py",
            ["gn", "--draws", "0", "--baseline", "X"],
            "no baseline 'X'; the groups are GN",
        ),
        ("compare.py", ["gn", "--output", "gn/metrics.json"], "gn/metrics.json' is not a folder"),
        (
            "analyze_norms.py",
            ["gn", "--output", "gn/metrics.json"],
            "metrics.json' is not a folder",
        ),
        ("analyze_norms.py", ["gn", "--steps", "0.1", "-1"], "steps must be positive numbers, got"),
        ("compare.py", ["gn", "--dataset", "digit_val"], "no dataset 'digit_val'"),
        ("compare.py", ["gn", "A=./gn"], "'./gn' is given twice"),
        ("compare.py", [], "error: give OUTPUT_DIRs, --from JSON files, or both"),
        ("analyze_norms.py", ["stopped"], "analyze_norms.py: 'stopped' has no checkpoint"),
        ("analyze_norms.py", ["gn", "--num-images", "0"], "num_images (0)"),
        (
            "analyze_norms.py",
            ["bcn_ws", "--opts", "MODEL.WEIGHTS", "gn/model_final.pth"],
            "entries of the model are missing",
        ),
        ("analyze_norms.py", ["--from", "gn/metrics.json"], "metrics.json is not a JSON file"),
    ],
)
def test_an_error_is_one_line(folder, monkeypatch, capsys, tool, arguments, message):
    assert run_here(tool, arguments, folder, monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and "Traceback" not in error
