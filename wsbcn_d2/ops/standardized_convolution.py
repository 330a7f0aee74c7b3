"""Convolution with standardized filters, which nothing keeps.

    W_hat[o] = (W[o] - mean W[o]) / sqrt(var W[o] + eps),       y = conv(x, W_hat)

(Qiao et al., arXiv 1903.10520v2, Eq. 10 and 11.) Filters are standardized at each call, so a call
computes with the weight that there is. With ``g`` the gradient of ``W_hat``, that of ``W`` is

    (g - mean g - W_hat mean(g W_hat)) / sqrt(var W + eps)

The graph keeps x and W, as that of a plain convolution does. ``W_hat`` would be a second copy of
the weights while memory is fullest (94 MB of a ResNet-50): the backward pass makes it again.

A backend (:mod:`.eager`, :mod:`.native_backend`, :mod:`.triton_backend`) has two functions for
that:

- ``standardize(weight, eps)`` returns ``W_hat``, in the memory format of the weight and at least
  float32, and the statistics of the filters in a form of its own.
- ``standardize_backward(grad, weight, statistics)`` takes them, and returns the gradient of the
  weight. It may write that into ``grad``.
"""

from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .backend import kernels_for_weight
from .differentiable import aliases, gradients_of
from .formula import standardize_weight
from .state import is_plain, is_transformed

# ``stride, padding, dilation, groups`` of :func:`torch.conv2d`, in numbers.
Geometry = Tuple[Sequence[int], Sequence[int], Sequence[int], int]


def standardized_conv2d(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, geometry: Geometry
) -> Tensor:
    """:func:`torch.conv2d` with standardized filters.

    Gradients can be differentiated again. Under autocast it computes in the dtype that a plain
    convolution would have.

    Args:
        x: (N, C_in, H, W), N may be 0.
        weight: (C_out, C_in / groups, kh, kw).
        bias: (C_out,) or None.
        eps: added to the biased variance of a filter, inside the root.
        geometry: ``stride, padding, dilation, groups``, in numbers.

    Returns:
        (N, C_out, H_out, W_out)
    """
    if not is_plain(x, weight):
        return torch.conv2d(x, standardize_weight(weight, eps), bias, *geometry)
    dtype = compute_dtype(weight)
    if bias is not None:
        bias = bias.to(dtype)
    return _StandardizedConv2d.apply(cast_input(x), weight, bias, eps, dtype, geometry)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution with these filters computes: autocast leaves float64."""
    kind, dtype = weight.device.type, weight.dtype
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return dtype
    return dtype if dtype == torch.float64 else torch.get_autocast_dtype(kind)


def cast_input(x: Tensor) -> Tensor:
    """The input of a convolution, in the dtype that autocast gives it."""
    return x.to(compute_dtype(x))


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: Optional[float],
    dtype: torch.dtype,
    geometry: Geometry,
    needed: Sequence[bool],
    bias_size: Optional[Sequence[int]] = None,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of input, weight and bias of a convolution, those that are needed.

    Args:
        grad: that of the output.
        x, weight: as the convolution had them, x in its compute dtype.
        eps: of the standardization of the weight; None: it was used as it is.
        dtype: the compute dtype.
        geometry: ``stride, padding, dilation, groups``, in numbers.
        needed: of input, weight and bias.
        bias_size: shape of the bias, if there is one.
    """
    filters, kernels = weight, kernels_for_weight(weight)
    if eps is not None:
        filters, statistics = kernels.standardize(weight, eps)
    stride, padding, dilation, groups = geometry
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        filters.to(dtype),
        bias_size,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        needed,
    )
    del filters
    if grad_weight is not None:
        if eps is not None:
            grad_weight = kernels.standardize_backward(grad_weight, weight, statistics)
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight, grad_bias


class _StandardizedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        eps: float,
        dtype: torch.dtype,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = (eps, dtype, geometry)
        filters, _ = kernels_for_weight(weight).standardize(weight, eps)
        return torch.conv2d(x, filters.to(dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, bias = ctx.saved_tensors
        eps, dtype, geometry = ctx.options
        needed = ctx.needs_input_grad[:3]
        create_graph = torch.is_grad_enabled()
        if create_graph or is_transformed(grad):
            # Second derivatives, or many gradients at once: by differentiable operations.
            with torch.enable_grad():
                x, weight, bias = inputs = aliases(x, weight, bias)
                y = torch.conv2d(x, standardize_weight(weight, eps).to(dtype), bias, *geometry)
                found = gradients_of(y, inputs, needed, grad, create_graph)
            return (*found, None, None, None)
        size = None if bias is None else bias.shape
        gradients = conv2d_backward(grad, x, weight, eps, dtype, geometry, needed, size)
        return (*gradients, None, None, None)
