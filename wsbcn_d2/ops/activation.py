"""The activation functions that can be part of batch-channel normalization, in plain PyTorch.

Kernels in C and Triton have their own forms of them.
"""

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By name, the functions and the classes of modules that compute it.
_ACTIVATIONS = {"relu": (F.relu, F.relu_, torch.relu, torch.relu_, nn.ReLU)}


def name_of_activation(activation: Optional[Callable[[Tensor], Tensor]]) -> Optional[str]:
    """The name by which the operation knows an activation function: "" for None, and None for one
    that cannot be part of it."""
    if activation is None:
        return ""
    kind = type(activation) if isinstance(activation, nn.Module) else activation
    return next((name for name, kinds in _ACTIVATIONS.items() if kind in kinds), None)


def activate_(x: Tensor, activation: str) -> Tensor:
    """An activation function by its name, in place; "" is none."""
    return x.relu_() if activation == "relu" else x


def let_through(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient of the input of an activation function, from that of its output.

    ``y`` is the output, or the input: ReLU lets through the same where either is positive.
    """
    # One pass, which a product with (y > 0) is not.
    return torch.ops.aten.threshold_backward(grad, y, 0) if activation == "relu" else grad
