"""The branch of a residual block, or the convolutions of a head, as one operation where its layers
allow it."""

from typing import Any, List, Optional, Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..ops import Link, branch, is_traced
from .batch_channel_norm import BatchChannelNorm
from .fusion import is_hooked, is_relu, normalize
from .shared_standardization import compute_dtype, kept_filters, weight_of
from .weight_standardization import WSConv2d


def run_branch(
    convs: Sequence[nn.Module], x: Tensor, residual: Optional[Tensor] = None, relu: bool = True
) -> Tensor:
    """``relu(conv(... relu(conv(x)) ...) + residual)`` of convolutions with their normalization.

    One operation (:mod:`wsbcn_d2.ops.branch`) if all are convolutions without bias, standardized
    or not, with a :class:`BatchChannelNorm` each, and nothing wants to see what is
    between them.

    Args:
        convs: modules in the place of a :class:`detectron2.layers.Conv2d`; an activation of their
            own comes first.
        x: (N, C_in, H, W).
        residual: of the shape of the result.
        relu: whether ReLU is applied to the result, as it always is between two convolutions.

    Returns:
        (N, C_out, H_out, W_out)
    """
    # A ReLU of the last one's own is that of the branch only if nothing is between the two.
    last = _activation_of(convs[-1]) is None or (relu and residual is None)
    links = _links(convs, x) if last else None
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
        if norm is None or compute_dtype(weight_of(conv)) != dtype:  # autocast casts the input
            return None
        found.append((conv, norm))
    links = []
    for conv, norm in found:
        again = None
        if type(conv) is WSConv2d:
            filters = conv.filters()
            again = kept_filters(conv, filters)
        else:
            filters = weight_of(conv)
        if filters.dtype != dtype:
            filters = filters.to(dtype)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        # That of the branch's input: all its convolutions are repeated together.
        parameters, state, options = norm.arguments(x.shape)
        links.append(Link(filters, again, geometry, parameters, state, *options))
    return links


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
        and conv._parameters.get("bias", conv) is None
        and conv.padding_mode == "zeros"
        and {type(conv.stride), type(conv.padding), type(conv.dilation)} == {tuple}
        and not is_hooked(conv)
        and not is_hooked(norm)
    ):
        return norm
    return None


def _activation_of(conv: nn.Module) -> Any:
    """None if there is none, also where someone put another module in place of a convolution."""
    return getattr(conv, "activation", None)


def _one_by_one(conv: nn.Module, x: Tensor, residual: Optional[Tensor], relu: bool) -> Tensor:
    fusible = type(conv) in (Conv2d, WSConv2d) and conv.activation is None and not is_hooked(conv)
    if fusible and isinstance(conv.norm, BatchChannelNorm):
        if isinstance(conv, WSConv2d):
            x = conv.convolve(x)
        else:
            # With zeros, whatever its padding_mode: as Detectron2's own `forward`.
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            x = F.conv2d(x, conv.weight, conv.bias, *geometry)
        return normalize(x, conv.norm, residual, F.relu if relu else None)
    out, activation = conv(x), _activation_of(conv)
    if residual is not None:
        # Not in place on what an activation may have saved, nor below.
        out = out.add_(residual) if activation is None else out + residual
    elif is_relu(activation):
        return out
    if not relu:
        return out
    return F.relu_(out) if activation is None else F.relu(out)
