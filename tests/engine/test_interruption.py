"""Training that is killed at any moment continues."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from demo.digits import make_digits_dataset

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/Digits-InstanceSegmentation/mask_rcnn_R_18_FPN_bcn_ws.yaml"
SMALL = [
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "DATASETS.TEST", "()"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.STEPS", "()"),
    *("SOLVER.ACCUMULATE_STEPS", "2", "MODEL.WSBCN.UPDATE_RATE_WARMUP", "True"),
    *("OUTPUT_DIR", "out", "MODEL.DEVICE", "cpu"),
]


def last_checkpoint(folder):
    try:
        return (folder / "last_checkpoint").read_text()
    except FileNotFoundError:
        return None


def test_killed_and_resumed(tmp_path):
    """Twice, at a random moment of saving a checkpoint in every iteration; then to the end."""
    digits = tmp_path / "datasets" / "digits"
    make_digits_dataset(str(digits), num_train=3, num_val=1, image_size=64, progress=False)
    env = {
        **os.environ,
        "DETECTRON2_DATASETS": str(digits.parent),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    out = tmp_path / "out"
    tool = [sys.executable, ROOT / "tools" / "train_net.py", "--config-file", CONFIG, "--resume"]

    def start(max_iter):
        command = [*map(str, tool), *SMALL, "SOLVER.MAX_ITER", str(max_iter)]
        return subprocess.Popen(
            command, env=env, cwd=tmp_path, text=True, stdout=log, stderr=subprocess.STDOUT
        )

    iteration = -1
    delays = random.Random(os.getpid())
    log_path = tmp_path / "log"
    with open(log_path, "w") as log:
        for _ in range(2):
            before = last_checkpoint(out)
            process = start(100000)
            deadline = time.monotonic() + 200
            while last_checkpoint(out) == before:
                assert process.poll() is None and time.monotonic() < deadline, log_path.read_text()
                time.sleep(0.02)
            time.sleep(delay := delays.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
            print("killed", delay, "s after", last_checkpoint(out))
            saved = torch.load(out / last_checkpoint(out), weights_only=True)
            assert saved["iteration"] > iteration  # went on from where it was
            iteration = saved["iteration"]
            text = log_path.read_text()
            for file in out.glob("*.pth"):  # not one is half written
                torch.load(file, weights_only=True)

        process = start(iteration + 3)
        assert process.wait() == 0, log_path.read_text()
    text = log_path.read_text()
    assert f"Starting training from iteration {iteration + 1}" in text
    assert last_checkpoint(out) == "model_final.pth"
    final = torch.load(out / "model_final.pth", weights_only=True)
    assert final["iteration"] == iteration + 2
    names = [key for key in final["model"] if "running_" in key]
    assert names and all(final["model"][key].isfinite().all() for key in names)
    moved = [not torch.equal(final["model"][key], saved["model"][key]) for key in names]
    assert all(moved)
