"""Registered backbones."""

from .backbone import (
    BACKBONES,
    build_wsbcn_resnet_backbone,
    build_wsbcn_resnet_fpn_backbone,
    build_wsbcn_retinanet_resnet_fpn_backbone,
)

__all__ = [
    "BACKBONES",
    "build_wsbcn_resnet_backbone",
    "build_wsbcn_resnet_fpn_backbone",
    "build_wsbcn_retinanet_resnet_fpn_backbone",
]
