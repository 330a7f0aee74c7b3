"""The statistics and coefficients that a BCN kernel computes of its input: tables in one tensor.

One tensor is one allocation, one thing to save for the backward pass, and one argument of a kernel.
It holds ``mu`` and ``rstd``, then for each image a row of ``m``, ``v``, ``d``, ``scale``, ``shift``
and ``r``, and last, with the statistics of the batch, ``count``. :mod:`.batch_channel_norm` says
what these are.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """Views of the single tables.

    Attributes:
        mu, rstd: (C,).
        m, v, d, scale, shift: (N, C).
        r: (N, G).
        count: (1,) with the statistics of the batch, else (0,).
    """

    mu: Tensor
    rstd: Tensor
    m: Tensor
    v: Tensor
    d: Tensor
    scale: Tensor
    shift: Tensor
    r: Tensor
    count: Tensor  # type: ignore[assignment]  # instead of the method of tuples


def size_of_tables(images: int, channels: int, groups: int) -> int:
    """The number of values in all tables, without ``count``."""
    return 2 * channels + images * (5 * channels + groups)


def new_tables(x: Tensor, groups: int, use_batch_statistics: bool) -> Tensor:
    """The tensor for all tables of an activation (N, C, H, W), not initialized.

    It is of the compute dtype, at least float32.
    """
    size = size_of_tables(x.shape[0], x.shape[1], groups) + int(use_batch_statistics)
    return x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))


def split_tables(tables: Tensor, images: int, channels: int, groups: int) -> Tables:
    """The single tables in what :func:`new_tables` made."""
    rows = images * (5 * channels + groups)
    sizes = [channels, channels, rows, tables.numel() - 2 * channels - rows]
    mu, rstd, of_images, count = tables.split(sizes)
    of_images = of_images.view(images, 5 * channels + groups)
    m, v, d, scale, shift, r = of_images.split([channels] * 5 + [groups], dim=1)
    return Tables(mu, rstd, m, v, d, scale, shift, r, count)


def uses_batch_statistics(tables: Tensor, x: Tensor, groups: int) -> bool:
    """Whether the tables of an activation have a ``count``."""
    return tables.numel() > size_of_tables(x.shape[0], x.shape[1], groups)
