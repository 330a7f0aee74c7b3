"""Detectron2's own LazyConfigs with a norm of this package in every part that takes one.

The norm is one key, so that a file serves all norms::

    tools/lazyconfig_train_net.py --config-file configs/LazyConfig/FILE.py train.norm=GN+WS

Training starts from random weights, at 1 image per GPU on 8 GPUs. For 2 images, double
``dataloader.train.total_batch_size`` and ``optimizer.lr``, and halve ``train.max_iter``: learning
rate schedules are relative to it.
"""

from typing import Any, Optional, Tuple

from detectron2 import model_zoo
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from omegaconf import DictConfig, ListConfig

# What takes a norm option, and as which argument.
NORM_ARGUMENTS = {
    BasicStem: "norm",
    ResNet.make_default_stages: "norm",
    ResNet.make_stage: "norm",
    FPN: "norm",
    FastRCNNConvFCHead: "conv_norm",
    MaskRCNNConvUpsampleHead: "conv_norm",
    RetinaNetHead: "norm",
    FCOSHead: "norm",
    SemSegFPNHead: "norm",
}


def normalized(name: str, model: Optional[str] = None) -> Tuple[DictConfig, ...]:
    """
    Args:
        name: a LazyConfig of Detectron2's model zoo, for 16 images.
        model: another one, whose model is taken instead.

    Returns:
        ``dataloader, lr_multiplier, model, optimizer, train``
    """
    cfg = model_zoo.get_config(name)
    if model is not None:
        cfg.model = model_zoo.get_config(model).model
    cfg.train.norm = "BCN+WS"
    _normalize(cfg.model)

    resnet = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    resnet.freeze_at = 0
    cfg.train.init_checkpoint = ""
    cfg.model.pixel_mean, cfg.model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    if "input_format" in cfg.model:
        cfg.model.input_format = "RGB"
    cfg.dataloader.train.mapper.image_format = "RGB"

    cfg.dataloader.train.total_batch_size = 8
    cfg.optimizer.lr /= 2
    cfg.train.max_iter *= 2
    return tuple(cfg[key] for key in ("dataloader", "lr_multiplier", "model", "optimizer", "train"))


def _normalize(node: Any) -> None:
    if isinstance(node, ListConfig):
        for child in node:
            _normalize(child)
    if not isinstance(node, DictConfig):
        return
    argument = NORM_ARGUMENTS.get(node.get("_target_"))
    if argument is not None:
        node[argument] = "${train.norm}"
    if "stride_in_1x1" in node:
        node.stride_in_1x1 = False  # as torchvision's ResNet
    if node.get("_target_") is FastRCNNConvFCHead:
        node.conv_dims, node.fc_dims = [256] * 4, [1024]  # 2fc has no place for a norm
    for key in node:
        _normalize(node[key])
