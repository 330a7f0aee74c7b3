"""Gives Detectron2's blocks and heads with BCN the faster classes of this folder.

:mod:`wsbcn_d2.layers.fusion` is about one normalization and the ReLU after it.
"""

from typing import Dict, Type

from torch import nn

from ..layers import BatchChannelNorm
from .blocks import BLOCKS
from .heads import HEADS

_FUSED: Dict[Type[nn.Module], Type[nn.Module]] = {**BLOCKS, **HEADS}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


def fuse_(module: nn.Module) -> None:
    """Turns a stock block or head with BCN into that of this package, in place, and one that has no
    BCN any more back. Other modules stay as they are.

    The object stays the same and only its class changes, to one derived from it, or that it was
    derived from. Other subclasses, such as the deformable bottleneck, are left alone.
    """
    if type(module) in _FUSED or type(module) in _STOCK:
        has_bcn = any(isinstance(m, BatchChannelNorm) for m in module.modules())
        classes = _FUSED if has_bcn else _STOCK
        module.__class__ = classes.get(type(module), type(module))
