"""TorchScript and ONNX files, run by torch and torchvision, and by onnxruntime, alone."""

import io
import os
import subprocess
import sys

import pytest
import torch
from export.small_exports import assert_same_detections, detect, images, small_export
from torch import nn

from wsbcn_d2.export import fold
from wsbcn_d2.export.deployment import export_backbone_onnx, export_onnx, script, trace

CHILD = """
import sys
sys.modules["wsbcn_d2"] = sys.modules["detectron2"] = None  # importing them raises
import torch, torchvision
outputs = {}
torch._C._set_graph_executor_optimize(False)  # it would take longer than the models
for name in ("traced", "levels", "nothing"):
    run = torch.jit.load(name + ".ts")
    outputs[name] = [run(i["image"]) for i in torch.load("images.pth")]
run = torch.jit.load("scripted.ts")
outputs["scripted"] = [run([i])[0] for i in torch.load("images.pth")]
torch.save(outputs, "outputs.pth")
"""


@pytest.fixture(scope="module")
def mask_rcnn():
    return fold(small_export("Mask R-CNN", "BCN+WS")[1])


@pytest.fixture(scope="module")
def retinanet():
    return fold(small_export("RetinaNet", "BCN+WS")[1])


@pytest.fixture(scope="module")
def blind():
    """Detects nothing."""
    return fold(small_export("Mask R-CNN", "BCN", ROI_HEADS__SCORE_THRESH_TEST=1.1)[1])


def test_torchscript(mask_rcnn, retinanet, blind, tmp_path):
    names = {}
    for name, model in {"traced": mask_rcnn, "levels": retinanet, "nothing": blind}.items():
        traced, names[name] = trace(model)
        torch.jit.save(traced, tmp_path / f"{name}.ts")
    torch.jit.save(script(mask_rcnn), tmp_path / "scripted.ts")
    assert names["traced"] == ["pred_boxes", "pred_classes", "pred_masks", "scores"]
    assert names["levels"] == ["pred_boxes", "pred_classes", "scores"]

    torch.save(images(), tmp_path / "images.pth")
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = torch.load(tmp_path / "outputs.pth")
    for i, image in enumerate(images()):
        expected = detect(mask_rcnn, image)
        assert_same_detections(expected, found["traced"][i])
        scripted = found["scripted"][i]
        assert sorted(scripted) == names["traced"]
        assert_same_detections(expected, [scripted[name] for name in names["traced"]])
        assert_same_detections(detect(retinanet, image), found["levels"][i])
        assert [tuple(x.shape) for x in found["nothing"][i]] == [(0, 4), (0,), (0, 1, 28, 28), (0,)]


def test_levels_cannot_be_scripted(retinanet):
    with pytest.raises(ValueError, match="CycleBatchNormList.*cannot be scripted; trace the model"):
        script(retinanet)


def test_scripted_dense_detector():
    model = fold(small_export("RetinaNet", "GN+WS")[1])
    scripted = script(model)
    for image in images():
        boxes, *expected = detect(model, image)
        found = scripted([image])[0]
        for x, name in zip(expected, ["pred_classes", "scores"]):
            torch.testing.assert_close(found[name], x)
        width = image["image"].shape[-1]
        limits = torch.tensor([width, 64.0, width, 64.0])
        torch.testing.assert_close(found["pred_boxes"].clamp(min=0).minimum(limits), boxes)


@torch.no_grad()
def test_semantic_segmenter():
    model = fold(small_export("SemanticSegmentor", "BCN+WS")[1])
    traced, names = trace(model)
    assert names == ["sem_seg"]
    for image in images():
        expected = model([image])[0]["sem_seg"]
        torch.testing.assert_close(traced(image["image"])[0], expected)
    with pytest.raises(ValueError, match="a SemanticSegmentor cannot be scripted"):
        script(model)


