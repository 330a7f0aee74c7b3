r"""Batch-channel normalization as one differentiable operation.

Batch normalization with given statistics (mean ``mu``, variance ``s2`` of each channel) followed
by channel normalization over groups of ``D = C / G`` channels (Qiao et al., arXiv 1903.10520v2,
Algorithm 1 and Eq. 15):

.. math::
    z = \gamma \frac{x - \mu}{\sqrt{s^2 + \epsilon}} + \beta, \qquad
    y = \gamma'_g \frac{z - \mathrm{mean}_g z}{\sqrt{\mathrm{var}_g z + \epsilon}} + \beta'_g

Both are affine in x once the statistics are known, and the group statistics follow from the mean
``m`` and the variance ``v`` of x in each image and channel. With ``t = x - m`` and
``a = gamma / sqrt(s2 + eps)``:

    mean z = a (m - mu) + beta,    var z = a^2 v      (image and channel)
    group mean and variance from those of the D channels;  d = mean z - group mean
    r = 1 / sqrt(group var + eps),   k = gamma'_g r
    y = k a t + (k d + beta'_g)

So the forward pass reads x twice and writes y once, and saves x and tables. For the backward
pass, with ``S1 = sum dy`` and ``S2 = sum dy t`` over H and W, ``M = H W``:

    u1 = sum_{c in g} S1 / (D M),   u2 = sum_{c in g} r (a S2 + d S1) / (D M)
    dz = k (dy - u1 - u2 r (a t + d))

and every other gradient is a sum of dz or dz t over H and W, which again are tables.
"""

from dataclasses import dataclass
from typing import Any, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from . import eager as kernels


@dataclass
class _BatchStatistics:
    """Statistics of one batch, shapes (C,), and the number of values behind each of them."""

    mean: Tensor
    var: Tensor
    count: Tensor  # a scalar tensor, because as a sum over ranks it is known to the device only


@dataclass
class _Estimates:
    """Buffers of the running estimates, updated in place."""

    mean: Tensor
    var: Tensor
    skipped_updates: Optional[Tensor]
    seen_elements: Optional[Tensor]

    def update(
        self, mean: Tensor, var: Tensor, rate: Union[float, Tensor], count: Union[float, Tensor]
    ) -> None:
        """Moves towards (mean, var) of ``count`` values, unless a result would not be finite.

        The decision stays on the device: asking the host for it would stall a GPU at every layer.
        """
        new_mean = self.mean + rate * (mean - self.mean)
        new_var = self.var + rate * (var - self.var)
        finite = torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()
        self.mean.copy_(torch.where(finite, new_mean, self.mean))
        self.var.copy_(torch.where(finite, new_var, self.var))
        if self.skipped_updates is not None:
            self.skipped_updates.add_(~finite)
        if self.seen_elements is not None:
            self.seen_elements.add_(finite * count)


