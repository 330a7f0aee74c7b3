"""The formulas in stock operations of PyTorch, which can be exported and differentiated any number
of times, for whatever is not computed at once: TorchScript, ONNX, ``torch.func``, second
derivatives.
"""

from typing import Optional

import torch
from torch import Tensor

from .activation import activate_


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardizes every filter to zero mean and, up to ``eps``, unit variance.

        W_hat[o] = (W[o] - mean W[o]) / sqrt(var W[o] + eps)        for each output channel o

    (Qiao et al., arXiv 1903.10520v2, Eq. 11, with the biased variance and eps inside the root, as
    the paper writes it.) Gradients, of any order, go through mean and variance. Computed in at
    least float32 and returned in the dtype of ``weight``.

    Args:
        weight: filters of a convolution, (C_out, C_in / groups, kh, kw).
        eps: added to the biased variance, inside the root. It keeps a constant filter (and a
            filter of a single weight, whose variance is always 0) at zero with finite gradient.

    Returns:
        Tensor of the same shape.
    """
    # Layer normalization of the filters is this formula in one fused operation, which saves nothing
    # but the weight and two numbers a filter.
    filters = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    out = torch.nn.functional.layer_norm(filters, filters.shape[1:], eps=eps)
    return out.view_as(weight).to(weight.dtype)


def channel_norm(x: Tensor, group_weight: Tensor, group_bias: Tensor, eps: float) -> Tensor:
    """Group normalization whose affine is per group.

    Args:
        x: (N, C, H, W).
        group_weight, group_bias: (G,); G divides C.
        eps: added to the variance, inside the root.

    Returns:
        Tensor of the same shape.
    """
    groups = group_weight.shape[0]
    weight = group_weight.repeat_interleave(x.shape[1] // groups)
    bias = group_bias.repeat_interleave(x.shape[1] // groups)
    # Not F.group_norm, which refuses a group of a single value.
    return torch.group_norm(x, groups, weight, bias, eps)


def batch_channel_norm_by(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    eps: float,
    residual: Optional[Tensor] = None,
    activation: str = "",
) -> Tensor:
    """Batch-channel normalization by given statistics; see :mod:`.batch_channel_norm`.

    Args:
        x: (N, C, H, W).
        mean, rstd: of each channel, (C,), in the dtype to compute in; ``rstd`` is
            ``1 / sqrt(variance + eps)``.
        weight, bias: (C,).
        group_weight, group_bias: (G,).
        eps: added to the variance of the channel normalization, inside the root.
        residual: of the shape of x, added to the result.
        activation: "" or "relu", applied after that addition.

    Returns:
        Tensor of the shape and dtype of x.
    """
    dtype = mean.dtype
    # Minus the mean first: as a part of the bias it would cancel badly far from zero.
    centered = x.to(dtype) - mean.view(1, -1, 1, 1)
    z = centered * (weight.to(dtype) * rstd).view(1, -1, 1, 1) + bias.to(dtype).view(1, -1, 1, 1)
    y = channel_norm(z, group_weight.to(dtype), group_bias.to(dtype), eps)
    if residual is not None:
        y = y + residual
    return activate_(y, activation).to(x.dtype)
