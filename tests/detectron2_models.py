"""Small models of real Detectron2, and means to look into them."""

import contextlib
import logging

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

NORM_KEYS = (
    "RESNETS.NORM",
    "FPN.NORM",
    "ROI_BOX_HEAD.NORM",
    "ROI_MASK_HEAD.NORM",
    "RETINANET.NORM",
    "SEM_SEG_HEAD.NORM",
)
# 32 groups need at least 32 channels everywhere.
SMALL = {
    "DEVICE": "cpu",
    "WEIGHTS": "",
    "MASK_ON": True,
    "BACKBONE.FREEZE_AT": 0,
    "RESNETS.STEM_OUT_CHANNELS": 32,
    "RESNETS.RES2_OUT_CHANNELS": 64,
    "RESNETS.WIDTH_PER_GROUP": 32,
    "FPN.OUT_CHANNELS": 32,
    "RPN.POST_NMS_TOPK_TRAIN": 30,
    "RPN.POST_NMS_TOPK_TEST": 10,
    "ROI_HEADS.NUM_CLASSES": 3,
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "ROI_BOX_HEAD.NUM_CONV": 1,
    "ROI_BOX_HEAD.CONV_DIM": 32,
    "ROI_BOX_HEAD.NUM_FC": 1,
    "ROI_BOX_HEAD.FC_DIM": 32,
    "ROI_MASK_HEAD.NUM_CONV": 1,
    "ROI_MASK_HEAD.CONV_DIM": 32,
    "RETINANET.NUM_CLASSES": 3,
    "RETINANET.NUM_CONVS": 2,
    "SEM_SEG_HEAD.CONVS_DIM": 32,
    "SEM_SEG_HEAD.NUM_CLASSES": 4,
}


def small_config(base, norm, **changes):
    """A config of Detectron2's model zoo at a fraction of its width, with every NORM set.

    ``changes`` are keys below MODEL, with "__" for the dot.
    """
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(base))
    options = {**SMALL, **{key: norm for key in NORM_KEYS}}
    options.update({key.replace("__", "."): value for key, value in changes.items()})
    cfg.merge_from_list([x for key, value in options.items() for x in (f"MODEL.{key}", value)])
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
    return cfg


def small_model(base, norm, **changes):
    torch.manual_seed(0)
    return build_model(small_config(base, norm, **changes))


def an_image(size=64):
    return {"image": torch.rand(3, size, size) * 255, "height": size, "width": size}


def a_training_image(size=64):
    """An image with one object, for every task."""
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 48.0, 40.0]]))
    instances.gt_classes = torch.tensor([1])
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, 8:40, 8:48] = True
    instances.gt_masks = BitMasks(mask)
    return {**an_image(size), "instances": instances, "sem_seg": mask[0].long()}


def modules_of_type(model, kind):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def randomize_norms(model):
    """Gives every affine and estimate a value of its own, so that none goes unnoticed."""
    with torch.no_grad():
        for m in model.modules():
            for name, value in [
                *m.named_parameters(recurse=False),
                *m.named_buffers(recurse=False),
            ]:
                if name == "running_mean" or (isinstance(m, nn.GroupNorm) and "bias" in name):
                    value.normal_(0.0, 0.3)
                elif name == "running_var" or (isinstance(m, nn.GroupNorm) and "weight" in name):
                    value.uniform_(0.5, 1.5)
    return model


@contextlib.contextmanager
def logged(*names, level=logging.INFO):
    """The messages of these loggers, however logging has been set up by others."""
    messages = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield messages
    finally:
        for logger, old in zip(loggers, levels):
            logger.removeHandler(handler)
            logger.setLevel(old)
