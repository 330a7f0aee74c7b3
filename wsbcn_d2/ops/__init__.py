"""Differentiable operations: tensors in, tensors out. They know neither modules nor Detectron2."""

from .batch_channel_norm import batch_channel_norm
from .eager import is_compiling, moments

__all__ = ["backend_name", "batch_channel_norm", "is_compiling", "moments"]


def backend_name() -> str:
    """The kernels in use: ``"eager"``, plain PyTorch on any device."""
    return "eager"
