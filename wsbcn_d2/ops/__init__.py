"""Differentiable operations: tensors in, tensors out. They know neither modules nor Detectron2."""

from .backend import BACKENDS, backend_name, set_backend
from .batch_channel_norm import batch_channel_norm, moments
from .state import in_backward, is_compiling, several_ranks
from .weight_standardization import standardize_all, standardize_all_backward, standardize_weight

__all__ = [
    "BACKENDS",
    "backend_name",
    "batch_channel_norm",
    "in_backward",
    "is_compiling",
    "moments",
    "set_backend",
    "several_ranks",
    "standardize_all",
    "standardize_all_backward",
    "standardize_weight",
]
