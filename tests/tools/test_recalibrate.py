"""The command of the documentation, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model

from demo.digits import make_digits_dataset
from wsbcn_d2.engine import load_config, recalibrate_estimates
from wsbcn_d2.engine.recalibration import recalibrate_checkpoint
from wsbcn_d2.engine.statistics import named_batch_channel_norms, seeded_batches

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Digits-InstanceSegmentation"
CONFIG = str(CONFIGS / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
SMALL = [
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "DATASETS.TEST", "()"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2"),
]


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A dataset, which configs find in this process too."""
    root = tmp_path / "datasets" / "digits"
    make_digits_dataset(str(root), num_train=4, num_val=1, image_size=64, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent))
    return root


def run(arguments, digits, cwd):
    env = {**os.environ, "DETECTRON2_DATASETS": str(digits.parent), "PYTHONPATH": str(ROOT)}
    tool = ROOT / "tools" / "recalibrate.py"
    return subprocess.run(
        [sys.executable, str(tool), *map(str, arguments)],
        env={**env, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        text=True,
        capture_output=True,
    )


def test_recalibrate(digits, tmp_path):
    torch.manual_seed(0)
    cfg = load_config(CONFIG, SMALL)
    model = build_model(cfg)
    torch.save({"model": model.state_dict(), "iteration": 5}, tmp_path / "in.pth")
    arguments = ["--config-file", CONFIG, "--num-images", "3", "--output", "out.pth", *SMALL]
    result = run([*arguments, "MODEL.WEIGHTS", "in.pth"], digits, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "out.pth"
    assert sorted(p.name for p in tmp_path.glob("*.pth*")) == ["in.pth", "out.pth"]

    # all but the estimates is as it was, and those are what the same call gives here
    loaded = build_model(cfg)
    DetectionCheckpointer(loaded).load(str(tmp_path / "out.pth"))
    batches = seeded_batches(lambda: build_detection_train_loader(cfg), 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate_estimates(model, batches)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    changed = {k for k, v in before.items() if not torch.equal(v, loaded.state_dict()[k])}
    assert changed == {
        f"{name}.{key}"
        for name, _ in named_batch_channel_norms(model)
        for key in ("running_mean", "running_var")
    }


def test_an_error_is_one_line(digits, tmp_path):
    arguments = ["--config-file", CONFIG, "--output", "out.pth", *SMALL]
    result = run([*arguments, "MODEL.WEIGHTS", "nowhere.pth"], digits, tmp_path)
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("recalibrate.py: MODEL.WEIGHTS: there is no file 'nowhere.pth'")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "config,weights,output,images,message",
    [
        ("bcn", "", "out.pth", 1, "MODEL.WEIGHTS is empty"),
        ("bcn", "in.pth", f"{__file__}/out.pth", 1, "cannot write .* is not a folder"),
        ("bcn", "in.pth", "out.pth", 0, "number of images must be positive, got 0"),
        ("gn_ws", "in.pth", "out.pth", 1, "has no BCN layers"),
        ("bcn", __file__, __file__, 1, "test_recalibrate.py' is the file to read"),
    ],
)
def test_errors(digits, tmp_path, config, weights, output, images, message):
    cfg = load_config(str(CONFIGS / f"mask_rcnn_R_18_FPN_{config}.yaml"), SMALL)
    cfg.MODEL.WEIGHTS = weights
    with pytest.raises((ValueError, OSError), match=message):
        recalibrate_checkpoint(cfg, str(tmp_path / output), images)


def test_weights_of_another_model(digits, tmp_path):
    """Detectron2 would only warn, and what is written would look like a model that was trained."""
    cfg = load_config(str(CONFIGS / "mask_rcnn_R_18_FPN_gn.yaml"), SMALL)
    cfg.MODEL.WEIGHTS = str(tmp_path / "gn.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    other = load_config(str(CONFIGS / "mask_rcnn_R_18_FPN_bcn.yaml"), SMALL)
    other.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    with pytest.raises(ValueError, match="entries of the model are missing .*running_mean"):
        recalibrate_checkpoint(other, str(tmp_path / "out.pth"), 1)
    assert not (tmp_path / "out.pth").exists()
