"""The command of the documentation, and from checkpoint to file."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2_models import randomize_norms
from export.small_exports import assert_same_detections, detect, images

from wsbcn_d2.engine import load_config
from wsbcn_d2.export import fold
from wsbcn_d2.export.checkpoint import export_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Digits-InstanceSegmentation"
CONFIG = str(CONFIGS / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
SMALL = [
    *("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint, and its model."""
    torch.manual_seed(0)
    model = randomize_norms(build_model(load_config(CONFIG, SMALL, needs=()))).eval()
    path = tmp_path_factory.mktemp("trained") / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 9}, path)
    return str(path), model


def run(arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export_model.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        text=True,
        capture_output=True,
    )


def test_for_detectron2(trained, tmp_path):
    weights, model = trained
    arguments = ["--config-file", CONFIG, "--output", "out", *SMALL, "MODEL.WEIGHTS", weights]
    result = run(arguments, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == (
        "out: config.yaml, model.pth and load_model.py, to be loaded with load_model.py: "
        "BCN became biases that Detectron2 does not build"
    )
    assert sorted(os.listdir(tmp_path / "out")) == ["config.yaml", "load_model.py", "model.pth"]
    spec = importlib.util.spec_from_file_location("load_model", tmp_path / "out" / "load_model.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    loaded = loader.load_model()
    assert repr(loaded) == repr(fold(model))
    for image in images():
        assert_same_detections(detect(model, image), detect(loaded, image))


@pytest.mark.parametrize("format", ["tracing", "scripting", "onnx", "onnx-backbone"])
def test_other_formats(trained, tmp_path, format):
    if format.startswith("onnx"):
        pytest.importorskip("onnx", reason="an optional dependency (wsbcn_d2[export])")
    cfg = load_config(CONFIG, [*SMALL, "MODEL.WEIGHTS", trained[0]], needs=())
    message = export_checkpoint(cfg, str(tmp_path / "model"), format)
    names = ": (image) -> (pred_boxes, pred_classes, pred_masks, scores)"
    assert message == str(tmp_path / "model") + (names if format == "tracing" else "")
    assert os.listdir(tmp_path) == ["model"]
    if format in ("tracing", "scripting"):
        torch.jit.load(tmp_path / "model")


def test_an_error_is_one_line(tmp_path):
    arguments = ["--config-file", CONFIG, "--output", "out", *SMALL]
    result = run([*arguments, "MODEL.WEIGHTS", "nowhere.pth"], tmp_path)
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("export_model.py: MODEL.WEIGHTS: there is no file 'nowhere.pth'")
    assert "Traceback" not in result.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "config,opts,output,format,message",
    [
        ("bcn_ws", [], "out", "caffe2", "unknown format 'caffe2'; allowed are detectron2, tracing"),
        ("bcn_ws", ["MODEL.WEIGHTS", ""], "out", "onnx", "MODEL.WEIGHTS is empty"),
        ("bcn_ws", [], f"{__file__}/model.ts", "tracing", "cannot write .* is not a folder"),
        ("bcn_ws", [], ".", "onnx", "'.' is a folder; give a file to write"),
        ("bcn_ws", [], __file__, "detectron2", "cannot write .* is not a folder"),
        (
            "bcn_ws",
            ["MODEL.ROI_MASK_HEAD.CONV_DIM", "32"],
            "out",
            "detectron2",
            "entries of the model",
        ),
        # what is more than the model has would be left out, and another function written
        (
            "bcn_ws",
            ["MODEL.FPN.NORM", "GN+WS"],
            "out",
            "detectron2",
            "entries more .* not those",
        ),
    ],
)
def test_errors(trained, tmp_path, monkeypatch, config, opts, output, format, message):
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / f"mask_rcnn_R_18_FPN_{config}.yaml"
    cfg = load_config(str(path), [*SMALL, "MODEL.WEIGHTS", trained[0], *opts], needs=())
    with pytest.raises((ValueError, OSError), match=message):
        export_checkpoint(cfg, output, format)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("format", ["detectron2", "tracing"])
def test_the_trained_checkpoint_stays(trained, tmp_path, format):
    folder = tmp_path / "mine"
    folder.mkdir()
    weights = folder / "model.pth"  # what an export for Detectron2 is called
    shutil.copy(trained[0], weights)
    path = CONFIGS / "mask_rcnn_R_18_FPN_bcn_ws.yaml"
    cfg = load_config(str(path), [*SMALL, "MODEL.WEIGHTS", str(weights)], needs=())
    before = weights.read_bytes()
    with pytest.raises(ValueError, match="model.pth' is the file to read; give another one"):
        export_checkpoint(cfg, str(folder if format == "detectron2" else weights), format)
    assert weights.read_bytes() == before and os.listdir(folder) == ["model.pth"]


def test_weights_without_standardization(tmp_path):
    """Detectron2 would only warn."""
    cfg = load_config(str(CONFIGS / "mask_rcnn_R_18_FPN_gn.yaml"), SMALL, needs=())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "gn.pth")
    cfg = load_config(str(CONFIGS / "mask_rcnn_R_18_FPN_gn_ws.yaml"), SMALL, needs=())
    cfg.MODEL.WEIGHTS = str(tmp_path / "gn.pth")
    with pytest.raises(ValueError, match="gn.pth': 36 entries .* are missing .*ws_eps"):
        export_checkpoint(cfg, str(tmp_path / "out"))
