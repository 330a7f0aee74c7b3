"""The kernels in plain PyTorch, for any device.

Everything is computed in at least float32, whatever the dtype of the activation; tables have that
compute dtype. Temporaries of the size of the activation are reused in place: on CPU the first touch
of a new one costs more than the arithmetic on it.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .estimates import pool_images, sum_over_ranks, update_estimates, use_batch
from .memory_format import dense, in_format_of
from .tables import new_tables, split_tables

# The backward pass needs the output of a fused ReLU, which costs no memory: what follows, in
# general a convolution, saves it as well.
SAVES_OUTPUT_OF_RELU = True


def for_extension() -> Tuple[Any, ...]:
    """See :file:`extension.cpp`: there is nothing that it could call."""
    return ()


# Up to so many pixels, and values in all, a product and a sum take less time than a dot product
# for each row.
_SHORT_ROW = 600
_FEW_VALUES = 1_000_000


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
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    images, channels = x.shape[:2]
    groups = group_weight.numel()
    tables = new_tables(x, groups, use_batch_statistics)
    mu, rstd, m, v, d, scale, shift, r, count = split_tables(tables, images, channels, groups)
    centered = _moments(x, m, v)
    values = images * x.shape[2] * x.shape[3]
    running, counters = (running_mean, running_var), (skipped_updates, seen_elements)
    if use_batch_statistics:
        batch = pool_images(m, v)
        mean, s2 = use_batch(*batch, values, count, *running, update_rate, *counters, synchronize)
    else:
        if update_rate is not None and values:
            offset = m - running_mean
            around_old = torch.addcmul(v, offset, offset)
            batch = (m.mean(dim=0), around_old.mean(dim=0)) if images > 1 else (m[0], around_old[0])
            update_estimates(*running, *batch, float(update_rate), values, *counters)
        mean, s2 = running_mean, _cast(running_var, m.dtype)
    mu.copy_(mean)

    # (N, C) tables, and their views (N, G, C / G)
    by_group = (images, groups, channels // groups)
    torch.add(s2, eps, out=rstd).rsqrt_()
    a = _cast(weight, m.dtype) * rstd
    z = torch.addcmul(_cast(bias, m.dtype), a, m - mu).view(by_group)
    d_by_group = torch.sub(z, z.mean(dim=2, keepdim=True), out=d.view(by_group))
    z_var = (a * a * v).view(by_group)
    r = r.view(images, groups, 1)
    torch.mean(torch.addcmul(z_var, d_by_group, d_by_group), dim=2, keepdim=True, out=r)
    k = _cast(group_weight, m.dtype).view(groups, 1) * r.add_(eps).rsqrt_()
    torch.mul(k, a.view(by_group[1:]), out=scale.view(by_group))
    group_bias = _cast(group_bias, m.dtype).view(groups, 1)
    torch.addcmul(group_bias, k, d_by_group, out=shift.view(by_group))

    return _applied(centered, scale, shift, residual, relu, x.dtype), tables


def batch_channel_norm_again(x: Tensor, tables: Tensor, groups: int, relu: bool) -> Tensor:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    split = split_tables(tables, x.shape[0], x.shape[1], groups)
    centered = x.to(tables.dtype) - _planes(split.m)
    return _applied(centered, split.scale, split.shift, None, relu, x.dtype)


def batch_channel_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    tables: Tensor,
    relu: bool,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    if relu:
        grad = torch.ops.aten.threshold_backward(in_format_of(x, grad), y, 0)
    grad_residual = grad if has_residual and relu else None
    images, channels = x.shape[:2]
    groups = group_weight.numel()
    mu, rstd, m, v, d, p, _, r, count = split_tables(tables, images, channels, groups)
    by_group = (images, groups, channels // groups)
    pixels = x.shape[2] * x.shape[3]
    size = max(by_group[2] * pixels, 1)

    centered = x.to(m.dtype) - _planes(m)
    compute_grad = _cast(grad, m.dtype)
    s1, s2 = compute_grad.sum(dim=(2, 3)), _dot(compute_grad, centered)

    # From here on (N, G, 1), (N, G, C / G) and, for what all images share, (G, 1), (G, C / G).
    offset = (m - mu).view(by_group)
    s1, s2, v, d, p = (table.view(by_group) for table in (s1, s2, v, d, p))
    r = r.view(images, groups, 1)
    k = _cast(group_weight, m.dtype).view(groups, 1) * r
    a = (_cast(weight, m.dtype) * rstd).view(by_group[1:])
    rstd = rstd.view(by_group[1:])
    u1 = s1.sum(dim=2, keepdim=True)  # times size, as is u2
    u2 = torch.addcmul(a * s2, d, s1).sum(dim=2, keepdim=True).mul_(r)

    # dz = k (dy + fa t + h), dx = p (dy + fa t + h)
    f = u2.mul(r).div_(-size)
    h = torch.addcmul(u1.div(-size), f, d)
    fa = f * a
    dz_sum = torch.add(s1, h, alpha=pixels).mul_(k)
    dz_t_sum = torch.addcmul(s2, fa, v, value=pixels).mul_(k)
    # sum of dz (x - mu): the gradient of `a`, which is weight times rstd
    grad_weight = _sum_images(dz_t_sum.addcmul_(offset, dz_sum)) * rstd
    grad_bias = _sum_images(dz_sum)

    q, c = fa.mul_(p), h.mul_(p)
    if count.numel():  # gradient through the batch statistics, over all ranks' values
        sums = (grad_bias, grad_weight)
        bias_sum, weight_sum = sum_over_ranks(*sums) if synchronize else sums
        count = count.clamp(min=1)
        q = q - a * rstd * weight_sum / count
        c = c - a * (bias_sum + offset * rstd * weight_sum) / count

    p, q, c = (table.reshape(images, channels, 1, 1) for table in (p, q, c))
    grad_x = centered.mul_(q).add_(c).addcmul_(compute_grad, p)
    parameters = (grad_weight, grad_bias, _sum_images(u2), _sum_images(u1))
    flat = torch.cat([table.reshape(-1) for table in parameters])
    return _cast(grad_x, x.dtype), grad_residual, flat


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    mean, var = x.new_empty((2, *x.shape[:2]), dtype=_compute_dtype(x))
    _moments(x, mean, var)
    return mean, var


def standardize_forward(
    weights: Sequence[Tensor], eps: Sequence[float], dtype: torch.dtype
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """See :mod:`.weight_standardization`."""
    outputs, means, rstds = [], [], []
    for weight, e in zip(weights, eps):
        # Layer normalization of the filters is the formula, and of the operations that are on a CPU
        # the fastest.
        filters = weight.to(_compute_dtype(weight)).flatten(1)
        out, mean, rstd = torch.native_layer_norm(filters, filters.shape[1:], None, None, e)
        outputs.append(_like(out.view(weight.shape).to(dtype), weight))
        means.append(mean.flatten())
        rstds.append(rstd.flatten())
    return outputs, torch.cat(means), torch.cat(rstds)


def standardize_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> List[Tensor]:
    """See :mod:`.weight_standardization`."""
    sizes = [weight.shape[0] for weight in weights]
    outputs = []
    for grad, weight, m, r in zip(grads, weights, mean.split(sizes), rstd.split(sizes)):
        filters, grad = weight.to(m.dtype).flatten(1), grad.to(m.dtype).flatten(1)
        m, r, shape = m.unsqueeze(1), r.unsqueeze(1), filters.shape[1:]
        out, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, filters, shape, m, r, None, None, [True, False, False]
        )
        outputs.append(_like(out.view(weight.shape).to(weight.dtype), weight))
    return outputs


def _applied(
    centered: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The output of the forward pass, in the place of x minus its mean."""
    # One after the other: what does both at once is not vectorized for tables, and takes longer.
    y = centered.mul_(_planes(scale)).add_(_planes(shift))
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = y.relu_()
    return _cast(y, dtype)


