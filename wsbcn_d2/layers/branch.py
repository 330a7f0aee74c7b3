"""The branch of a residual block, as one operation where its layers allow it."""

from typing import List, Optional, Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..ops import Link, branch, is_traced
from .batch_channel_norm import BatchChannelNorm
from .fusion import is_hooked, is_relu, normalize
from .shared_standardization import compute_dtype, kept_filters
from .weight_standardization import WSConv2d


def run_branch(
    convs: Sequence[nn.Module], x: Tensor, residual: Optional[Tensor] = None, relu: bool = True
) -> Tensor:
    """``relu(conv(... relu(conv(x)) ...) + residual)`` of convolutions with their normalization.

    One operation (:mod:`wsbcn_d2.ops.branch`) if all are convolutions without bias, standardized
    or not, with a :class:`BatchChannelNorm` each, and nothing wants to see what is
    between them.

    Args:
        convs: instances of :class:`detectron2.layers.Conv2d`, with ReLU or no activation of their
            own; with a residual or without ``relu``, the last has none.
        x: (N, C_in, H, W).
        residual: of the shape of the result.
        relu: whether ReLU is applied to the result, as it always is between two convolutions.

    Returns:
        (N, C_out, H_out, W_out)
    """
    links = _links(convs, x)
    if links is not None:
        return branch(x, links, residual, relu)
    for conv in convs[:-1]:
        x = _one_by_one(conv, x, None, True)
    return _one_by_one(convs[-1], x, residual, relu)


def _links(convs: Sequence[nn.Module], x: Tensor) -> Optional[List[Link]]:
    """The convolutions for :func:`branch`; None if one is not for it, or the input."""
    if is_traced(x) or x.dim() != 4:
        return None
    dtype = x.dtype
    found = []
    for conv in convs:
        norm = _norm_of(conv)
        if norm is None:
            return None
        filters = conv.filters() if type(conv) is WSConv2d else _computed_with(conv.weight)
        if filters.dtype != dtype:  # autocast casts the input
            return None
        found.append((conv, norm, filters))
    links = []
    for conv, norm, filters in found:
        again = kept_filters(conv, filters) if type(conv) is WSConv2d else None
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        parameters, state, options = norm.arguments()
        links.append(Link(filters, again, geometry, parameters, state, *options))
    return links


def _computed_with(filters: Tensor) -> Tensor:
    """The filters of a plain convolution, in the dtype in which it computes."""
    dtype = compute_dtype(filters)
    return filters if filters.dtype == dtype else filters.to(dtype)


def _norm_of(conv: nn.Module) -> Optional[BatchChannelNorm]:
    """The normalization of a convolution for :func:`branch`; None if it is not for it."""
    kind = type(conv)
    if kind is not WSConv2d and kind is not Conv2d:
        return None
    norm = conv._modules.get("norm")
    if (
        type(norm) is BatchChannelNorm
        and norm.num_channels == conv.out_channels
        and (conv.activation is None or is_relu(conv.activation))
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and type(conv.padding) is tuple
        and not is_hooked(conv)
        and not is_hooked(norm)
    ):
        return norm
    return None


def _one_by_one(conv: nn.Module, x: Tensor, residual: Optional[Tensor], relu: bool) -> Tensor:
    fusible = type(conv) in (Conv2d, WSConv2d) and conv.activation is None and not is_hooked(conv)
    if fusible and isinstance(conv.norm, BatchChannelNorm):
        if isinstance(conv, WSConv2d):
            x = conv.convolve(x)
        else:
            x = conv._conv_forward(x, conv.weight, conv.bias)
        return normalize(x, conv.norm, residual, F.relu if relu else None)
    out = conv(x)
    if residual is not None:
        out += residual
    return F.relu_(out) if relu and conv.activation is None else out
