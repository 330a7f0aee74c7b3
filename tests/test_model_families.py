"""Every family of models in configs/, at a fraction of its width: built from its config, trained
with and without objects, evaluated, saved and loaded, folded.

Models are compared by their losses over all anchors and proposals, which are smooth functions of
the weights; detections depend on thresholds.
"""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import DeformConv, ShapeSpec
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from detectron2_models import SMALL, a_training_image, modules_of_type, randomize_norms
from torch import nn

import wsbcn_d2
from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.export import fold
from wsbcn_d2.layers import WeightStandardized

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Changes of keys below MODEL, where a config has them. Every anchor is sampled and becomes a
# proposal.
TINY = {
    **{key: value for key, value in SMALL.items() if key != "MASK_ON"},
    "FPN.OUT_CHANNELS": 64,
    "RPN.NMS_THRESH": 1.0,
    "RPN.BATCH_SIZE_PER_IMAGE": 4096,
    "RPN.POST_NMS_TOPK_TRAIN": 4096,
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4096,
    "ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "RETINANET.SCORE_THRESH_TEST": 0.0,
    "ROI_BOX_HEAD.CONV_DIM": 64,
    "ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
    "ROI_MASK_HEAD.CONV_DIM": 64,
    "ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
    "ROI_KEYPOINT_HEAD.CONV_DIMS": (32,),
    "ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 4,
    "SEM_SEG_HEAD.ASPP_CHANNELS": 32,
    "SEM_SEG_HEAD.ASPP_DILATIONS": [1, 2, 3],
    "SEM_SEG_HEAD.HEAD_CHANNELS": 32,
    "INS_EMBED_HEAD.ASPP_CHANNELS": 32,
    "INS_EMBED_HEAD.ASPP_DILATIONS": [1, 2, 3],
    "INS_EMBED_HEAD.CONVS_DIM": 32,
    "POINT_HEAD.NUM_CLASSES": 3,
    "POINT_HEAD.FC_DIM": 16,
    "POINT_HEAD.TRAIN_NUM_POINTS": 16,
    "POINT_HEAD.SUBDIVISION_STEPS": 1,
    "POINT_HEAD.SUBDIVISION_NUM_POINTS": 16,
}


def of_this_package(cfg):
    wsbcn_d2.add_wsbcn_config(cfg)


def of_point_rend(cfg):
    pytest.importorskip("detectron2.projects.point_rend").add_pointrend_config(cfg)


def of_deeplab(cfg):
    pytest.importorskip("detectron2.projects.deeplab").add_deeplab_config(cfg)


def of_panoptic_deeplab(cfg):
    pytest.importorskip("panopticapi", reason="detectron2.projects.panoptic_deeplab needs it")
    from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config

    add_panoptic_deeplab_config(cfg)


def of_deformable(cfg):
    if not issubclass(DeformConv, nn.Module):
        pytest.skip("Detectron2 is installed without compiled ops")
    if not torch.cuda.is_available():
        pytest.skip("Detectron2's deformable convolution has no backward pass on a CPU")
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.MODEL.DEVICE = "cuda"


def lazy(name):
    """A LazyConfig on a ResNet-18, since it has no key for the width of a ResNet."""
    cfg = LazyConfig.load(str(CONFIGS / "LazyConfig" / name))
    model = cfg.model
    model.backbone.bottom_up.stages.depth = 18
    del model.backbone.bottom_up.stages.stride_in_1x1
    model.backbone.out_channels = model.backbone.top_block.in_channels = 64
    model.head.input_shape = [ShapeSpec(channels=64)] * 5
    model.head.conv_dims = [64, 64]
    model.num_classes, model.test_score_thresh = 3, 0.0

    def build():
        return instantiate(cfg.model)

    def optimizer(model):
        cfg.optimizer.params.model = model
        return instantiate(cfg.optimizer)

    return build, optimizer


def yaml(path, add_config):
    """A YAML config, with the keys of its project."""
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(CONFIGS / path))
    for key, value in TINY.items():
        node, _, name = key.rpartition(".")
        section = cfg.MODEL[node] if node in cfg.MODEL else cfg.MODEL if not node else {}
        if name in section:
            section[name] = value
    if add_config in (of_deeplab, of_panoptic_deeplab):
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64  # its first layers have half of that
        cfg.INPUT.CROP.SIZE = (64, 64)  # which ASPP pools
    if cfg.MODEL.RESNETS.NUM_GROUPS > 1:
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 2
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return lambda: build_model(cfg), lambda model: build_optimizer(cfg, model)