def _moments(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Writes the mean and biased variance of each image and channel, (N, C), and returns x minus
    its mean.

    The variance is taken around the mean itself, so it does not cancel however far the data is
    from zero.
    """
    x = x.to(mean.dtype)
    if x.numel():
        torch.mean(x, dim=(2, 3), out=mean)
    else:
        mean.zero_()
    centered = x - _planes(mean)
    # The norm reads its operand once; a sum of squares would be written before it is summed.
    torch.linalg.vector_norm(centered, dim=(2, 3), out=var)
    var.square_().div_(max(x.shape[2] * x.shape[3], 1))
    return centered


def _planes(table: Tensor) -> Tensor:
    """A table (N, C) so that it broadcasts over H and W."""
    return table.view(*table.shape, 1, 1)


def _sum_images(table: Tensor) -> Tensor:
    return table.sum(dim=0) if table.shape[0] != 1 else table[0]


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
    allows. Autocast would run them in half precision, so it is switched off; a GPU might in TF32.
    """
    quick = a.shape[2] * a.shape[3] <= _SHORT_ROW and a.numel() <= _FEW_VALUES
    known = a.device.type == "cpu" and a.is_contiguous() and b.is_contiguous()
    if known and not quick:
        with torch.autocast("cpu", enabled=False):
            return torch.einsum("nchw,nchw->nc", a, b)
    return (a * b).sum(dim=(2, 3))
