"""One normalization together with the addition and ReLU after it, as one call where possible.

:mod:`wsbcn_d2.modeling.fuse` is about whole blocks and heads.
"""

from typing import Callable, Optional

from torch import Tensor, nn

from ..ops import all_modules_are_hooked, name_of_activation
from .batch_channel_norm import BatchChannelNorm


def normalize(
    x: Tensor,
    norm: Optional[nn.Module],
    residual: Optional[Tensor] = None,
    activation: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """``activation(norm(x) + residual)``; any of the three may be missing.

    :class:`BatchChannelNorm` computes all of it at once, with the activations that it knows, unless
    a hook listens to its output.
    """
    name = fusible_activation(activation)
    if norm is not None:
        # A subclass may take the input alone.
        ours = type(norm).forward is BatchChannelNorm.forward
        if ours and not is_hooked(norm) and name is not None:
            return norm(x, residual=residual, activation=name)
        x = norm(x)
    if residual is not None:
        x = x + residual
    if activation is not None:
        x = activation(x)
    return x


def fusible_activation(activation: Optional[Callable[[Tensor], Tensor]]) -> Optional[str]:
    """The name of an activation that normalization can compute ("" for None); None for others, and
    where something listens to it."""
    if isinstance(activation, nn.Module) and is_hooked(activation):
        return None
    return name_of_activation(activation)


def is_hooked(module: nn.Module) -> bool:
    """Whether something wants to see the inputs or outputs of a module, or of all modules, or has
    replaced what the module does."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or all_modules_are_hooked()
    )
