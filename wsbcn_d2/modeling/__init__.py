"""Registered backbones, and what models with BCN are made faster with."""

from .backbone import (
    BACKBONES,
    build_wsbcn_resnet_backbone,
    build_wsbcn_resnet_fpn_backbone,
    build_wsbcn_retinanet_resnet_fpn_backbone,
)
from .checkpointing import CHECKPOINTED, checkpoint_activations_, without_checkpointing
from .fuse import fuse_

__all__ = [
    "BACKBONES",
    "CHECKPOINTED",
    "build_wsbcn_resnet_backbone",
    "build_wsbcn_resnet_fpn_backbone",
    "build_wsbcn_retinanet_resnet_fpn_backbone",
    "checkpoint_activations_",
    "fuse_",
    "without_checkpointing",
]
