"""Runs the convolution modules of a residual block or head: as one operation
(:mod:`wsbcn_d2.ops.branch`) where their norms and hooks allow it, else one by one."""

from typing import Any, List, Optional, Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..ops import Link, branch, is_plain
from .batch_channel_norm import BatchChannelNorm
from .fusion import fusible_activation, is_hooked, normalize
from .weight_standardization import WSConv2d, geometry_of


def run_branch(
    convs: Sequence[nn.Module],
    x: Tensor,
    residual: Optional[Tensor] = None,
    activation: str = "relu",
) -> Tensor:
    """``activation(conv(... relu(conv(x)) ...) + residual)`` of convolutions with their norms.

    One operation (:mod:`wsbcn_d2.ops.branch`) if all are convolutions without bias, standardized
    or not, with a :class:`BatchChannelNorm` each, and nothing wants to see what is
    between them.

    Args:
        convs: modules in the place of a :class:`detectron2.layers.Conv2d`; an activation of their
            own comes first.
        x: (N, C_in, H, W).
        residual: of the shape of the result.
        activation: of the result, "relu" or "". Between two convolutions it is ReLU.

    Returns:
        (N, C_out, H_out, W_out)
    """
    # An activation of the last one's own is that of the branch only if nothing is between the two.
    own = getattr(convs[-1], "activation", None)
    if own is None or (residual is None and fusible_activation(own) == activation):
        links = _links(convs, x)
        if links is not None:
            return branch(x, links, residual, activation)
    for conv in convs[:-1]:
        x = _one_by_one(conv, x, None, "relu")
    return _one_by_one(convs[-1], x, residual, activation)


def _links(convs: Sequence[Any], x: Tensor) -> Optional[List[Link]]:
    """The convolutions for :func:`branch`; None if one is not for it, or the input."""
    norms: List[Any] = [_norm_of(conv) for conv in convs]
    if None in norms or x.dim() != 4 or not is_plain(x, *(conv.weight for conv in convs)):
        return None
    if len({conv.weight.dtype for conv in convs}) > 1:
        return None
    links = []
    for conv, norm in zip(convs, norms):
        weight, eps = conv.weight, None
        if isinstance(conv, WSConv2d):
            eps = conv.eps
            if conv.ws_scale is not None:
                weight, eps = conv.standardized_weight(), None
        links.append(Link(weight, eps, geometry_of(conv), norm.normalization()))
    return links


def _norm_of(conv: Any) -> Optional[BatchChannelNorm]:
    """The normalization of a convolution for :func:`branch`; None if it is not for it."""
    if type(conv) not in (Conv2d, WSConv2d):
        return None
    norm = conv.norm
    if (
        type(norm) is BatchChannelNorm
        and norm.num_channels == conv.out_channels
        and fusible_activation(conv.activation) in ("", "relu")
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not is_hooked(conv)
        and not is_hooked(norm)
    ):
        return norm
    return None


def _one_by_one(conv: Any, x: Tensor, residual: Optional[Tensor], activation: str) -> Tensor:
    own = getattr(conv, "activation", None)  # someone may have put another module there
    function = F.relu if activation == "relu" else None
    if type(conv) in (Conv2d, WSConv2d) and own is None and not is_hooked(conv):
        return normalize(_convolve(conv, x), conv.norm, residual, function)
    out = conv(x)
    if residual is not None:
        out = out + residual
    elif fusible_activation(own) == activation:
        return out
    return out if function is None else function(out)


def _convolve(conv: Any, x: Tensor) -> Tensor:
    if isinstance(conv, WSConv2d):
        return conv.convolve(x)
    # With zeros, whatever its padding_mode: as Detectron2's own `forward`.
    return F.conv2d(x, conv.weight, conv.bias, *geometry_of(conv))
