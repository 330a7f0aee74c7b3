"""ResNet and ResNet-FPN backbones.

They take the keys of Detectron2's backbones of the same name (``MODEL.RESNETS``, ``MODEL.FPN``,
``MODEL.BACKBONE.FREEZE_AT``), have the same parameter names, and add ``MODEL.WSBCN``'s.
"""

from typing import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..config import require_wsbcn_config
from .blocks import zero_init_residual_
from .checkpointing import checkpoint_activations_


def build_wsbcn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet (depths 18 to 152, ResNeXt, deformable blocks).

    Its blocks need fewer passes over their activations with BCN; see :mod:`.blocks`. With
    ``MODEL.WSBCN.CHECKPOINT_ACTIVATIONS``, its blocks trade time for memory; with
    ``MODEL.WSBCN.ZERO_INIT_RESIDUAL`` they begin as the identity.

    Raises:
        KeyError: if the config lacks the keys of :func:`wsbcn_d2.add_wsbcn_config`.
        ValueError: if the blocks have no weight to begin as the identity with.
    """
    require_wsbcn_config(cfg)
    resnet = build_resnet_backbone(cfg, input_shape)
    if cfg.MODEL.WSBCN.ZERO_INIT_RESIDUAL:
        zero_init_residual_(resnet)
    if cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS:
        # So that it works in any trainer, which can do the same for the rest of the model.
        checkpoint_activations_(resnet, "backbone")
    return resnet


def build_wsbcn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """FPN on the ResNet, with a max-pooled p6 (Mask R-CNN, Faster R-CNN)."""
    return _build_fpn(cfg, input_shape, lambda res5, out: LastLevelMaxPool())


def build_wsbcn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """FPN on the ResNet, with convolutional p6 and p7 (RetinaNet, FCOS)."""
    return _build_fpn(cfg, input_shape, LastLevelP6P7)


BACKBONES = (
    build_wsbcn_resnet_backbone,
    build_wsbcn_resnet_fpn_backbone,
    build_wsbcn_retinanet_resnet_fpn_backbone,
)


def _build_fpn(
    cfg: CfgNode, input_shape: ShapeSpec, top_block: Callable[[int, int], nn.Module]
) -> FPN:
    bottom_up = build_wsbcn_resnet_backbone(cfg, input_shape)
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(bottom_up.output_shape()["res5"].channels, out_channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
