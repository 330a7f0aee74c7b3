"""Layers: modules with state and modes. They know nothing of configs."""

from .batch_channel_norm import BatchChannelNorm, ChannelNorm
from .branch import run_branch
from .exchange import become
from .fusion import is_hooked, is_relu, normalize
from .shared_standardization import StandardizeOnce, standardize_together
from .weight_standardization import (
    WeightStandardized,
    WSConv2d,
    WSConvTranspose2d,
    is_convolution,
    standardize_,
    weights_per_filter,
)

__all__ = [
    "BatchChannelNorm",
    "ChannelNorm",
    "StandardizeOnce",
    "WSConv2d",
    "WSConvTranspose2d",
    "WeightStandardized",
    "become",
    "is_convolution",
    "is_hooked",
    "is_relu",
    "normalize",
    "run_branch",
    "standardize_",
    "standardize_together",
    "weights_per_filter",
]
