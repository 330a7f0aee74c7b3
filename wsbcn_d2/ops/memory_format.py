"""How activations lie in memory: as NCHW or channels_last, and without gaps."""

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x itself if it lies in memory as NCHW or channels_last, otherwise a copy that does."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def in_format_of(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the memory format of x, which is dense."""
    if x.is_contiguous():
        return other.contiguous()
    return other.contiguous(memory_format=torch.channels_last)
