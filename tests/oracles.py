"""The formulas of the paper, written one after the other in float64, with autograd for gradients.

Independent of the package: every mean and variance is a pass over the data.
"""

from dataclasses import dataclass

import torch


def channel_norm(z, group_weight, group_bias, eps):
    n, c, h, w = z.shape
    groups = group_weight.numel()
    z = z.reshape(n, groups, -1)
    mean = z.mean(2, keepdim=True)
    var = ((z - mean) ** 2).mean(2, keepdim=True)
    y = group_weight.view(1, -1, 1) * (z - mean) / torch.sqrt(var + eps) + group_bias.view(1, -1, 1)
    return y.reshape(n, c, h, w)


def _column(v):
    return v.view(1, -1, 1, 1)


@dataclass
class BCNResult:
    y: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor


def estimated_bcn(x, weight, bias, group_weight, group_bias, mean, var, rate, eps=1e-5):
    """Estimated BCN; `rate` None for evaluation."""
    if rate is not None:
        with torch.no_grad():
            batch_mean = x.mean((0, 2, 3))
            batch_var = ((x - _column(mean)) ** 2).mean((0, 2, 3))
            mean = mean + rate * (batch_mean - mean)
            var = var + rate * (batch_var - var)
    z = _column(weight) * (x - _column(mean)) / torch.sqrt(_column(var) + eps) + _column(bias)
    return BCNResult(channel_norm(z, group_weight, group_bias, eps), mean, var)


def large_batch_bcn(x, weight, bias, group_weight, group_bias, mean, var, rate, eps=1e-5):
    """Large-batch BCN in training."""
    batch_mean = x.mean((0, 2, 3))
    batch_var = ((x - _column(batch_mean)) ** 2).mean((0, 2, 3))
    z = _column(weight) * (x - _column(batch_mean)) / torch.sqrt(_column(batch_var) + eps)
    y = channel_norm(z + _column(bias), group_weight, group_bias, eps)
    count = x.numel() / x.shape[1]
    with torch.no_grad():
        mean = mean + rate * (batch_mean - mean)
        var = var + rate * (batch_var * count / (count - 1) - var)
    return BCNResult(y, mean, var)


def standardized_weight(weight, eps=1e-5):
    flat = weight.reshape(weight.shape[0], -1)
    mean = flat.mean(1, keepdim=True)
    var = ((flat - mean) ** 2).mean(1, keepdim=True)
    return ((flat - mean) / torch.sqrt(var + eps)).reshape(weight.shape)
