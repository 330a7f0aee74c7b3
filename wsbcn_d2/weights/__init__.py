"""Checkpoints of other projects, as checkpoints of Detectron2 models."""

from .convert import ConversionError, ConversionReport, convert_state_dict
from .files import CheckpointError, read_checkpoint
from .layouts import LAYOUTS, detect_layout

__all__ = [
    "CheckpointError",
    "ConversionError",
    "ConversionReport",
    "LAYOUTS",
    "convert_state_dict",
    "detect_layout",
    "read_checkpoint",
]
