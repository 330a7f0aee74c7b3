"""The kernels in plain PyTorch, for any device.

Everything is computed in at least float32, whatever the dtype of the activation; tables have that
compute dtype. Temporaries of the size of the activation are reused in place: on CPU the first touch
of a new one costs more than the arithmetic on it.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from .estimates import pool_over_ranks, sum_over_ranks, update_estimates, update_with_batch

# The backward pass needs the output of a fused ReLU, which costs no memory: what follows, in
# general a convolution, saves it as well.
SAVES_OUTPUT_OF_RELU = True


def batch_channel_norm_forward(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    skipped_updates: Optional[Tensor],
    seen_elements: Optional[Tensor],
    update_rate: Optional[Tensor],
    eps: float,
    use_batch_statistics: bool,
    relu: bool,
    synchronize: bool,
) -> Tuple[Tensor, ...]:
    """See :mod:`.batch_channel_norm`."""
    m, v, centered = _moments(x)
    images, channels = m.shape
    values = images * x.shape[2] * x.shape[3]
    counters = (skipped_updates, seen_elements)
    if use_batch_statistics:
        count = m.new_full((1,), values)
        mu = m.mean(dim=0) if images else m.new_zeros(channels)
        s2 = (v + (m - mu).square()).mean(dim=0) if images else m.new_zeros(channels)
        if synchronize:
            mu, s2, count = pool_over_ranks(mu, s2, count)
        if update_rate is not None:
            update_with_batch(
                running_mean, running_var, mu, s2, float(update_rate), count.squeeze(0), *counters
            )
    else:
        count = m.new_empty(0)
        if update_rate is not None and values:
            around_old = (v + (m - running_mean).square()).mean(dim=0)
            update_estimates(
                running_mean,
                running_var,
                m.mean(dim=0),
                around_old,
                float(update_rate),
                values,
                *counters
            )
        mu, s2 = running_mean.to(m.dtype, copy=True), running_var.to(m.dtype)

    rstd = torch.rsqrt(s2 + eps)
    groups = group_weight.numel()
    a = weight.to(m.dtype) * rstd
    z_mean = a * (m - mu) + bias.to(m.dtype)
    d = _grouped(z_mean, groups)
    d = d - d.mean(dim=2, keepdim=True)
    group_var = (_grouped(a.square() * v, groups) + d.square()).mean(dim=2, keepdim=True)
    r = torch.rsqrt(group_var + eps)
    k = group_weight.to(m.dtype).view(1, groups, 1) * r
    scale = (k * a.view(1, groups, -1)).flatten(1)
    shift = (k * d + group_bias.to(m.dtype).view(1, groups, 1)).flatten(1)

    y = _scale_shift_(centered, scale, shift)
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = y.relu_()
    return _cast(y, x.dtype), m, v, d.flatten(1), r.flatten(1), mu, rstd, scale, shift, count


def batch_channel_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    m: Tensor,
    v: Tensor,
    d: Tensor,
    r: Tensor,
    mu: Tensor,
    rstd: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    count: Tensor,
    relu: bool,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, ...]:
    """See :mod:`.batch_channel_norm`."""
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_residual = grad if has_residual and relu else grad.new_empty(0)
    groups = group_weight.numel()
    pixels = x.shape[2] * x.shape[3]
    a = (weight.to(m.dtype) * rstd).view(1, groups, -1)
    v, d, r = _grouped(v, groups), _grouped(d, groups), r.unsqueeze(2)

    centered = x.to(m.dtype) - m[:, :, None, None]
    compute_grad = grad.to(m.dtype)
    s1, s2 = compute_grad.sum(dim=(2, 3)), _dot(compute_grad, centered)
    s1, s2 = _grouped(s1, groups), _grouped(s2, groups)
    size = max(a.shape[2] * pixels, 1)
    u1 = s1.sum(dim=2, keepdim=True) / size
    u2 = (r * (a * s2 + d * s1)).sum(dim=2, keepdim=True) / size
    grad_group_weight = size * u2.sum(dim=(0, 2))
    grad_group_bias = size * u1.sum(dim=(0, 2))

    k = group_weight.to(m.dtype).view(1, groups, 1) * r
    dz_sum = k * (s1 - pixels * (u1 + u2 * r * d))
    dz_t_sum = k * (s2 - pixels * u2 * r * a * v)
    grad_bias = dz_sum.sum(dim=0).flatten()
    # sum of dz (x - mu): the gradient of `a`, which is weight times rstd
    grad_a = (dz_t_sum + _grouped(m - mu, groups) * dz_sum).sum(dim=0).flatten()
    grad_weight = grad_a * rstd

    p = k * a
    q = -p * u2 * r * a
    c = -p * (u1 + u2 * r * d)
    p, q, c = p.flatten(1), q.flatten(1), c.flatten(1)
    if count.numel():  # gradient through the batch statistics, over all ranks' values
        sums = (grad_bias, grad_weight)
        bias_sum, weight_sum = sum_over_ranks(*sums) if synchronize else sums
        a, count = a.view(-1), count.clamp(min=1)
        q = q - a * rstd * weight_sum / count
        c = c - a * (bias_sum + (m - mu) * rstd * weight_sum) / count

    q, c, p = q[:, :, None, None], c[:, :, None, None], p[:, :, None, None]
    grad_x = _cast(centered.mul_(q).add_(c).addcmul_(compute_grad, p), x.dtype)
    return (
        grad_x,
        grad_residual,
        torch.cat([grad_weight, grad_bias, grad_group_weight, grad_group_bias]),
    )


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    return _moments(x)[:2]


def standardize_forward(
    weights: List[Tensor], eps: List[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """See :mod:`.weight_standardization`."""
    outputs, means, rstds = [], [], []
    for weight, e in zip(weights, eps):
        # Batch normalization of a batch of one, whose channels are the filters, is the formula.
        filters = weight.to(_compute_dtype(weight)).flatten(1).unsqueeze(0)
        out, mean, rstd = torch.native_batch_norm(filters, None, None, None, None, True, 0.0, e)
        outputs.append(_like(out.view(weight.shape).to(dtype), weight))
        means.append(mean)
        rstds.append(rstd)
    return outputs, torch.cat(means), torch.cat(rstds)


def standardize_backward(
    grads: List[Tensor], weights: List[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """See :mod:`.weight_standardization`."""
    sizes = [weight.shape[0] for weight in weights]
    outputs = []
    for grad, weight, m, r in zip(grads, weights, mean.split(sizes), rstd.split(sizes)):
        filters = weight.to(m.dtype).flatten(1).unsqueeze(0)
        grad = grad.to(m.dtype).flatten(1).unsqueeze(0)
        out, _, _ = torch.ops.aten.native_batch_norm_backward(
            grad, filters, None, None, None, m, r, True, 0.0, [True, False, False]
        )
        outputs.append(_like(out.view(weight.shape).to(weight.dtype), weight))
    return outputs


def _moments(x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each image and channel, (N, C), and x minus its mean.

    The variance is taken around the mean itself, so it does not cancel however far the data is
    from zero.
    """
    x = x.to(_compute_dtype(x))
    mean = x.mean(dim=(2, 3)) if x.numel() else x.new_zeros(x.shape[:2])
    centered = x - mean[:, :, None, None]
    # The norm reads its operand once; a sum of squares would be written before it is summed.
    square_sum = torch.linalg.vector_norm(centered, dim=(2, 3)).square()
    return mean, square_sum / max(x.shape[2] * x.shape[3], 1), centered


def _scale_shift_(centered: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * centered + shift`` in place; the tables have shape (N, C)."""
    return centered.mul_(scale[:, :, None, None]).add_(shift[:, :, None, None])


def _grouped(table: Tensor, groups: int) -> Tensor:
    """(N, C) -> (N, G, C / G)."""
    return table.view(table.shape[0], groups, table.shape[1] // groups)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(x: Tensor, reference: Tensor) -> Tensor:
    """x in the memory format of a convolution's weight."""
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over H and W, (N, C).

    Batched dot products read both operands once, without a temporary, where the memory layout
    allows. Autocast would run them in half precision, so it is switched off.
    """
    if a.device.type in ("cpu", "cuda") and a.is_contiguous() and b.is_contiguous():
        with torch.autocast(a.device.type, enabled=False):
            return torch.einsum("nchw,nchw->nc", a, b)
    return (a * b).sum(dim=(2, 3))
