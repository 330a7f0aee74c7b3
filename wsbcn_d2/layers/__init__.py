"""Layers: modules with state and modes. They know nothing of configs."""

from .batch_channel_norm import BatchChannelNorm, ChannelNorm
from .exchange import become
from .fusion import is_hooked, normalize
from .shared_standardization import StandardizeOnce, standardize_together
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
    "StandardizeOnce",
    "WSConv2d",
    "WSConvTranspose2d",
    "WeightStandardized",
    "become",
    "is_convolution",
    "is_hooked",
    "normalize",
    "standardize_",
    "standardize_together",
]
