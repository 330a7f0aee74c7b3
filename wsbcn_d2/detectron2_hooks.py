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

import inspect
import logging
from types import CodeType, FrameType
from typing import Any, Iterator, List, Optional, Tuple, cast

from detectron2.layers import CycleBatchNormList
from detectron2.layers import get_norm as detectron2_get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.vit import ResBottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .feeding import ONE_WEIGHT, NotFedYet, Path, feeding_convolution
from .layers import BatchChannelNorm, standardize_, weights_per_filter
from .levels import levels_of, restart_levels_before_forward, separate_levels
from .modeling import BACKBONES, fuse_
from .norm_options import (
    NormOption,
    WeightStandardizationRequest,
    get_norm,
    weight_standardization_request,
)

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

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
    if _handle is None:
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
    constructor = inspect.unwrap(RetinaNetHead.__init__).__code__
    looks = caller.f_code is constructor and "cls_subnet" not in caller.f_locals
    if isinstance(norm, str) and norm and looks:
        return NormOption.parse(norm).with_one_group().build(out_channels)
    return get_norm(norm, out_channels)


def _on_module(parent: nn.Module, name: str, child: Optional[nn.Module]) -> None:
    if child is None:
        return
    _attach_weight_standardization(parent, name, child)
    if isinstance(child, ResBottleneckBlock):
        _keep_zero_initialization(child.norm3)
    if isinstance(parent, RetinaNetHead) and name in ("cls_subnet", "bbox_subnet"):
        _separate_levels(parent, child)
    elif levels_of(child) > 1 and not isinstance(child, RetinaNetHead):
        if any(isinstance(m, BatchChannelNorm) for m in child.modules()):
            separate_levels(child, levels_of(child))
    fuse_(child)


# A norm layer that asks for weight standardization, with the parents that are known of it.
_Waiting = Tuple[nn.Module, List[Tuple[nn.Module, str]]]


def _attach_weight_standardization(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Standardizes what feeds the layers that ask for it, when ``child`` joins ``parent``.

    Raises:
        ValueError: if that is no convolution that can be standardized. A model whose config says
            "+WS" must not be built without.
    """
    for norm, path in _waiting(child):
        _attach(norm, [*path, (parent, name)])
    # What leads the parent may belong to the convolution registered behind it.
    for first, module in list(parent._modules.items())[:1]:
        if len(parent._modules) == 1 and first != name and module is not None:
            for norm, path in _waiting(module):
                _attach(norm, [*path, (parent, first)], following=child)


def _waiting(module: nn.Module) -> Iterator[_Waiting]:
    """The layers for which it matters where ``module`` is put: itself, what leads a Sequential, and
    all in lists."""
    request = weight_standardization_request(module)
    if request is not None:
        if not request.done:
            yield module, []
    elif isinstance(module, (nn.Sequential, nn.ModuleList)):
        for name, child in module._modules.items():
            if child is not None:
                for norm, path in _waiting(child):
                    yield norm, [*path, (module, name)]
            if isinstance(module, nn.Sequential):
                break


def _attach(norm: nn.Module, path: Path, following: Optional[nn.Module] = None) -> None:
    channels = _channels_of(norm)
    place = f"{type(path[0][0]).__name__}.{path[0][1]}"
    try:
        conv = feeding_convolution(path, channels, following, complete=False)
    except NotFedYet:
        if _refuse_to_run not in norm._forward_pre_hooks.values():
            norm.register_forward_pre_hook(_refuse_to_run)
        return
    except ValueError as error:
        raise ValueError(_not_found(place, str(error), channels)) from error
    if weights_per_filter(conv) == 1:
        logger.warning(f"{place}: {ONE_WEIGHT}")
    else:
        standardize_(conv)
    settle(norm)


def _not_found(place: str, found: str, channels: int) -> str:
    return (
        f"{place} asks for weight standardization ('+WS'), but {found}, where a convolution with "
        f"{channels} output channels that can be standardized is needed. Remove '+WS' there and "
        "name the convolution to wsbcn_d2.convert (pairs, example_inputs), or build these layers "
        "by hand with wsbcn_d2.WSConv2d."
    )


def _refuse_to_run(norm: nn.Module, inputs: Any) -> None:
    raise ValueError(_not_found(type(norm).__name__, "follows no module", _channels_of(norm)))


def _channels_of(norm: nn.Module) -> int:
    """Those of a layer that asks for weight standardization."""
    return cast(WeightStandardizationRequest, weight_standardization_request(norm)).channels


def settle(norm: nn.Module) -> None:
    """To be called when what a layer asked for has been done: it may then be put anywhere."""
    request = weight_standardization_request(norm)
    if request is not None:
        request.done = True
    for key, hook in list(norm._forward_pre_hooks.items()):
        if hook is _refuse_to_run:
            del norm._forward_pre_hooks[key]


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
