"""Layers: modules with state and modes. They know nothing of configs."""

from .batch_channel_norm import BatchChannelNorm, ChannelNorm
from .branch import run_branch
from .exchange import become
from .fusion import fusible_activation, is_hooked, normalize
from .weight_standardization import (
    WeightStandardized,
    WSConv2d,
    WSConvTranspose2d,
    adaptation,
    is_convolution,
    outputs_first,
    standardize_,
    weights_per_filter,
)

__all__ = [
    "BatchChannelNorm",
    "ChannelNorm",
    "WSConv2d",
    "WSConvTranspose2d",
    "WeightStandardized",
    "adaptation",
    "become",
    "fusible_activation",
    "is_convolution",
    "is_hooked",
    "normalize",
    "outputs_first",
    "run_branch",
    "standardize_",
    "weights_per_filter",
]