COCO_MASK = "COCO-InstanceSegmentation/mask_rcnn_"
# name -> (file, what adds the keys it needs)
FAMILIES = {
    "Mask R-CNN": (COCO_MASK + "R_50_FPN_bcn_ws_2x_1img.yaml", of_this_package),
    "Mask R-CNN, C4": (COCO_MASK + "R_50_C4_bcn_ws_1x_1img.yaml", of_this_package),
    "Mask R-CNN, DC5": (COCO_MASK + "R_50_DC5_bcn_ws_1x_1img.yaml", of_this_package),
    "Mask R-CNN, deformable": (
        "Misc/mask_rcnn_R_50_FPN_dconv_c3-c5_bcn_ws_1x_1img.yaml",
        of_deformable,
    ),
    "Mask R-CNN, modulated deformable": (
        "Misc/mask_rcnn_R_50_FPN_mdconv_c3-c5_bcn_ws_1x_1img.yaml",
        of_deformable,
    ),
    "Cascade Mask R-CNN": (
        "Misc/cascade_mask_rcnn_R_50_FPN_bcn_ws_1x_1img.yaml",
        of_this_package,
    ),
    "PointRend": ("Misc/pointrend_rcnn_R_50_FPN_bcn_ws_1x_1img.yaml", of_point_rend),
    "Faster R-CNN, ResNeXt": (
        "COCO-Detection/faster_rcnn_X_50_32x4d_FPN_bcn_ws_1x_1img.yaml",
        of_this_package,
    ),
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_bcn_ws_1x_1img.yaml", of_this_package),
    "FCOS": ("fcos_R_50_FPN_1x.py", lazy),
    "Keypoint R-CNN": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_bcn_ws_1x_1img.yaml",
        of_this_package,
    ),
    "Panoptic FPN": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_bcn_ws_1x_1img.yaml",
        of_this_package,
    ),
    "semantic FPN": ("Cityscapes/semantic_R_50_FPN_bcn_ws_699e_1img.yaml", of_this_package),
    "DeepLabV3+": ("Cityscapes/deeplab_v3_plus_R_103_bcn_ws_484e_1img.yaml", of_deeplab),
    "Panoptic-DeepLab": (
        "Cityscapes/panoptic_deeplab_R_52_bcn_ws_968e_1img.yaml",
        of_panoptic_deeplab,
    ),
}
SHARED_HEADS = ("RetinaNet", "FCOS")
# PointRend's mask head cannot take an image without foreground, whatever its norm: Detectron2's
# loader leaves out images without objects.
NEEDS_OBJECTS = {"PointRend"}

# What the last convolutions and linear layers are called. Some of them are absent in each model.
PREDICTORS = (
    "objectness_logits",
    "anchor_deltas",
    "cls_score",
    "bbox_pred",
    "ctrness",
    "predictor",
    "score_lowres",
    "center_predictor",
    "offset_predictor",
    "conv2_offset",
)


def image_with_object(name):
    """With the ground truth of every task."""
    image = a_training_image()
    instances = image["instances"]
    if name == "Keypoint R-CNN":
        instances.gt_classes = torch.zeros_like(instances.gt_classes)
        points = torch.stack([torch.linspace(10, 46, 17), torch.linspace(10, 38, 17)], dim=1)
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((17, 1), 2.0)], 1)[None])
    # of Panoptic-DeepLab
    shape = image["sem_seg"].shape
    image.update(center=torch.rand(shape), offset=torch.rand(2, *shape))
    image.update(center_weights=torch.ones(shape), offset_weights=torch.ones(shape))
    return image


def without_object(image):
    nothing = torch.zeros(0, dtype=torch.long)
    return {
        **image,
        "instances": image["instances"][nothing],
        "sem_seg": torch.zeros_like(image["sem_seg"]),
    }


def estimates(model):
    return {
        name: torch.stack([norm.running_mean, norm.running_var])
        for name, norm in modules_of_type(model, BatchChannelNorm).items()
    }


