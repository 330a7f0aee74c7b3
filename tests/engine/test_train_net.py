"""The training script in processes of its own, and the flow of somebody else's project."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from data.small_coco import coco

from demo.digits import make_digits_dataset

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Digits-InstanceSegmentation"
# a step of this takes a tenth of a second
SMALL = [
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_digits_dataset(str(root / "digits"), num_train=6, num_val=3, image_size=96, progress=False)
    return root


def run(arguments, datasets, cwd, check=True):
    env = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, cwd=cwd, text=True, capture_output=True
    )
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def train_net(arguments, datasets, cwd, norm="bcn_ws", opts=(), **kwargs):
    config = CONFIGS / f"mask_rcnn_R_18_FPN_{norm}.yaml"
    tool = ROOT / "tools" / "train_net.py"
    opts = [*SMALL, "OUTPUT_DIR", cwd / "out", *opts]
    return run([tool, "--config-file", config, *arguments, *opts], datasets, cwd, **kwargs)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_train_evaluate_and_resume(datasets, tmp_path):
    out = tmp_path / "out"
    schedule = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    result = train_net([], datasets, tmp_path, opts=schedule)
    assert "weight standardization in 36 of 41 convolutions" in result.stdout
    assert {"bbox/AP", "segm/AP"} <= set(metrics(out)[-1])
    predictions = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    assert isinstance(predictions, list)

    # the checkpoint evaluates to the same numbers in a process of its own
    weights = ["MODEL.WEIGHTS", out / "model_final.pth"]
    (out / "inference" / "coco_instances_results.json").unlink()
    train_net(["--eval-only"], datasets, tmp_path, opts=weights)
    again = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    assert again == predictions

    before = torch.load(out / "model_final.pth", weights_only=True)["model"]
    key = "backbone.bottom_up.stem.conv1.norm.running_mean"
    result = train_net(
        ["--resume"], datasets, tmp_path, opts=["SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()"]
    )
    assert "Starting training from iteration 2" in result.stdout
    after = torch.load(out / "model_final.pth", weights_only=True)
    assert after["iteration"] == 2
    assert not torch.equal(after["model"][key], before[key])


def test_two_processes_without_gpu(datasets, tmp_path):
    opts = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
    if torch.cuda.is_available():
        opts += ["MODEL.DEVICE", "cpu"]
        if torch.cuda.device_count() < 2:
            pytest.skip("Detectron2's launch wants a GPU for every process where there is one")
    # every process must know a dataset of the config
    digits = datasets / "digits"
    mine = [
        [f"my_{s}", str(digits / "annotations" / f"instances_{s}.json"), str(digits / s)]
        for s in ("train", "val")
    ]
    opts += ["DATASETS.COCO_FORMAT", mine, "DATASETS.TRAIN", "('my_train',)"]
    opts += ["DATASETS.TEST", "('my_val',)"]
    train_net(["--num-gpus", "2"], datasets, tmp_path, opts=opts)
    assert "bbox/AP" in metrics(tmp_path / "out")[-1]
    assert (tmp_path / "out" / "log.txt.rank1").exists()


def test_errors_are_one_line(datasets, tmp_path):
    opts = ["MODEL.FPN.NORM", "BCN+SW"]
    result = train_net([], datasets, tmp_path, opts=opts, check=False)
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("train_net.py: error: MODEL.FPN.NORM: unknown norm option 'BCN+SW'")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "DATASETS.TRAIN is empty, and must name a dataset"),
        ("unknown", "no dataset 'nowhere' is registered; "),
        ("unknown test", "no dataset 'nowhere' is registered; "),
        ("crowds", "DATASETS.TRAIN: 'crowds' have no annotations of objects to train with"),
        ("evaluation", "DATASETS.TEST is empty, and must name a dataset to evaluate on"),
    ],
)
def test_data_are_looked_at_before_a_model_is_built(
    register, tmp_path, monkeypatch, capsys, case, message
):
    monkeypatch.setattr("wsbcn_d2.engine.check_model", lambda cfg: pytest.fail("built"))
    good = register(coco(), "good")
    register(coco(iscrowd=1), "crowds")
    train, test = {
        "empty": ((), (good,)),
        "unknown": ((good, "nowhere"), (good,)),
        "unknown test": ((good,), ("nowhere",)),
        "crowds": (("crowds",), (good,)),
        "evaluation": ((good,), ()),
    }[case]
    arguments = ["--config-file", CONFIGS / "mask_rcnn_R_18_FPN_bcn_ws.yaml"]
    arguments += ["--eval-only"] if case == "evaluation" else []
    arguments += ["DATASETS.TRAIN", repr(train), "DATASETS.TEST", repr(test)]
    arguments += ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "OUTPUT_DIR", tmp_path / "out"]
    arguments += ["MODEL.WEIGHTS", __file__ if case == "evaluation" else ""]
    monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as result:
        runpy.run_path(str(ROOT / "tools" / "train_net.py"), run_name="__main__")
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"train_net.py: error: {message}") and result.value.code == 2
    assert not (tmp_path / "out").exists()


def test_too_few_classes(datasets, tmp_path):
    """More of them than in the data are only warned of."""
    short = ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "MODEL.ROI_HEADS.NUM_CLASSES"]
    result = train_net([], datasets, tmp_path, opts=[*short, "9"], check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert "NUM_CLASSES is 9, but 'digits_train' has 10 (0, 1, 2, 3, 4, ...)" in error
    result = train_net([], datasets, tmp_path, opts=[*short, "11"], check=False)
    assert "NUM_CLASSES is 11, but 'digits_train' has 10" in result.stdout + result.stderr


# What a project that has been there before this package does: a config of Detectron2's model zoo,
# DefaultTrainer, DefaultPredictor. Only the import and the NORM strings are new.
STOCK_PROJECT = """
import sys, cv2
import wsbcn_d2
from detectron2 import model_zoo
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor, DefaultTrainer

data, output, image = sys.argv[1:]
for split in ("train", "val"):
    register_coco_instances(
        f"mine_{split}", {}, f"{data}/annotations/instances_{split}.json", f"{data}/{split}"
    )
cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
wsbcn_d2.add_wsbcn_config(cfg)
cfg.MODEL.RESNETS.NORM = "BCN+WS"
cfg.MODEL.FPN.NORM = "GN+WS"
cfg.MODEL.ROI_BOX_HEAD.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = "BCN+WS"
cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 1
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine_train",), ("mine_val",)
cfg.INPUT.MASK_FORMAT = "bitmask"
cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (96,), 96
cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "cpu", "", output
cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10, 16
cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, 2, ()
cfg.DATALOADER.NUM_WORKERS = 0
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()

cfg.MODEL.WEIGHTS = f"{output}/model_final.pth"
cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
print("LAYER", repr(trainer.model.backbone.bottom_up.res4[0].conv2).splitlines())
print("INSTANCES", len(DefaultPredictor(cfg)(cv2.imread(image))["instances"]))
"""


def test_stock_project_trains_and_predicts(datasets, tmp_path):
    script = tmp_path / "project.py"
    script.write_text(STOCK_PROJECT)
    data = datasets / "digits"
    image = next((data / "val").iterdir())
    assert cv2.imread(str(image)) is not None
    result = run([script, data, tmp_path / "out", image], datasets, tmp_path)
    assert "LAYER ['WSConv2d(', '  256, 256" in result.stdout
    assert "BatchChannelNorm(256, groups=32" in result.stdout
    assert int(result.stdout.rsplit("INSTANCES", 1)[1]) > 0
    assert "not trained with weight standardization" not in result.stdout
