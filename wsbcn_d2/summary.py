"""What a model is made of, in one line."""

from collections import Counter
from typing import Iterator, List, Tuple

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
    of 5); 20 BatchChannelNorm(estimate); no norms in proposal_generator (3 convolutions)``. The
    last tells of parts that did not heed a norm option: some projects know only certain strings.
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
    without = ", ".join(f"{name} ({n} convolutions)" for name, n in _without_norms(model))
    if parts and without:
        parts.append(f"no norms in {without}")
    return "; ".join(parts)


def _without_norms(model: nn.Module, depth: int = 2) -> Iterator[Tuple[str, int]]:
    """The parts of a model, and their parts, that have convolutions and no norms."""
    for name, part in model.named_children():
        convolutions, _ = _count_convolutions(part)
        if is_convolution(part) or not convolutions:
            continue
        if not any(map(is_norm, part.modules())):
            yield name, convolutions
        elif depth > 1:
            yield from ((f"{name}.{n}", count) for n, count in _without_norms(part, depth - 1))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer."""
    # By name, so that those of all libraries are seen. Containers (Conv2dNormActivation) have none.
    return "Norm" in type(module).__name__ and bool(module._parameters or module._buffers)


def _count_convolutions(module: nn.Module) -> Tuple[int, int]:
    convolutions = [m for m in module.modules() if is_convolution(m)]
    return len(convolutions), sum(isinstance(m, WeightStandardized) for m in convolutions)
