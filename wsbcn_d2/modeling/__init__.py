"""Registered backbones, and what models with BCN are made faster with."""

from .backbone import (
    BACKBONES,
    build_wsbcn_resnet_backbone,
    build_wsbcn_resnet_fpn_backbone,
    build_wsbcn_retinanet_resnet_fpn_backbone,
)
from .fuse import fuse_

__all__ = [
    "BACKBONES",
    "build_wsbcn_resnet_backbone",
    "build_wsbcn_resnet_fpn_backbone",
    "build_wsbcn_retinanet_resnet_fpn_backbone",
    "fuse_",
]
