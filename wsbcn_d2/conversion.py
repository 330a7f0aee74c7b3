"""Conversion: the normalization layers of a model that exists become others, in place.

The counterpart, for models that no config builds, of writing a norm option into the config.
"""

import logging
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple, Type

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm, batch_norm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from .detectron2_hooks import complete, feeding_convolution, restart_levels_before_forward
from .layers import BatchChannelNorm, ChannelNorm, WeightStandardized, standardize_
from .norm_options import NormOption, weight_standardization_request

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

_BATCH_NORMS: Tuple[Type[nn.Module], ...] = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    NaiveSyncBatchNorm,
)
_FROZEN: Tuple[Type[nn.Module], ...] = (FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)
_ESTIMATING = (*_BATCH_NORMS, *_FROZEN, BatchChannelNorm)

# The layers that are converted: those for activations of shape (N, C, H, W). Only exact types: a
# subclass may do more than normalize, which would be lost.
_CONVERTED: Tuple[Type[nn.Module], ...] = (
    *_ESTIMATING,
    CycleBatchNormList,
    ChannelNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
)
if hasattr(batch_norm, "LayerNorm"):  # newer than Detectron2 0.6
    _CONVERTED += (batch_norm.LayerNorm,)

# Modules with the places where they are registered: path, parent (None: the model itself) and name.
_Place = Tuple[str, Optional[nn.Module], str]
_Places = Dict[nn.Module, List[_Place]]


@torch.no_grad()
def convert(
    model: nn.Module, norm: str = "BCN+WS", *, keep_function: bool = False
) -> nn.Module:
    """Replaces all normalization of feature maps in a model, in place.

    Every BatchNorm2d, SyncBatchNorm, GroupNorm and InstanceNorm2d of PyTorch, FrozenBatchNorm2d of
    Detectron2 and torchvision, NaiveSyncBatchNorm, CycleBatchNormList and (channel-first) LayerNorm
    of Detectron2, and BatchChannelNorm and ChannelNorm becomes the layer of the norm option.
    ``torch.nn.LayerNorm``, as in transformers, and everything else stays. With "+WS", the
    convolution that feeds such a layer is weight-standardized: the one that owns it, or else the
    module registered before it; without, convolutions stay what they are. Objects stay the same and
    change their class, so that lists and attributes of the model keep referring to them.

    What a layer knows goes where loading its state dict into the new layer would put it:

    - The affine per channel becomes that of the new layer: for BCN, the one of its batch
      normalization. CN has an affine per group, which becomes the mean of its channels'. Between
      layers with an affine per group, and from them to one per channel, that one is carried.
    - Running statistics become the estimates of BCN and the statistics of any BatchNorm. Those of
      the levels of a feature pyramid (CycleBatchNormList) remain separate; a layer that the head of
      RetinaNet or FCOS shares between levels gets separate ones if it is to have any.
    - ``eps``, ``requires_grad``, training mode, hooks, device and dtype stay. Parameters stay the
      same objects where they can. Those without counterpart are trainable unless the old layer was
      frozen, and initialized to the identity; a BCN whose batch normalization would start with
      weight 0 has that 0 in the channel normalization.
    - A frozen layer stays frozen. FrozenBatchNorm2d becomes a BCN whose parameters do not require
      gradients, and which therefore leaves its estimates alone; BatchNorm does not become of a
      frozen layer, but FrozenBatchNorm2d, as with Detectron2's ``FREEZE_AT``.

    Convert before optimizers and DistributedDataParallel are made, for they do not know the
    parameters that are new.

    Args:
        model: a built model, or a part of one (``model.backbone``), on any device.
        norm: a norm option, one for all layers.
        keep_function: whether the layers start with what the model has computed so far, as well as
            they can. Without, standardization changes the function of filters that were trained
            without it, and with it what their activations have to do with the running statistics.
            With it, the convolutions get constant ``ws_scale`` and ``ws_shift`` (adaptive weight
            standardization; see :class:`wsbcn_d2.layers.WeightStandardized`) with which the filters
            are exactly what they were; and BCN gets group affines that give its output, for an
            image with the statistics of all, the scale and mean of the old layer's.

    Returns:
        ``model``

    Raises:
        ValueError: if the option is unknown, the groups do not divide the channels of a layer, a
            layer does not follow a convolution that can be standardized, or the model has nothing
            to convert. It names the layer. The model is unchanged then.
        TypeError: if a layer is of a class derived from those above, or the model is in
            DistributedDataParallel or DataParallel. The same holds.
    """
    option = NormOption.parse(norm)
    changes = list(_plan(model, option, keep_function))
    if not changes:
        names = ", ".join(sorted({kind.__name__ for kind in _CONVERTED}))
        raise ValueError(f"{type(model).__name__} has no layers to convert, which are {names}")
    trained = any(_is_trained(change.norm) for change in changes)
    standardized = 0
    for change in changes:
        for conv in change.convs:
            standardized += _standardize(conv, keep_function)
        if change.new is not None:
            _become(change.norm, change.new)
    for head in model.modules():
        if isinstance(head, RetinaNetHead) and any(_has_levels(m) for m in head.modules()):
            restart_levels_before_forward(head)
    frozen = sum(change.frozen for change in changes)
    logger.info(f"converted {len(changes)} layers to {option}; {frozen} of them are frozen")
    if standardized and trained and not keep_function:
        logger.warning(
            f"The filters of {standardized} convolutions are standardized from now on, but the "
            "model seems to have been trained without that: it no longer computes what it did. "
            "convert(..., keep_function=True) keeps the filters what they are; or load weights "
            "that were trained with weight standardization."
        )
    complete(model, type(model).__name__)
    return model


# --------------------------------------------------------------------- what is to be done, and where


@dataclass
class _Change:
    """What happens to a normalization layer.

    Attributes:
        norm: the layer.
        new: what it becomes; None if it is that already.
        convs: the convolutions to standardize.
        frozen: whether it is not to be trained.
    """

    norm: nn.Module
    new: Optional[nn.Module]
    convs: List[nn.Module]
    frozen: bool


def _plan(model: nn.Module, option: NormOption, keep_function: bool) -> Iterator[_Change]:
    """Everything that can go wrong does so here, where nothing has been changed."""
    levels = _levels_of_heads(model)
    for norm, places in _find(model).items():
        path = places[0][0] or "the model"
        if type(norm) not in _CONVERTED:
            raise TypeError(
                f"cannot convert {path}, a {type(norm).__module__}.{type(norm).__name__}: it is "
                "derived from a normalization layer and may do more than that. Convert the other "
                "parts of the model one by one."
            )
        parent = places[0][1]
        try:
            channels = _num_channels(norm)
            new = option.build(channels)
            request = weight_standardization_request(new)
            convs = []
            if request is not None:
                convs = [_convolution(place, channels) for place in places]
                request.done = True
            if isinstance(norm, CycleBatchNormList) and type(new) in (*_BATCH_NORMS, *_FROZEN):
                # It is the container for these as well.
                yield _Change(norm, None, convs, _is_frozen(norm, parent))
                for level in norm:
                    frozen = _is_frozen(level, norm)
                    yield _Change(level, _successor(level, new, 1, frozen, keep_function), [], frozen)
                continue
            frozen = _is_frozen(norm, parent)
            num_levels = max(_num_levels(norm), levels.get(norm, 1))
            new = _successor(norm, new, num_levels, frozen, keep_function)
            device, dtype = 
        except ValueError as error:
            raise ValueError(f"cannot convert {path}: {error}") from error
        yield _Change(norm, new, convs, frozen)