def batch_channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    use_batch_statistics: bool = False,
    update_rate: Optional[float] = None,
    skipped_updates: Optional[Tensor] = None,
    seen_elements: Optional[Tensor] = None,
    process_group: Optional["dist.ProcessGroup"] = None,
) -> Tensor:
    """Batch-channel normalization of an activation.

    Args:
        x: (N, C, H, W), any floating dtype and memory format; N may be 0.
        weight, bias: affine of the batch normalization, (C,).
        group_weight, group_bias: affine of the channel normalization, (G,); G divides C.
        running_mean, running_var: estimates, (C,), at least float32. Updated in place if
            ``update_rate`` is given.
        eps: added to both variances, inside the root.
        use_batch_statistics: False: estimated BCN. The batch is normalized by the estimates after
            their update, without gradient through them, and the new variance is taken around the
            old mean estimate. True: large-batch BCN. The batch is normalized by its own
            statistics, with gradient through them, and the estimate of the variance is unbiased,
            as in :class:`torch.nn.BatchNorm2d`.
        update_rate: fraction by which the estimates move towards the batch; None leaves them.
            A batch that would make any estimate non-finite changes none of them.
        skipped_updates: integer scalar, incremented in place for each such batch.
        seen_elements: scalar, incremented in place by the number of values behind each update,
            which is the weight of this rank when estimates are averaged over ranks.
        process_group: with ``use_batch_statistics``, take the statistics over the batches of all
            its ranks. Every rank must call; ranks whose batch is empty count for nothing.

    Returns:
        Tensor of the shape, dtype and memory format of x.
    """
    return _BatchChannelNorm.apply(
        x,
        weight,
        bias,
        group_weight,
        group_bias,
        running_mean,
        running_var,
        eps,
        use_batch_statistics,
        update_rate,
        skipped_updates,
        seen_elements,
        process_group,
    )


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        group_weight: Tensor,
        group_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        use_batch_statistics: bool,
        update_rate: Optional[float],
        skipped_updates: Optional[Tensor],
        seen_elements: Optional[Tensor],
        process_group: Optional["dist.ProcessGroup"],
    ) -> Tensor:
        estimates = _Estimates(running_mean, running_var, skipped_updates, seen_elements)
        m, v, centered = kernels.moments(x)
        if use_batch_statistics:
            batch = _pooled_statistics(m, v, x, process_group)
            mu, s2, count = batch.mean, batch.var, batch.count.clamp(min=1)
            if update_rate is not None:
                unbiased = s2 * (count / (count - 1).clamp(min=1))
                rate = update_rate * (batch.count > 0).to(mu.dtype)
                estimates.update(mu, unbiased, rate, batch.count)
        else:
            count = None
            if update_rate is not None and x.numel():
                around_old = (v + (m - running_mean).square()).mean(dim=0)
                estimates.update(m.mean(dim=0), around_old, update_rate, x.numel() / x.shape[1])
            mu, s2 = running_mean.to(m.dtype), running_var.to(m.dtype)

        rstd = torch.rsqrt(s2 + eps)
        groups = group_weight.numel()
        a = weight.to(m.dtype) * rstd
        z_mean = a * (m - mu) + bias.to(m.dtype)
        d = _grouped(z_mean, groups)
        d = d - d.mean(dim=2, keepdim=True)
        group_var = (_grouped(a.square() * v, groups) + d.square()).mean(dim=2, keepdim=True)
        r = torch.rsqrt(group_var + eps)
        k = group_weight.to(m.dtype).view(1, groups, 1) * r
        scale = k * a.view(1, groups, -1)
        shift = k * d + group_bias.to(m.dtype).view(1, groups, 1)

        ctx.save_for_backward(x, weight, group_weight, m, v, m - mu, rstd, d, r, count)
        ctx.parameter_dtypes = (weight.dtype, bias.dtype, group_weight.dtype, group_bias.dtype)
        ctx.process_group = process_group
        return kernels.scale_shift(centered, scale.flatten(1), shift.flatten(1), x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, group_weight, m, v, m_minus_mu, rstd, d, r, count = ctx.saved_tensors
        groups = group_weight.numel()
        pixels = x.shape[2] * x.shape[3]
        a = (weight.to(m.dtype) * rstd).view(1, groups, -1)
        v = _grouped(v, groups)

        s1, s2, centered = kernels.grad_sums(grad, x, m)
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
        grad_a = (dz_t_sum + _grouped(m_minus_mu, groups) * dz_sum).sum(dim=0).flatten()
        grad_weight = grad_a * rstd

        p = k * a
        q = -p * u2 * r * a
        c = -p * (u1 + u2 * r * d)
        p, q, c = p.flatten(1), q.flatten(1), c.flatten(1)
        if count is not None:  # gradient through the batch statistics, over all ranks' values
            bias_sum, weight_sum = _all_reduced(grad_bias, grad_weight, ctx.process_group)
            a = a.view(-1)
            q = q - a * rstd * weight_sum / count
            c = c - a * (bias_sum + m_minus_mu * rstd * weight_sum) / count

        grad_x = kernels.grad_input(grad, centered, p, q, c) if ctx.needs_input_grad[0] else None
        parameters = (grad_weight, grad_bias, grad_group_weight, grad_group_bias)
        return (
            grad_x,
            *(g.to(dtype) for g, dtype in zip(parameters, ctx.parameter_dtypes)),
            *[None] * 8,
        )


def _grouped(table: Tensor, groups: int) -> Tensor:
    """(N, C) -> (N, G, C / G)."""
    return table.view(table.shape[0], groups, table.shape[1] // groups)


def _pooled_statistics(
    m: Tensor, v: Tensor, x: Tensor, process_group: Optional["dist.ProcessGroup"]
) -> _BatchStatistics:
    """Statistics of the batch from those of its images, over all ranks of ``process_group``."""
    images, channels = m.shape
    pixels = x.shape[2] * x.shape[3]
    mean = m.mean(dim=0) if images else m.new_zeros(channels)
    var = (v + (m - mean).square()).mean(dim=0) if images else m.new_zeros(channels)
    count = m.new_full((1,), images * pixels)
    if process_group is not None:
        local = torch.cat([mean, var, count])
        world = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(world, local, group=process_group)
        means, variances, counts = torch.stack(world).split([channels, channels, 1], dim=1)
        count = counts.sum(dim=0)
        share = counts / count.clamp(min=1)
        mean = (share * means).sum(dim=0)
        var = (share * (variances + (means - mean).square())).sum(dim=0)
    return _BatchStatistics(mean, var, count.squeeze(0))


def _all_reduced(
    a: Tensor, b: Tensor, process_group: Optional["dist.ProcessGroup"]
) -> Tuple[Tensor, Tensor]:
    if process_group is None:
        return a, b
    both = torch.cat([a, b])
    dist.all_reduce(both, group=process_group)
    return tuple(both.split(a.numel()))
