"""Warns where feature levels share a BCN layer that has one set of estimates for all of them.

:mod:`wsbcn_d2.levels` mends that. It works whoever trains, and without hooks on modules. From its
first call in training until a backward pass comes by, a layer looks at the sizes of its inputs: if
they differ, it is called for several levels. Afterwards it looks no more.
"""

import inspect
import logging
from typing import TYPE_CHECKING, Tuple

from torch import Tensor, nn

from ..ops import is_plain

if TYPE_CHECKING:
    from .batch_channel_norm import BatchChannelNorm

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is


def notice_levels(layer: "BatchChannelNorm", x: Tensor, y: Tensor) -> None:
    """Looks at a call of a layer, and warns, once for a model, if there was one for another level.

    Args:
        layer: in training mode, with ``first_size`` not None.
        x, y: (N, C, H, W), its input and its output.
    """
    # The weights of a replica of DataParallel are no leaves; the replica is gone after the pass.
    if layer.frozen or not (y.requires_grad and layer.weight.is_leaf and is_plain(x)):
        return
    size = tuple(x.shape[2:])
    if layer.first_size in ((), size):
        layer.first_size = size
        y.register_hook(lambda grad: setattr(layer, "first_size", None))
        return
    first, (root, name) = layer.first_size, _root_of(layer)
    for module in root.modules():
        if isinstance(module, type(layer)):
            module.first_size = None
    logger.warning(
        f"{name} is called for inputs of several sizes ({first} and {size}) before one "
        "backward pass, and has one set of estimates for all of them, which evaluation finds as "
        "the last one left it. If these are the levels of a feature pyramid, call "
        "wsbcn_d2.separate_levels(HEAD, NUM_LEVELS) for the head that has this layer, before "
        "training. Other layers of the model are not looked at any more"
    )


def _root_of(layer: nn.Module) -> Tuple[nn.Module, str]:
    """The outermost module that is being called, and the name of the layer in it."""
    root, frame = layer, inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module.__call__.__code__:
            root = frame.f_locals["self"]
        frame = frame.f_back
    names = (name for name, module in root.named_modules() if module is layer)
    return root, next(names, "") or type(layer).__name__
