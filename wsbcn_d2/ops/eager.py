"""The kernels in plain PyTorch, for any device.

Everything is computed in at least float32, whatever the dtype of the activation; tables have that
compute dtype. Temporaries of the size of the activation are reused in place: on CPU the first touch
of a new one costs more than the arithmetic on it.
"""

from typing import Any, Optional, Tuple, cast

import torch
from torch import Tensor

from .activation import activate_, let_through
from .estimates import gradient_of_statistics, pool_images, update_estimates, use_batch
from .memory_format import dense, in_format_of
from .normalization import Normalization
from .tables import new_tables, split_tables

# The backward pass needs the output of a fused activation, which costs no memory: what follows, in
# general a convolution, saves it as well.
SAVES_ACTIVATED_OUTPUT = True


def forward(
    x: Tensor, norm: Normalization, residual: Optional[Tensor], activation: str
) -> Tuple[Tensor, Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    images, channels = x.shape[:2]
    groups = norm.group_weight.numel()
    tables = new_tables(x, groups, norm.use_batch_statistics)
    mu, rstd, m, v, d, scale, shift, r, count = split_tables(tables, images, channels, groups)
    centered = _moments(x, m, v)
    values = images * x.shape[2] * x.shape[3]
    if norm.use_batch_statistics:
        mean, s2 = use_batch(norm, *pool_images(m, v), values, count)
    else:
        if norm.update_rate is not None and values:
            around_old = v + (m - norm.running_mean).square()
            update_estimates(norm, m.mean(0), around_old.mean(0), norm.update_rate, values)
        mean, s2 = norm.running_mean, norm.running_var
    mu.copy_(mean)
    torch.rsqrt(s2.to(m.dtype) + norm.eps, out=rstd)

    # (N, C) tables, and their views (N, G, C / G)
    by_group = (images, groups, channels // groups)
    a = norm.weight.to(m.dtype) * rstd
    z = (a * (m - mu) + norm.bias.to(m.dtype)).view(by_group)
    d.copy_((z - z.mean(2, keepdim=True)).flatten(1))
    z_var = ((a * a * v).view(by_group) + d.view(by_group).square()).mean(2)
    torch.rsqrt(z_var + norm.eps, out=r)
    k = _of_channels(norm.group_weight.to(m.dtype) * r, by_group)
    torch.mul(k, a, out=scale)
    group_bias = _of_channels(norm.group_bias.to(m.dtype), by_group)
    torch.add(k * d, group_bias, out=shift)
    return _applied(centered, scale, shift, residual, activation, x.dtype), tables


def again(x: Tensor, tables: Tensor, groups: int, activation: str) -> Tensor:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    split = split_tables(tables, x.shape[0], x.shape[1], groups)
    centered = x.to(tables.dtype) - _planes(split.m)
    return _applied(centered, split.scale, split.shift, None, activation, x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    tables: Tensor,
    *,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    activation: str,
    has_residual: bool,
    synchronize: bool,
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """See :mod:`.batch_channel_norm`."""
    x = dense(x)
    if activation:
        grad = let_through(in_format_of(x, grad), cast(Tensor, y), activation)
    grad_residual = grad if has_residual and activation else None
    images, channels = x.shape[:2]
    groups = group_weight.numel()
    mu, rstd, m, v, d, p, _, r, count = split_tables(tables, images, channels, groups)
    by_group = (images, groups, channels // groups)
    pixels = x.shape[2] * x.shape[3]
    size = max(by_group[2] * pixels, 1)

    centered = x.to(m.dtype) - _planes(m)
    compute_grad = grad.to(m.dtype)
    s1, s2 = compute_grad.sum(dim=(2, 3)), (compute_grad * centered).sum(dim=(2, 3))

    # dz = k (dy + fa t + h), dx = p (dy + fa t + h)
    a = weight.to(m.dtype) * rstd
    u1 = s1.view(by_group).sum(2)  # times size, as is u2
    u2 = (a * s2 + d * s1).view(by_group).sum(2) * r
    f = _of_channels(-u2 * r / size, by_group)
    h = f * d - _of_channels(u1 / size, by_group)
    k = _of_channels(group_weight.to(m.dtype) * r, by_group)
    dz_sum = k * (s1 + h * pixels)
    dz_t_sum = k * (s2 + f * a * v * pixels)
    # sum of dz (x - mu): the gradient of `a`, which is weight times rstd
    grad_weight = (dz_t_sum + (m - mu) * dz_sum).sum(0) * rstd
    grad_bias = dz_sum.sum(0)

    q, c = f * a * p, h * p
    if count.numel():  # gradient through the batch statistics, over all ranks' values
        less_q, less_c = gradient_of_statistics(a, rstd, grad_weight, grad_bias, count, synchronize)
        q, c = q - less_q, c - less_c - (m - mu) * less_q

    grad_x = centered.mul_(_planes(q)).add_(_planes(c)).addcmul_(compute_grad, _planes(p))
    parameters = torch.cat([grad_weight, grad_bias, u2.sum(0), u1.sum(0)])
    return grad_x.to(x.dtype), grad_residual, parameters


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """See :func:`.batch_channel_norm.moments`."""
    mean, var = x.new_empty((2, *x.shape[:2]), dtype=torch.promote_types(x.dtype, torch.float32))
    _moments(x, mean, var)
    return mean, var


def standardize(weight: Tensor, eps: float) -> Tuple[Tensor, Any]:
    """See :mod:`.standardized_convolution`."""
    x = _rows(weight.to(torch.promote_types(weight.dtype, torch.float32)), weight)
    filters, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
    return _like(filters, weight), (mean, rstd)


def standardize_backward(grad: Tensor, weight: Tensor, statistics: Any) -> Tensor:
    """See :mod:`.standardized_convolution`."""
    mean, rstd = statistics
    grad, x = (_rows(t.to(mean.dtype), weight) for t in (grad, weight))
    out, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, rstd, None, None, [True, False, False]
    )
    return _like(out, weight)


def _applied(
    centered: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The output of the forward pass, in the place of x minus its mean."""
    # One after the other: what does both at once is not vectorized for tables, and takes longer.
    y = centered.mul_(_planes(scale)).add_(_planes(shift))
    if residual is not None:
        y = y.add_(residual)
    return activate_(y, activation).to(dtype)


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


def _of_channels(table: Tensor, by_group: Tuple[int, int, int]) -> Tensor:
    """A table (N, G) or (G,), once for each channel of a group."""
    return table.unsqueeze(-1).expand(*table.shape, by_group[2]).flatten(-2)


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _rows(filters: Tensor, weight: Tensor) -> Tensor:
    """Each filter as a row, in the order in which those of a weight lie in memory."""
    if _is_channels_last(weight):
        filters = filters.permute(0, 2, 3, 1)
    return filters.flatten(1)


def _like(filters: Tensor, weight: Tensor) -> Tensor:
    """The inverse: rows in the shape and memory format of a weight."""
    if _is_channels_last(weight):
        outputs, inputs, height, width = weight.shape
        return filters.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return filters.view(weight.shape)
