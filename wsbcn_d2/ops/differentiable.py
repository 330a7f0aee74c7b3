"""Gradients by differentiable operations, in the backward pass of an operation: for second
derivatives, and for many gradients at once (``is_grads_batched``)."""

from typing import Any, List, Optional, Sequence, cast

import torch
from torch import Tensor


def aliases(*tensors: Optional[Tensor]) -> List[Any]:
    """The same tensors as places in the graph of their own, so that gradients end there even where
    one has been made of another; None for None."""
    return [None if t is None else t.view_as(t) for t in tensors]


def gradients_of(
    y: Tensor,
    inputs: Sequence[Optional[Tensor]],
    needed: Sequence[bool],
    grad: Tensor,
    create_graph: bool,
) -> List[Optional[Tensor]]:
    """Gradients of those inputs of ``y`` that need one, by the graph of ``y``; None for others."""
    if not any(needed):
        return [None] * len(needed)
    wanted = [cast(Tensor, t) for t, is_needed in zip(inputs, needed) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return [next(found) if is_needed else None for is_needed in needed]
