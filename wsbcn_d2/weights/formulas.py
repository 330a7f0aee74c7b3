"""The formulas of weight standardization in the world, and how ours computes the same filters.

Ours divides a centered filter by ``sqrt(v + eps)`` with the biased variance ``v``, others by
another number ``T``. Scaling a filter by s gives ``s W / sqrt(s^2 v + eps)`` with the centered W,
which is ``W / T`` for ``s^2 = eps / (T^2 - v)``, provided that T is larger than the deviation; all
of the formulas below are of that kind.
"""

import math
from typing import Callable, Dict

import torch
from torch import Tensor


def _unbiased(v: Tensor, size: int) -> Tensor:
    # The unbiased variance of one value does not exist; the centered filter is zero all the same.
    return v * (size / max(size - 1, 1))


# T for filters of ``size`` weights with the biased variance v.
_DENOMINATORS: Dict[str, Callable[[Tensor, int], Tensor]] = {
    # the paper (arXiv 1903.10520v2, Eq. 11); timm's StdConv2d, whose eps is 1e-6 by default
    "paper": lambda v, size: torch.sqrt(v + 1e-5),
    # github.com/joe-siyuan-qiao/WeightStandardization and mmcv's ConvWS2d
    "gn": lambda v, size: torch.sqrt(_unbiased(v, size)) + 1e-5,
    # github.com/joe-siyuan-qiao/Batch-Channel-Normalization (imagenet/models/layers.py)
    "bcn": lambda v, size: torch.sqrt(_unbiased(v, size) + 1e-5),
}

FORMULAS = tuple(_DENOMINATORS)


def source_filters(weight: Tensor, formula: str) -> Tensor:
    """The filters that the source's formula makes, in float64.

    Args:
        weight: (C_out, ...).
        formula: one of ``FORMULAS``.
    """
    filters = weight.double().flatten(1)
    filters = filters - filters.mean(dim=1, keepdim=True)
    v = filters.square().mean(dim=1, keepdim=True)
    return (filters / _DENOMINATORS[formula](v, filters.shape[1])).view(weight.shape)


def rescaled_weight(weight: Tensor, formula: str, eps: float = 1e-5) -> Tensor:
    """Weights whose standardization by our formula gives what the source's gives for ``weight``.

    Args:
        weight: (C_out, ...).
        formula: one of ``FORMULAS``.
        eps: of our formula.

    Returns:
        Tensor of the shape and dtype of ``weight``.

    Raises:
        ValueError: if our formula cannot give these filters.
    """
    filters = weight.double().flatten(1)
    filters = filters - filters.mean(dim=1, keepdim=True)
    v = filters.square().mean(dim=1, keepdim=True)
    excess = _DENOMINATORS[formula](v, filters.shape[1]).square() - v
    if (excess <= 0).any():
        raise ValueError(
            f"filters with a deviation of {math.sqrt(v.max()):.1e} cannot be rescaled: formula "
            f"{formula!r} divides them by no more than that"
        )
    return (filters * torch.sqrt(eps / excess)).view(weight.shape).to(weight.dtype)