def test_panoptic_model():
    model = fold(small_export("PanopticFPN", "BCN+WS")[1])
    with pytest.raises(ValueError, match="a PanopticFPN cannot be traced as a whole: its output"):
        trace(model)
    with pytest.raises(ValueError, match="a PanopticFPN cannot be scripted"):
        script(model)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    pixels = dict(PIXEL_MEAN=[100.0] * channels, PIXEL_STD=[50.0] * channels)
    cfg, model = small_export("SemanticSegmentor", "BCN+WS", **pixels)
    model = fold(model)
    image = torch.rand(channels, 64, 96) * 255
    expected = model([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(trace(model)[0](image)[0], expected)


def test_what_pytorch_cannot_script_is_said_in_a_line():
    changes = dict(ROI_HEADS__NAME="CascadeROIHeads", ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True)
    model = fold(small_export("Mask R-CNN", "GN+WS", **changes)[1])
    with pytest.raises(ValueError, match="a GeneralizedRCNN .* scripted; trace it .*RuntimeE") as e:
        script(model)
    assert "\n" not in str(e.value)


class TestOnnx:
    @pytest.fixture(autouse=True)
    def needs(self):
        pytest.importorskip("onnx", reason="an optional dependency (wsbcn_d2[export])")
        pytest.importorskip("onnxruntime", reason="an optional dependency (wsbcn_d2[export])")

    @staticmethod
    def run(file, **inputs):
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return {x.name: torch.from_numpy(y) for x, y in zip(session.get_outputs(), outputs)}

    def test_backbone(self, mask_rcnn):
        backbone = mask_rcnn.backbone
        file = export_backbone_onnx(backbone)
        for shape in ((1, 3, 64, 96), (2, 3, 128, 64)):
            x = torch.randn(shape)
            with torch.no_grad():
                expected = backbone(x)
            found = self.run(file, images=x)
            assert list(found) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
            for name, y in expected.items():
                bound = 1e-3 * y.abs().max().item()  # of p6, which is a pixel or two
                torch.testing.assert_close(found[name], y, rtol=0, atol=bound)
            bound = 1e-4 * expected["p2"].abs().max().item()
            torch.testing.assert_close(found["p2"], expected["p2"], rtol=0, atol=bound)

    def test_images_of_one_channel(self):
        _, model = small_export("SemanticSegmentor", "BCN+WS", PIXEL_MEAN=[100.0], PIXEL_STD=[50.0])
        model = fold(model)
        image = torch.rand(1, 64, 96) * 255
        with torch.no_grad():
            features = model.backbone(image[None])["p2"]
        found = self.run(export_backbone_onnx(model.backbone, 1), images=image[None])["p2"]
        torch.testing.assert_close(found, features, rtol=1e-3, atol=1e-3)

    def test_what_cannot_be_written_is_said_in_a_line(self, capfd):
        model = fold(small_export("Mask R-CNN", "GN+WS", MASK_ON=False, KEYPOINT_ON=True)[1])
        with pytest.raises(ValueError, match="a GeneralizedRCNN .* cannot be written as ON") as e:
            export_onnx(model)
        assert "\n" not in str(e.value)
        print("still here")
        assert capfd.readouterr().out == "still here\n"

    @pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
    def test_detector(self, name, request):
        model = request.getfixturevalue(name)
        file = export_onnx(model)
        for image in images():
            found = self.run(file, image=image["image"])
            assert list(found) == sorted(found) and "scores" in found
            assert_same_detections(detect(model, image), list(found.values()))

    def test_nothing_is_detected(self, blind):
        found = self.run(export_onnx(blind), image=images()[1]["image"])
        assert found["pred_masks"].shape == (0, 1, 28, 28) and found["pred_boxes"].shape == (0, 4)

    def test_other_exports_are_as_before(self, mask_rcnn):
        """What is special about GroupNorm is so in these exports only."""

        def export():
            file = io.BytesIO()
            torch.onnx.export(nn.GroupNorm(2, 4), (torch.ones(1, 4, 2, 2),), file, dynamo=False)
            return file.getvalue()

        before = export()
        export_backbone_onnx(mask_rcnn.backbone)
        assert export() == before


def test_without_onnx(mask_rcnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"need the package onnx: pip install onnx \(or wsbcn_d2"):
        export_backbone_onnx(mask_rcnn.backbone)


def test_model_stays_as_it_is(mask_rcnn):
    before, modules = repr(mask_rcnn), len(list(mask_rcnn.modules()))
    script(mask_rcnn)
    trace(mask_rcnn)
    assert repr(mask_rcnn) == before and len(list(mask_rcnn.modules())) == modules