def train_step(model, optimizer, image):
    model.train()
    with EventStorage():
        losses = model([image])
    assert losses and all(torch.isfinite(loss) for loss in losses.values()), losses
    optimizer.zero_grad()
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    optimizer.step()


@torch.no_grad()
def losses_of(model, image):
    """Functions of the weights: normalization is as in evaluation, random numbers are fixed."""
    model = copy.deepcopy(model).train()
    for norm in modules_of_type(model, (BatchChannelNorm, nn.BatchNorm2d)).values():
        norm.eval()
    torch.manual_seed(0)
    with EventStorage():
        return torch.stack(list(model([image]).values()))


@torch.no_grad()
def predictions(model, image):
    (output,) = model.eval()([image])
    return tensors(output)


def tensors(value):
    """All floating-point tensors in an output."""
    if isinstance(value, Instances):
        value = value.get_fields()
    if isinstance(value, Boxes):
        value = value.tensor
    if isinstance(value, dict):
        return [tensor for key in sorted(value) for tensor in tensors(value[key])]
    return [value] if isinstance(value, torch.Tensor) and value.is_floating_point() else []


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    file, add_config = FAMILIES[name]
    build, build_optimizer_of = lazy(file) if add_config is lazy else yaml(file, add_config)
    model = build()
    optimizer = build_optimizer_of(model)
    with_object = image_with_object(name)

    # Training at one image per step.
    standardized = modules_of_type(model, WeightStandardized)
    assert standardized
    start = {name: value.clone() for name, value in estimates(model).items()}
    if name not in NEEDS_OBJECTS:
        train_step(model, optimizer, without_object(with_object))
    empty = {name: value.clone() for name, value in estimates(model).items()}
    train_step(model, optimizer, with_object)
    trained = estimates(model)
    assert len(trained) == len(standardized)
    for layer in trained:
        # Without objects there are no masks to predict, and the head must not learn from that.
        seen = name not in NEEDS_OBJECTS and not layer.startswith("roi_heads.mask_head")
        assert torch.equal(empty[layer], start[layer]) != seen, layer
        assert not torch.equal(trained[layer], empty[layer]), layer
        assert trained[layer].isfinite().all()
    assert all(
        norm.skipped_updates == 0 for norm in modules_of_type(model, BatchChannelNorm).values()
    )

    # A head that feature maps of several levels share has estimates for each of them.
    for layer, value in trained.items():
        is_shared = name in SHARED_HEADS and layer.startswith("head.")
        assert value.dim() == (3 if is_shared else 2), layer
        if is_shared:
            assert len({tuple(level.tolist()) for level in value[0]}) == value.shape[1] == 5

    # Evaluation, and the same from a checkpoint.
    randomize_norms(model)
    expected = predictions(model, with_object)
    assert expected and all(value.isfinite().all() for value in expected)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    torch.manual_seed(1)
    loaded = build()
    DetectionCheckpointer(loaded).load(str(tmp_path / "model.pth"))
    found = predictions(loaded, with_object)
    assert len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(expected, found))

    # The scale and mean of a filter are of no consequence where it is standardized, and only there.
    predictors = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in PREDICTORS]
    assert predictors and not standardized.keys() & set(predictors)
    with torch.no_grad():
        for predictor in predictors:
            # Larger ones than those of training, so that features matter; but large offsets of
            # deformable convolutions would make the model chaotic.
            std = 0.005 if "offset" in predictor else 0.05
            model.get_submodule(predictor).weight.normal_(0.0, std)
        for conv in standardized.values():
            conv.eps = 1e-12  # else the scale has a small effect
        losses = losses_of(model, with_object)
        # PointRend picks points by what it is unsure of, which rounding can change.
        same = {"rtol": 3e-3 if name == "PointRend" else 1e-4, "atol": 1e-5}
        torch.testing.assert_close(losses_of(fold(model), with_object), losses, **same)
        for conv in standardized.values():
            conv.weight.mul_(3.0).add_(0.1)
        torch.testing.assert_close(losses_of(model, with_object), losses, **same)
        for predictor in predictors:
            model.get_submodule(predictor).weight.mul_(3.0).add_(0.1)
        change = (losses_of(model, with_object) / losses - 1).abs().max()
        assert change > 0.05
