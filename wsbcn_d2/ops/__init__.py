"""Differentiable operations: tensors in, tensors out. They know neither modules nor Detectron2."""

from .activation import name_of_activation
from .backend import BACKENDS, backend_name, set_backend
from .batch_channel_norm import batch_channel_norm, moments
from .branch import Link, branch
from .estimates import several_ranks
from .formula import batch_channel_norm_by, channel_norm, standardize_weight
from .normalization import Normalization
from .standardized_convolution import Geometry, standardized_conv2d
from .state import all_modules_are_hooked, in_backward, is_compiling, is_plain, is_trainable

__all__ = [
    "BACKENDS",
    "Geometry",
    "Link",
    "Normalization",
    "all_modules_are_hooked",
    "backend_name",
    "batch_channel_norm",
    "batch_channel_norm_by",
    "branch",
    "channel_norm",
    "in_backward",
    "is_compiling",
    "is_plain",
    "is_trainable",
    "moments",
    "name_of_activation",
    "set_backend",
    "several_ranks",
    "standardize_weight",
    "standardized_conv2d",
]
