"""Batch statistics and running estimates: tables of shape (C,), the same for every backend."""

import math
from typing import Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .normalization import Normalization


def several_ranks() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def update_estimates(
    norm: Normalization,
    mean: Tensor,
    var: Tensor,
    rate: Union[float, Tensor],
    count: Union[float, Tensor],
) -> None:
    """Moves the estimates towards the statistics of a batch, in place.

    Nothing moves if any estimate would not be finite. The decision stays on the device: asking
    the host for it would stall a GPU at every layer.

    Args:
        norm: with the estimates and the counters.
        mean, var: (C,).
        rate: fraction of the way.
        count: number of values behind the statistics of each channel, a number or a scalar.
    """
    new_mean = torch.lerp(norm.running_mean, mean.to(norm.running_mean.dtype), rate)
    new_var = torch.lerp(norm.running_var, var.to(norm.running_var.dtype), rate)
    finite = torch.stack([new_mean, new_var]).abs_().amax() < math.inf
    norm.running_mean.copy_(torch.where(finite, new_mean, norm.running_mean))
    norm.running_var.copy_(torch.where(finite, new_var, norm.running_var))
    if norm.skipped_updates is not None:
        norm.skipped_updates.add_(finite.logical_not())
    if norm.seen_elements is not None:
        norm.seen_elements.add_(finite * count)


def pool_images(m: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of a batch, (C,), from those of its images, (N, C).

    They are 0 without images.
    """
    if not m.shape[0]:
        return m.new_zeros(m.shape[1]), v.new_zeros(m.shape[1])
    mean = m.mean(dim=0)
    return mean, (v + (m - mean).square()).mean(dim=0)


def use_batch(
    norm: Normalization, mean: Tensor, var: Tensor, values: int, count: Tensor
) -> Tuple[Tensor, Tensor]:
    """The statistics to normalize a batch by, towards which the estimates move.

    By the rules of :class:`torch.nn.BatchNorm2d`: the estimate of the variance is unbiased, and an
    empty batch changes nothing.

    Args:
        norm: with the estimates, how they move, and whether ranks are synchronized.
        mean, var: (C,), of this rank's batch; var is biased.
        values: number of values behind each of them, which may be 0.
        count: (1,), where that number is written, of all ranks if they are synchronized.

    Returns:
        Mean and biased variance, (C,).
    """
    count.fill_(values)
    if norm.synchronize:
        mean, var, total = pool_over_ranks(mean, var, count)
        count.copy_(total)
    if norm.update_rate is not None:
        # With several ranks the number is known to the device only.
        total = count.squeeze(0).clamp(min=1)
        unbiased = var * (total / (total - 1).clamp(min=1))
        rate = norm.update_rate * (count.squeeze(0) > 0).to(mean.dtype)
        update_estimates(norm, mean, unbiased, rate, count.squeeze(0))
    return mean, var


def pool_over_ranks(mean: Tensor, var: Tensor, count: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Statistics of the batches of all ranks together.

    Every rank must call. Ranks whose batch is empty count for nothing.

    Args:
        mean, var: (C,), of this rank's batch; var is biased.
        count: (1,), the number of values behind each of them.

    Returns:
        The same of the union of all batches.
    """
    channels = mean.numel()
    local = torch.cat([mean, var, count])
    world = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(world, local)
    means, variances, counts = torch.stack(world).split([channels, channels, 1], dim=1)
    count = counts.sum(dim=0)
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(dim=0)
    var = (share * (variances + (means - mean).square())).sum(dim=0)
    return mean, var, count


def gradient_of_statistics(
    a: Tensor,
    rstd: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    count: Tensor,
    synchronize: bool,
) -> Tuple[Tensor, Tensor]:
    """What the gradient of x loses through the statistics of the batch.

    Args:
        a, rstd, grad_weight, grad_bias: (C,); ``a`` is ``weight * rstd``.
        count: (1,), the number of values behind the statistics, of all ranks.
        synchronize: the gradients are to be summed over all ranks. Every rank must call.

    Returns:
        q, c: (C,). The gradient of x is less by ``q (x - mu) + c``.
    """
    if synchronize:
        sums = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(sums)
        grad_weight, grad_bias = sums
    a = a / count.clamp(min=1)
    return a * rstd * grad_weight, a * grad_bias
