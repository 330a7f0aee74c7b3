"""What a model is made of, in one line."""

from collections import Counter
from typing import List

from torch import nn

from .layers import (
    BatchChannelNorm,
    ChannelNorm,
    WeightStandardized,
    is_convolution,
    weights_per_filter,
)


def summarize(model: nn.Module) -> str:
    """One line on the layers of this package in a model; empty if there are none.

    For example ``weight standardization in 20 of 33 convolutions (backbone 20 of 28, roi_heads 0
    of 5); 20 BatchChannelNorm(estimate)``.
    """
    parts: List[str] = []
    total, standardized = _count_convolutions(model)
    if standardized:
        counts = {name: _count_convolutions(child) for name, child in model.named_children()}
        where = ", ".join(f"{name} {ws} of {n}" for name, (n, ws) in counts.items() if n)
        where = where and f" ({where})"
        parts.append(f"weight standardization in {standardized} of {total} convolutions{where}")
        single = sum(is_convolution(m) and weights_per_filter(m) == 1 for m in model.modules())
        if single:
            parts.append(f"{single} with filters of one weight, which are not standardized")
    norms = Counter(
        f"BatchChannelNorm({m.mode})" if isinstance(m, BatchChannelNorm) else "ChannelNorm"
        for m in model.modules()
        if isinstance(m, (BatchChannelNorm, ChannelNorm))
    )
    parts.extend(f"{n} {name}" for name, n in norms.items())
    return "; ".join(parts)


def _count_convolutions(module: nn.Module) -> "tuple[int, int]":
    convolutions = [m for m in module.modules() if is_convolution(m)]
    return len(convolutions), sum(isinstance(m, WeightStandardized) for m in convolutions)
