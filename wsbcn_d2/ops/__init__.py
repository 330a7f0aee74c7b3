"""Differentiable operations: tensors in, tensors out. They know neither modules nor Detectron2."""

from .backend import BACKENDS, backend_name, set_backend
from .batch_channel_norm import batch_channel_norm, moments
from .branch import Link, branch
from .extension import has_extension
from .state import in_backward, is_compiling, is_traced, several_ranks
from .weight_standardization import standardize_all, standardize_all_backward, standardize_weight

__all__ = [
    "BACKENDS",
    "backend_name",
    "Link",
    "batch_channel_norm",
    "branch",
    "has_extension",
    "in_backward",
    "is_compiling",
    "is_traced",
    "moments",
    "set_backend",
    "several_ranks",
    "standardize_all",
    "standardize_all_backward",
    "standardize_weight",
]
