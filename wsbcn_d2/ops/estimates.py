"""Batch statistics and running estimates: tables of shape (C,), the same for every backend."""

import math
from typing import Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor


def update_estimates(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    rate: Union[float, Tensor],
    count: Union[float, Tensor],
    skipped_updates: Optional[Tensor],
    seen_elements: Optional[Tensor],
) -> None:
    """Moves the estimates towards the statistics of a batch, in place.

    Nothing moves if any estimate would not be finite. The decision stays on the device: asking
    the host for it would stall a GPU at every layer.

    Args:
        running_mean, running_var, mean, var: (C,).
        rate: fraction of the way.
        count: number of values behind the statistics of each channel.
        skipped_updates: integer scalar, incremented if nothing moves.
        seen_elements: scalar, incremented by ``count`` otherwise.
    """
    if mean.dtype != running_mean.dtype:
        mean, var = mean.to(running_mean.dtype), var.to(running_mean.dtype)
    new_mean = torch.lerp(running_mean, mean, rate)
    new_var = torch.lerp(running_var, var, rate)
    finite = torch.stack([new_mean, new_var]).abs_().amax() < math.inf
    if finite.device.type == "cpu":  # where asking stalls nothing
        if finite:
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
            if seen_elements is not None:
                seen_elements.add_(count)
        elif skipped_updates is not None:
            skipped_updates.add_(1)
        return
    running_mean.copy_(torch.where(finite, new_mean, running_mean))
    running_var.copy_(torch.where(finite, new_var, running_var))
    if skipped_updates is not None:
        skipped_updates.add_(finite.logical_not())
    if seen_elements is not None:
        seen_elements.add_(finite * count)


def update_with_batch(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    rate: float,
    count: Union[float, Tensor],
    skipped_updates: Optional[Tensor],
    seen_elements: Optional[Tensor],
) -> None:
    """As :func:`update_estimates`, by the rules of :class:`torch.nn.BatchNorm2d`.

    The estimate of the variance is unbiased, and an empty batch changes nothing. ``count`` is a
    tensor if it is known to the device only, for which there are more operations.
    """
    if isinstance(count, Tensor):
        at_least_one = count.clamp(min=1)
        unbiased = var * (at_least_one / (at_least_one - 1).clamp(min=1))
        rate = rate * (count > 0).to(mean.dtype)
    elif count:
        unbiased = var * (count / max(count - 1, 1))
    else:
        return
    update_estimates(
        running_mean, running_var, mean, unbiased, rate, count, skipped_updates, seen_elements
    )


def pool_images(m: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of a batch, (C,), from those of its images, (N, C).

    They are 0 without images.
    """
    if not m.shape[0]:
        return m.new_zeros(m.shape[1]), v.new_zeros(m.shape[1])
    mean = m.mean(dim=0)
    return mean, (v + (m - mean).square()).mean(dim=0)


def use_batch(
    mean: Tensor,
    var: Tensor,
    values: int,
    count: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rate: Union[float, Tensor, None],
    skipped_updates: Optional[Tensor],
    seen_elements: Optional[Tensor],
    synchronize: bool,
) -> Tuple[Tensor, Tensor]:
    """The statistics to normalize a batch by, towards which the estimates move.

    Args:
        mean, var: (C,), of this rank's batch; var is biased.
        values: number of values behind each of them, which may be 0.
        count: (1,), where that number is written, of all ranks if they are synchronized.
        rate: fraction of the way; None leaves the estimates.
        synchronize: take the batches of all ranks together. Every rank must call.

    Returns:
        Mean and biased variance, (C,).
    """
    count.fill_(values)
    if synchronize:
        mean, var, total = pool_over_ranks(mean, var, count)
        count.copy_(total)
    if rate is not None:
        of_all = count.squeeze(0) if synchronize else values
        counters = (skipped_updates, seen_elements)
        update_with_batch(running_mean, running_var, mean, var, float(rate), of_all, *counters)
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


def sum_over_ranks(a: Tensor, b: Tensor) -> Tuple[Tensor, Tensor]:
    """Sums of two tensors of the same shape over all ranks, with one collective."""
    both = torch.stack([a, b])
    dist.all_reduce(both)
    return both[0], both[1]
