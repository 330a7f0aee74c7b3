"""The kernels in plain PyTorch: the only functions that touch a whole activation.

Everything else the normalization does is arithmetic on tables of shape ``(N, C)``, so a faster
backend has to provide just these four functions, with these signatures. All of them compute in at
least float32, whatever the dtype of the activation; tables have that compute dtype.

Temporaries are reused in place: on CPU the first touch of a new activation-sized buffer costs more
than the arithmetic on it.
"""

from typing import Tuple

import torch
from torch import Tensor


def moments(x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each image and channel.

    The variance is taken around the mean itself, so it does not cancel however far the data is
    from zero.

    Args:
        x: activation of shape (N, C, H, W).

    Returns:
        mean (N, C), var (N, C), and the centered activation (N, C, H, W) for :func:`scale_shift`,
        which may overwrite it.
    """
    x = x.to(_compute_dtype(x))
    mean = x.mean(dim=(2, 3)) if x.numel() else x.new_zeros(x.shape[:2])
    centered = x - mean[:, :, None, None]
    var = _dot(centered, centered) / max(x.shape[2] * x.shape[3], 1)
    return mean, var, centered


def scale_shift(centered: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * centered + shift`` in ``dtype``; the tables have shape (N, C).

    May overwrite ``centered``, which must come from :func:`moments`.
    """
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]
    if is_compiling():
        return _cast(centered * scale + shift, dtype)
    return _cast(centered.mul_(scale).add_(shift), dtype)


def grad_sums(grad: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The two reductions that the backward pass needs.

    Args:
        grad, x: (N, C, H, W); mean: (N, C), from :func:`moments`.

    Returns:
        ``sum_hw grad`` (N, C), ``sum_hw grad * (x - mean)`` (N, C), and the centered activation
        for :func:`grad_input`, which may overwrite it.
    """
    dtype = mean.dtype
    centered = x.to(dtype) - mean[:, :, None, None]
    grad = grad.to(dtype)
    return grad.sum(dim=(2, 3)), _dot(grad, centered), centered


def grad_input(grad: Tensor, centered: Tensor, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """``p * grad + q * centered + r`` in the dtype of ``grad``; the tables have shape (N, C).

    May overwrite ``centered``, which must come from :func:`grad_sums`.
    """
    p, q, r = p[:, :, None, None], q[:, :, None, None], r[:, :, None, None]
    compute_grad = grad.to(centered.dtype)
    if is_compiling():
        return _cast(p * compute_grad + q * centered + r, grad.dtype)
    return _cast(centered.mul_(q).add_(r).addcmul_(compute_grad, p), grad.dtype)


def is_compiling() -> bool:
    """Whether torch.compile is tracing.

    PyTorch (2.11) then loses the gradients of an autograd function, without an error, if its
    output was computed in place or is the result of a cast that does nothing. The compiler fuses
    and reuses memory by itself, so nothing is lost by giving it plain expressions.
    """
    if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling()
    return torch._dynamo.is_compiling()  # PyTorch 2.0 to 2.2


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over H and W, (N, C).

    Batched dot products read both operands once, without a temporary, where the memory layout
    allows. Autocast would run them in half precision, so it is switched off.
    """
    if a.device.type in ("cpu", "cuda") and a.is_contiguous() and b.is_contiguous():
        with torch.autocast(a.device.type, enabled=False):
            return torch.einsum("nchw,nchw->nc", a, b)
    return (a * b).sum(dim=(2, 3))
