"""Backward passes that cannot be differentiated themselves."""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from .state import is_compiling

Gradients = Tuple[Optional[Tensor], ...]


def once_differentiable(
    backward: Callable[[Any, Tensor], Gradients]
) -> Callable[[Any, Tensor], Gradients]:
    """A backward pass whose results raise a RuntimeError where they are differentiated.

    What PyTorch has for this takes the results for constants if the gradient that comes in is one,
    as it is for the penalty ``torch.autograd.grad(y.sum(), x, create_graph=True)``, and that would
    have no effect, silently.
    """

    def constant(ctx: Any, grad: Tensor, _: Tensor) -> Gradients:
        return backward(ctx, grad)

    refusing = torch.autograd.function.once_differentiable(constant)

    def once(ctx: Any, grad: Tensor) -> Gradients:
        # Without a second derivative to be refused there is nothing to watch over. Nor is there
        # while torch.compile traces, which refuses it itself.
        if torch.is_grad_enabled() and not is_compiling():
            return refusing(ctx, grad, torch.empty(0, requires_grad=True))
        return backward(ctx, grad)

    return once
