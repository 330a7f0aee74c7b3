"""The only file that reaches into Detectron2: what :func:`register` changes, and why.

1. The code of ``detectron2.layers.get_norm``. Its table of names is a local variable, and more
   than a dozen modules, of Detectron2 and of projects, hold the function itself, having imported
   it by name. Replacing the attribute of one module, or of all present ones, would miss some of
   them; exchanging the code of the one function object reaches all, imported before or after.

2. A hook of PyTorch, called whenever a module becomes part of another. It is where a norm layer
   that asks for weight standardization meets the convolution that feeds it, whoever builds the
   model: configs, LazyConfig, DefaultPredictor or other code. The convolution changes its class
   and stays the same object, since FPN and others keep theirs in plain lists as well. The same
   hook gives norm layers that RetinaNet's and FCOS's heads share between feature levels one set
   of estimates a level, as Detectron2 does for the literal options "BN" and "SyncBN" only, and
   gives residual blocks and heads with BCN, which are complete when they join, their fused class.

3. The backbones of :mod:`wsbcn_d2.modeling` in Detectron2's BACKBONE_REGISTRY.
"""

from types import CodeType, FrameType
from typing import Any, Optional

from detectron2.layers import CycleBatchNormList
from detectron2.layers import get_norm as detectron2_get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.vit import ResBottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .layers import BatchChannelNorm, is_convolution, standardize_
from .modeling import BACKBONES, fuse_
from .norm_options import NormOption, get_norm, weight_standardization_request

# The layers that RetinaNetHead itself cycles through the levels, if their option is bare.
CYCLED = (nn.BatchNorm2d, nn.SyncBatchNorm)

_stock_code: Optional[CodeType] = None
_handle: Optional[RemovableHandle] = None


def register() -> None:
    """Makes the norm options and backbones of this package known to Detectron2.

    Importing :mod:`wsbcn_d2` does it; doing it again changes nothing.
    """
    global _stock_code, _handle
    if is_registered():
        return
    for backbone in BACKBONES:  # first, as it fails if another copy of this package is registered
        BACKBONE_REGISTRY.register(backbone)
    _stock_code = detectron2_get_norm.__code__
    detectron2_get_norm.__code__ = _get_norm.__code__
    _handle = register_module_module_registration_hook(_on_module)


def unregister() -> None:
    """Undoes :func:`register`. Models that have been built remain as they are."""
    global _stock_code, _handle
    if not is_registered():
        return
    detectron2_get_norm.__code__ = _stock_code
    _stock_code = None
    _handle.remove()
    _handle = None
    for backbone in BACKBONES:
        # The registry has no public way to remove an entry.
        BACKBONE_REGISTRY._obj_map.pop(backbone.__name__)


def is_registered() -> bool:
    """Whether Detectron2 knows the norm options and backbones of this package at present."""
    return _stock_code is not None


def _get_norm(norm, out_channels):  # type: ignore[no-untyped-def]
    # Only the code of this function is used, inside the module of Detectron2's: it can refer to
    # nothing but its arguments and what it imports.
    import sys

    from wsbcn_d2.detectron2_hooks import get_norm_for

    return get_norm_for(norm, out_channels, sys._getframe(1))


def get_norm_for(norm: Any, out_channels: int, caller: FrameType) -> Optional[nn.Module]:
    """What ``detectron2.layers.get_norm`` returns to ``caller``.

    RetinaNetHead asks for a layer of 32 channels before its real ones, to look at its type. Groups
    that divide its channels need not divide those, so that layer gets one.
    """
    if (
        isinstance(norm, str)
        and norm
        and isinstance(caller.f_locals.get("self"), RetinaNetHead)
        and "cls_subnet" not in caller.f_locals
    ):
        return NormOption.parse(norm).with_one_group().build(out_channels)
    return get_norm(norm, out_channels)


def _on_module(parent: nn.Module, name: str, child: Optional[nn.Module]) -> None:
    if child is None:
        return
    request = weight_standardization_request(child)
    if request is not None and not request.done:
        standardize_(feeding_convolution(parent, name, request.channels))
        request.done = True
    if isinstance(child, ResBottleneckBlock):
        _keep_zero_initialization(child.norm3)
    if isinstance(parent, RetinaNetHead) and name in ("cls_subnet", "bbox_subnet"):
        _separate_levels(parent, child)
    fuse_(child)


def feeding_convolution(parent: nn.Module, name: str, channels: int) -> nn.Module:
    """The convolution before the norm layer ``parent.name``, which "+WS" is about.

    That is the module that owns the layer, or else the last one registered before it in the same
    parent (RetinaNet, FCOS, RegNet, ViT, any Sequential).

    Raises:
        ValueError: if that is no convolution with ``channels`` outputs. A model whose config says
            "+WS" must not be built without.
    """
    if is_convolution(parent):
        return parent
    siblings = list(parent._modules)
    before = siblings[: siblings.index(name)] if name in siblings else siblings
    previous = [parent._modules[key] for key in before if parent._modules[key] is not None]
    if previous and is_convolution(previous[-1]):
        if previous[-1].out_channels == channels:
            return previous[-1]
    found = f"follows a {type(previous[-1]).__name__}" if previous else "follows no module"
    raise ValueError(
        f"{type(parent).__name__}.{name} asks for weight standardization ('+WS'), but {found}, "
        f"where a convolution with {channels} output channels that can be standardized is needed. "
        "Remove '+WS' there, or build these layers by hand with wsbcn_d2.WSConv2d."
    )


def _keep_zero_initialization(norm: nn.Module) -> None:
    """ViT's residual blocks start as the identity, by a zero weight of the last norm layer.

    The channel normalization of BCN would divide by the standard deviation of those zeros; its own
    weight is the last one.
    """
    if isinstance(norm, BatchChannelNorm) and not norm.weight.any():
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.group_weight)


def _separate_levels(head: RetinaNetHead, subnet: nn.Module) -> None:
    shared = False
    for name, norm in list(subnet.named_children()):
        if isinstance(norm, BatchChannelNorm):
            norm.set_num_levels(head._num_features)
            shared = True
        elif weight_standardization_request(norm) is not None and type(norm) in CYCLED:
            subnet._modules[name] = CycleBatchNormList(
                head._num_features, type(norm), num_features=norm.num_features
            )
    if shared:
        restart_levels_before_forward(head)


def restart_levels_before_forward(head: nn.Module) -> None:
    """A forward pass of a head that ended halfway must not shift the levels of the next."""
    if _restart_levels not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_restart_levels)


def _restart_levels(head: nn.Module, inputs: Any) -> None:
    for module in head.modules():
        if isinstance(module, BatchChannelNorm):
            module.restart_levels()
