"""Weight standardization as one differentiable operation.

    W_hat[o] = (W[o] - mean W[o]) / sqrt(var W[o] + eps)        for each output channel o

(Qiao et al., arXiv 1903.10520v2, Eq. 11, with the biased variance and eps inside the root, as the
paper writes it.) With ``g`` the gradient of ``W_hat``, that of ``W`` is

    (g - mean g - W_hat mean(g W_hat)) / sqrt(var W + eps)

It is layer normalization of the filters, for which PyTorch has a kernel (:mod:`.formula`). On the
CPU those in C (:mod:`.native_backend`) take 0.6 of its time: 37 ms instead of 61 for all filters of
a step of the demo's R-18, by one thread.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import native_backend
from .backend import kernels_for
from .differentiable import aliases, gradients_of
from .formula import layer_norm_of_filters
from .state import is_plain, is_transformed


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardizes every filter to zero mean and, up to ``eps``, unit variance.

    Gradients, of any order, go through mean and variance. Computed in at least float32.

    Args:
        weight: filters of a convolution, (C_out, C_in / groups, kh, kw).
        eps: added to the biased variance, inside the root. It keeps a constant filter (and a
            filter of a single weight, whose variance is always 0) at zero with finite gradient.

    Returns:
        Tensor of the shape, dtype and memory format of ``weight``.
    """
    if torch.jit.is_scripting():
        return layer_norm_of_filters(weight, eps)
    else:  # TorchScript does not compile what is in the branch not taken
        if is_plain(weight) and _has_kernels(weight):
            return _WeightStandardization.apply(weight, eps)
        return layer_norm_of_filters(weight, eps)


def _has_kernels(weight: Tensor) -> bool:
    if weight.dtype != torch.float32 or not weight.numel():
        return False
    return kernels_for(weight) is native_backend


class _WeightStandardization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float) -> Tensor:
        filters, tables = native_backend.standardize(weight, eps)
        ctx.save_for_backward(weight, tables)
        ctx.eps = eps
        return filters

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], None]:
        weight, tables = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if not (create_graph or is_transformed(grad)):
            return native_backend.standardize_backward(grad, weight, tables), None
        # Second derivatives, or many gradients at once: by differentiable operations.
        with torch.enable_grad():
            inputs = aliases(weight)
            filters = layer_norm_of_filters(inputs[0], ctx.eps)
            (of_weight,) = gradients_of(filters, inputs, [True], grad, create_graph)
        return of_weight, None
