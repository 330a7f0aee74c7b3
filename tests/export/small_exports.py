"""Small trained-looking models with the configs they were built from."""

import torch
from detectron2.modeling import build_model
from detectron2_models import randomize_norms, small_config

import wsbcn_d2

# More than one channel in each of 32 groups: else the estimates would not matter.
_WIDE = {
    "FPN__OUT_CHANNELS": 64,
    "ROI_BOX_HEAD__CONV_DIM": 64,
    "ROI_MASK_HEAD__CONV_DIM": 64,
    "RESNETS__DEPTH": 18,
    "RESNETS__STEM_OUT_CHANNELS": 64,
    "RETINANET__SCORE_THRESH_TEST": 0.0,
    "ROI_HEADS__SCORE_THRESH_TEST": 0.0,
}
BASES = {
    "Mask R-CNN": "Base-RCNN-FPN.yaml",
    "PanopticFPN": "Base-RCNN-FPN.yaml",
    "SemanticSegmentor": "Base-RCNN-FPN.yaml",
    "RetinaNet": "Base-RetinaNet.yaml",
}


def small_export(name, norm, **changes):
    """Config with the keys of the package, and model in evaluation mode."""
    cfg = small_config(BASES[name], norm, **{**_WIDE, **changes})
    if name in ("PanopticFPN", "SemanticSegmentor"):
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = name, "SemSegFPNHead"
    wsbcn_d2.add_wsbcn_config(cfg)
    torch.manual_seed(0)
    model = randomize_norms(build_model(cfg)).eval()
    if name == "RetinaNet":
        model.head.cls_score.weight.data.mul_(10.0)  # or else all scores are nearly equal
    return cfg, model


def images():
    """Two inputs, of different shapes, whose outputs are in pixels of the input."""
    torch.manual_seed(1)
    return [{"image": torch.rand(3, 64, width) * 255} for width in (64, 96)]


@torch.no_grad()
def detect(model, image):
    """Boxes, classes and scores of one image, and masks, before the final resizing."""
    if hasattr(model, "roi_heads"):
        instances = model.inference([image], do_postprocess=False)[0]
    else:
        instances = model([image])[0]["instances"]
    fields = {k: getattr(v, "tensor", v) for k, v in instances.get_fields().items()}
    return [fields[key] for key in sorted(fields)]


def assert_same_detections(expected, found):
    assert len(expected) == len(found)
    assert len(expected[0]) == len(found[0]) > 0
    for x, y in zip(expected, found):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-4 * max(1.0, x.abs().max().item()))
