"""Layers: modules with state and modes. They know nothing of configs."""

from .batch_channel_norm import BatchChannelNorm, ChannelNorm
from .weight_standardization import (
    WeightStandardized,
    WSConv2d,
    WSConvTranspose2d,
    is_convolution,
    standardize_,
)

__all__ = [
    "BatchChannelNorm",
    "ChannelNorm",
    "WSConv2d",
    "WSConvTranspose2d",
    "WeightStandardized",
    "is_convolution",
    "standardize_",
]
