"""Files for stock Detectron2, loaded in a process where this package cannot be imported."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from export.small_exports import assert_same_detections, detect, images, small_export
from torch import nn

from wsbcn_d2.export import fold
from wsbcn_d2.export.stock import save_for_detectron2, stock_config
from wsbcn_d2.layers.folded import FOLDED

# The options and the models that the child process is to load.
EXPORTS = {
    "bcn": ("Mask R-CNN", "BCN+WS"),
    "levels": ("RetinaNet", "BCN+WS"),
    "cn": ("Mask R-CNN", "CN+WS"),
    "bn": ("RetinaNet", "BN+WS"),
}

CHILD = """
import importlib.util, sys
sys.modules["wsbcn_d2"] = None  # importing it raises
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

def load_module(path):
    spec = importlib.util.spec_from_file_location("load_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def detect(model, image):
    if hasattr(model, "roi_heads"):
        instances = model.inference([image], do_postprocess=False)[0]
    else:
        instances = model([image])[0]["instances"]
    return [getattr(v, "tensor", v) for _, v in sorted(instances.get_fields().items())]

outputs = {}
for name in sys.argv[1:]:
    models = [load_module(name + "/load_model.py").load_model()]
    assert not models[0].training and not any(p.requires_grad for p in models[0].parameters())
    cfg = get_cfg()
    cfg.merge_from_file(name + "/config.yaml")
    plain = build_model(cfg).eval()  # by Detectron2 alone
    try:
        plain.load_state_dict(torch.load(name + "/model.pth", weights_only=True)["model"])
        models.append(plain)
    except RuntimeError:
        pass
    assert bool(cfg.MODEL.WEIGHTS) == (len(models) == 2)
    with torch.no_grad():
        outputs[name] = [[detect(m, image) for image in torch.load("images.pth")] for m in models]
torch.save(outputs, "outputs.pth")
"""


def test_reload_without_the_package(tmp_path):
    torch.save(images(), tmp_path / "images.pth")
    expected, alone = {}, {}
    for name, (kind, norm) in EXPORTS.items():
        cfg, model = small_export(kind, norm, BACKBONE__NAME=backbone(kind))
        if norm == "BN+WS":
            settle(model)
        expected[name] = [detect(model, image) for image in images()]
        alone[name] = save_for_detectron2(fold(model), cfg, str(tmp_path / name))
        assert sorted(os.listdir(tmp_path / name)) == ["config.yaml", "load_model.py", "model.pth"]
    assert alone == {name: name in ("cn", "bn") for name in EXPORTS}

    result = subprocess.run(
        [sys.executable, "-c", CHILD, *EXPORTS],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = torch.load(tmp_path / "outputs.pth")
    for name in EXPORTS:
        assert len(found[name]) == 1 + alone[name]
        for outputs in found[name]:
            for x, y in zip(expected[name], outputs):
                assert_same_detections(x, y)


@torch.no_grad()
def settle(model):
    """Statistics of an image: with others, activations explode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model([{"image": torch.rand(3, 256, 256) * 255}])
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


def backbone(kind):
    return {
        "Mask R-CNN": "build_wsbcn_resnet_fpn_backbone",
        "RetinaNet": "build_wsbcn_retinanet_resnet_fpn_backbone",
    }[kind]


def test_folder_of_a_run_keeps_its_config(tmp_path):
    cfg, model = small_export("Mask R-CNN", "CN", BACKBONE__NAME=backbone("Mask R-CNN"))
    (tmp_path / "config.yaml").write_text("MODEL: {}")
    with pytest.raises(FileExistsError, match="config.yaml' is not of an export; give another"):
        save_for_detectron2(fold(model), cfg, str(tmp_path))
    assert os.listdir(tmp_path) == ["config.yaml"]
    (tmp_path / "config.yaml").unlink()
    for _ in range(2):  # over an older export
        save_for_detectron2(fold(model), cfg, str(tmp_path))


def test_config():
    cfg, _ = small_export("Mask R-CNN", "BCN(update_rate=0.01)+WS")
    cfg.MODEL.BACKBONE.NAME = "build_wsbcn_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NORM = "GN(groups=32)+WS"
    cfg.MODEL.ROI_MASK_HEAD.NORM = "SyncBN+WS"
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    cfg.INPUT.MAX_SIZE_TEST = 77
    before = cfg.dump()
    text = stock_config(cfg).dump()
    assert cfg.dump() == before
    for word in ("WS", "BCN", "ACCUMULATE", "wsbcn"):
        assert word not in text.replace("CONVS", "")
    stock = get_cfg()
    stock.merge_from_other_cfg(stock.load_cfg(text))
    assert stock.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    assert [stock.MODEL.RESNETS.NORM, stock.MODEL.FPN.NORM] == ["GN", "GN"]
    assert [stock.MODEL.ROI_BOX_HEAD.NORM, stock.MODEL.ROI_MASK_HEAD.NORM] == ["GN", "SyncBN"]
    assert stock.MODEL.SEM_SEG_HEAD.NORM == "" and stock.INPUT.MAX_SIZE_TEST == 77
    # all that stock Detectron2 knows, and as it was
    assert yaml.safe_load(text).keys() == yaml.safe_load(before).keys()


def test_what_a_stock_config_cannot_say():
    cfg, _ = small_export("Mask R-CNN", "GN")
    cfg.MODEL.FPN.NORM = "BCN(groups=16)+WS"
    with pytest.raises(ValueError, match=r"MODEL.FPN.NORM: 'BCN\(groups=16\)\+WS' has 16 groups"):
        stock_config(cfg)
    cfg.MODEL.FPN.NORM = "BCN"
    cfg.MODEL.MY_HEAD = CfgNode({"SIZE": 3})
    with pytest.raises(ValueError, match="MODEL.MY_HEAD.SIZE: Detectron2 has no such key"):
        stock_config(cfg)


def test_config_of_another_model(tmp_path):
    cfg, model = small_export("Mask R-CNN", "GN+WS")
    model.roi_heads.mask_head.mask_fcn1.norm.num_groups = 16
    with pytest.raises(
        ValueError, match=r"does not describe the model.*\n.*mask_fcn1.norm: GroupNorm\(16, 64"
    ):
        save_for_detectron2(fold(model), cfg, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    cfg, model = small_export("Mask R-CNN", "GN+WS")
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 2
    with pytest.raises(ValueError, match="does not describe the model"):
        save_for_detectron2(fold(model), cfg, str(tmp_path / "out"))


@pytest.mark.parametrize("norm", ["BCN", "GN+WS", "CN"])
def test_loading_into_the_original_is_an_error(tmp_path, norm):
    cfg, model = small_export("Mask R-CNN", norm)
    save_for_detectron2(fold(model), cfg, str(tmp_path))
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert all(entry[FOLDED] for entry in state._metadata.values())
    with pytest.raises(ValueError, match="come from a folded model.*use the checkpoint that was"):
        DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    model.load_state_dict(model.state_dict())
