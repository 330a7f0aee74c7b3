"""Weight standardization: the formula, and the standardization of many weights at once.

    W_hat[o] = (W[o] - mean W[o]) / sqrt(var W[o] + eps)        for each output channel o

(arXiv 1903.10520v2, Eq. 11, with the biased variance and eps inside the root, as the paper writes
it.) With ``g`` the gradient of ``W_hat``, that of ``W`` is

    (g - mean g - W_hat mean(g W_hat)) / sqrt(var W + eps)

for which nothing is kept but the weights and two numbers a filter. Two operations are known to
PyTorch: ``wsbcn_d2::standardize`` and ``wsbcn_d2::standardize_backward``; a backend
(:mod:`.eager`, :mod:`.native_backend`, :mod:`.triton_backend`) has a function for each.
"""

from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor

from .backend import call_on_device_of, kernels_for
from .library import LIBRARY
from .state import is_observed

LIBRARY.define(
    "standardize(Tensor[] weights, float[] eps, ScalarType dtype) -> (Tensor[], Tensor, Tensor)"
)
LIBRARY.define(
    "standardize_backward(Tensor[] grads, Tensor[] weights, Tensor mean, Tensor rstd) -> Tensor[]"
)


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardizes every filter to zero mean and, up to ``eps``, unit variance.

    Gradients, of any order, go through mean and variance. Computed in at least float32 and
    returned in the dtype of ``weight``.

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


def standardize_all(
    weights: Sequence[Tensor], eps: Sequence[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """Standardizes the weights of several convolutions in few launches, without autograd.

    Args:
        weights: of one dtype and device; those of a convolution each, (C_out, ...).
        eps: for each of them.
        dtype: of the result.

    Returns:
        The standardized weights, in their memory formats, and for
        :func:`standardize_all_backward` the means and reciprocal deviations of all filters, one
        weight after the other.
    """
    weights = [w if w.is_contiguous() else _dense(w) for w in weights]
    if is_observed(weights[0]):
        return torch.ops.wsbcn_d2.standardize(weights, list(eps), dtype)
    return _forward(weights, eps, dtype)


def standardize_all_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """Gradients of the weights, in their dtype, from those of the standardized weights.

    Args:
        grads: one dtype, which need not be that of the weights.
        weights, mean, rstd: arguments and results of :func:`standardize_all`.

    Raises:
        RuntimeError: if a gradient has another shape than its weight.
    """
    for grad, weight in zip(grads, weights):  # which the kernels take for granted
        if grad.shape != weight.shape:
            raise RuntimeError(f"a gradient of shape {grad.shape} for a weight of {weight.shape}")
    weights = [w if w.is_contiguous() else _dense(w) for w in weights]
    if is_observed(weights[0]):
        return torch.ops.wsbcn_d2.standardize_backward(list(grads), weights, mean, rstd)
    return _backward(grads, weights, mean, rstd)


def _dense(weight: Tensor) -> Tensor:
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def _forward(weights: Sequence[Tensor], *args: Any) -> Tuple[List[Tensor], Tensor, Tensor]:
    function = kernels_for(weights[0]).standardize_forward
    return call_on_device_of(weights[0], function, weights, *args)


def _backward(grads: Sequence[Tensor], *args: Any) -> List[Tensor]:
    function = kernels_for(grads[0]).standardize_backward
    return call_on_device_of(grads[0], function, grads, *args)


LIBRARY.impl("standardize", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("standardize_backward", _backward, "CompositeExplicitAutograd")
