"""The formulas in stock operations of PyTorch, which can be exported and differentiated any number
of times, for whatever is not computed at once: TorchScript, ONNX, ``torch.func``, second
derivatives.
"""

from typing import Optional

import torch
from torch import Tensor

from .activation import activate_


def layer_norm_of_filters(weight: Tensor, eps: float) -> Tensor:
    """See :func:`.weight_standardization.standardize_weight`."""
    x = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # In the order in which they lie in memory.
    channels_last = weight.dim() == 4 and not weight.is_contiguous()
    if channels_last:
        x = x.permute(0, 2, 3, 1)
    rows = x.flatten(1)
    filters = torch.nn.functional.layer_norm(rows, rows.shape[1:], eps=eps).view_as(x)
    if channels_last:
        filters = filters.permute(0, 3, 1, 2)
    return filters.to(weight.dtype)


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
