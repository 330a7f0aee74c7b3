"""Conversion: the normalization layers of a model that exists become others, in place.

For models that are not built from norm options: those of other libraries, or saved as a whole.
"""

import logging
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type, cast

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from .detectron2_hooks import CYCLED, feeding_convolution, restart_levels_before_forward
from .layers import BatchChannelNorm, ChannelNorm, WeightStandardized, become, standardize_
from .modeling import fuse_, without_checkpointing
from .norm_options import NormOption, weight_standardization_request
from .summary import summarize

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

_FROZEN = (FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)
_TRAINABLE_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)
_BATCH_NORMS = (*_TRAINABLE_BATCH_NORMS, *_FROZEN, CycleBatchNormList)

# What is converted. Only exact types: a subclass may do more than normalize, which would be lost.
_CONVERTED: Tuple[Type[nn.Module], ...] = (
    *_BATCH_NORMS,
    BatchChannelNorm,
    ChannelNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    LayerNorm,
)

# A GroupNorm behind one of these has no feature maps of shape (N, C, H, W).
_OF_OTHER_SHAPES = (nn.Linear, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)


@torch.no_grad()
def convert(model: nn.Module, norm: str = "BCN+WS", *, keep_function: bool = False) -> nn.Module:
    """Gives a model another normalization, in place.

    Every layer that normalizes feature maps of shape (N, C, H, W) becomes that of the norm option:
    PyTorch's BatchNorm2d, SyncBatchNorm, GroupNorm and InstanceNorm2d, Detectron2's and
    torchvision's FrozenBatchNorm2d, Detectron2's NaiveSyncBatchNorm, CycleBatchNormList and
    (channel-first) LayerNorm, BatchChannelNorm and ChannelNorm. PyTorch's LayerNorm, which is that
    of transformers, stays. With "+WS" the convolution that feeds such a layer is standardized: the
    one that owns it, or else the module registered before it in the same parent. All others stay
    as they are; without "+WS", those that are standardized do so too. Objects remain the same and
    change their class, so that whatever refers to them, such as the plain lists of Detectron2's FPN
    and ResNet, sees the change.

    What a layer has learned goes where loading its state dict into the new layer would put it:

    - An affine per channel becomes the one that the new layer has; that of BCN's batch
      normalization. An affine per group (CN, the second of BCN) becomes the one per group, or per
      channel, of the new layer. Where channels of a group differ and the new layer has one value
      for them, that is their mean.
    - Running statistics become those of the new layer: the estimates of BCN, or BatchNorm's.
    - Layers that the heads of RetinaNet and FCOS share between feature levels have statistics for
      each of them afterwards, and keep those that they had.

    ``eps``, training mode, hooks, device and dtype are those of the old layer, and parameters stay
    the same objects where their shape does, with their ``requires_grad``. New ones are trainable
    unless the old layer is frozen, which it then stays: FrozenBatchNorm2d becomes a BCN without
    trainable parameters, whose estimates are therefore constant, and instead of BatchNorm a frozen
    layer becomes FrozenBatchNorm2d, as with Detectron2's ``FREEZE_AT``. Where BatchNorm has a
    weight of 0 for all channels, so that a residual block starts as the identity, BCN has it in the
    channel normalization, which would divide by the standard deviation of zeros otherwise.

    To be called before an optimizer and DistributedDataParallel are made, which would not know the
    new parameters.

    Args:
        model: a model, or a part of one, such as ``model.backbone``.
        norm: a norm option. It holds for all layers; convert parts of the model one by one if
            their channels need different groups.
        keep_function: start with what the model computes now, as far as the new layers can. For
            pretrained weights. A standardized convolution gets the buffers ``ws_scale`` and
            ``ws_shift`` with which its filters are exactly what they were (see
            :class:`wsbcn_d2.layers.WeightStandardized`); they are constant. The channel
            normalization of BCN gets the affine per group with which BCN does what the affine per
            channel did before, for an image whose statistics are those of all images. Otherwise
            filters that were trained without standardization are another function from now on,
            with which running statistics have nothing to do; the log warns of it.

    Returns:
        ``model``

    Raises:
        ValueError: if the norm option is unknown or its groups do not divide the channels, if a
            layer does not follow a convolution that can be standardized, if a GroupNorm follows
            what gives no feature maps, or if there is nothing to convert. It names the layer, and
            the model is unchanged.
        TypeError: if a layer is of a class derived from those above, or the model is within
            DistributedDataParallel or DataParallel. The model is unchanged.
    """
    option = NormOption.parse(norm)
    changes = list(_plan(model, option, keep_function))
    if not changes:
        kinds = ", ".join(dict.fromkeys(kind.__name__ for kind in _CONVERTED))
        raise ValueError(f"{type(model).__name__} has nothing to convert: none of {kinds}")
    trained = any(_is_trained(change.norm) for change in changes)

    standardized = 0
    for change in changes:
        for conv in change.convs:
            if not isinstance(conv, WeightStandardized):
                standardize_(conv)
                standardized += 1
                if keep_function:
                    _keep_filters(cast(WeightStandardized, conv))
        if change.new is not None:
            become(change.norm, change.new)
    for head in model.modules():
        if isinstance(head, RetinaNetHead) and any(
            isinstance(m, BatchChannelNorm) and m.num_levels > 1 for m in head.modules()
        ):
            restart_levels_before_forward(head)

    frozen = sum(change.frozen for change in changes)
    logger.info(
        f"Converted {len(changes)} normalization layers to {option}"
        + (f"; {frozen} of them are frozen, as before" if frozen else "")
    )
    if standardized and trained and not keep_function:
        logger.warning(
            f"The filters of {standardized} convolutions are standardized from now on. The model "
            "seems to have been trained without that, and no longer computes what it did: rather "
            "use convert(..., keep_function=True), or load weights that were trained with it."
        )
    with without_checkpointing(model):  # whose classes hide those that are exchanged
        for module in model.modules():
            fuse_(module)
    logger.info(f"{type(model).__name__}: {summarize(model)}")
    return model


# ------------------------------------------------------------------------------ what is to be done

# Path, parent and name of a module. The model itself has no parent.
_Place = Tuple[str, Optional[nn.Module], str]


@dataclass
class _Change:
    """What happens to a normalization layer.

    Attributes:
        norm: the layer.
        new: what it becomes; None if it is that already.
        convs: the convolutions to standardize.
        frozen: whether the layer is frozen.
    """

    norm: nn.Module
    new: Optional[nn.Module]
    convs: List[nn.Module]
    frozen: bool


def _plan(model: nn.Module, option: NormOption, keep_function: bool) -> Iterator[_Change]:
    """Whatever can go wrong does so here, where nothing is changed yet."""
    levels = _levels_in_heads(model)
    for norm, places in _find(model).items():
        path, parent, _ = places[0]
        path = path or "the model"
        if type(norm) not in _CONVERTED:
            raise TypeError(
                f"cannot convert {path}, a {type(norm).__module__}.{type(norm).__name__}: it is "
                "derived from a normalization layer and may do more than that. Other parts of the "
                "model can be converted one by one."
            )
        frozen = _is_frozen(norm, parent)
        convs: List[nn.Module] = []
        try:
            for place in places:
                _check_shape(place, norm)
            new = _successor(norm, option, levels.get(norm, 1), frozen)
            if option.weight_standardization:
                convs = [_feeding_convolution(place, norm) for place in places]
        except ValueError as error:
            raise ValueError(f"cannot convert {path}: {error}") from error
        if new is not None:
            like = _reference(norm, parent or norm, model)
            new.to(device=like.device, dtype=like.dtype)
            new.train(norm.training).requires_grad_(not frozen)
            _carry(norm, new, keep_function)
        yield _Change(norm, new, convs, frozen)


def _find(model: nn.Module) -> Dict[nn.Module, List[_Place]]:
    """The normalization layers of a model, and all places where each is registered."""
    places: Dict[nn.Module, List[_Place]] = {}
    if isinstance(model, _CONVERTED):
        places[model] = [("", None, "")]
    for prefix, parent in model.named_modules():
        if isinstance(parent, (DistributedDataParallel, DataParallel)):
            raise TypeError(
                f"cannot convert what is within {type(parent).__name__}, which would not know the "
                "new parameters; convert the model first"
            )
        if isinstance(parent, CycleBatchNormList):  # which is converted as a whole
            continue
        for name, child in parent._modules.items():
            if isinstance(child, _CONVERTED):
                path = f"{prefix}.{name}" if prefix else name
                places.setdefault(child, []).append((path, parent, name))
    return places


def _levels_in_heads(model: nn.Module) -> Dict[nn.Module, int]:
    """How many feature levels share a layer, for those in the heads of RetinaNet and FCOS."""
    return {
        norm: head._num_features
        for head in model.modules()
        if isinstance(head, RetinaNetHead)
        for subnet in (head.cls_subnet, head.bbox_subnet)
        for norm in subnet.children()
    }


def _check_shape(place: _Place, norm: nn.Module) -> None:
    _, parent, name = place
    if parent is None or type(norm) is not nn.GroupNorm:  # others take feature maps only
        return
    siblings = list(parent._modules)
    before = [parent._modules[key] for key in siblings[: siblings.index(name)]]
    previous = next((module for module in reversed(before) if module is not None), parent)
    if isinstance(previous, _OF_OTHER_SHAPES):
        raise ValueError(
            f"it follows a {type(previous).__name__}, and not feature maps of shape (N, C, H, W). "
            "Other parts of the model can be converted one by one."
        )


def _feeding_convolution(place: _Place, norm: nn.Module) -> nn.Module:
    _, parent, name = place
    if parent is None:
        raise ValueError(
            "'+WS' needs the convolution before the layer, but there is the layer only"
        )
    return feeding_convolution(parent, name, _num_channels(norm))


def _is_frozen(norm: nn.Module, parent: Optional[nn.Module]) -> bool:
    if isinstance(norm, _FROZEN):
        return True
    # A layer without parameters is frozen with the block that it is in.
    parameters = list(norm.parameters()) or list((parent or norm).parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _is_trained(norm: nn.Module) -> bool:
    """Whether the values of a layer are others than those that it starts with."""
    bias, mean = (getattr(norm, key, None) for key in ("bias", "running_mean"))
    weight: Optional[Tensor] = getattr(norm, "weight", None)
    return _any(bias) or _any(mean) or (weight is not None and _any(weight) and _any(weight - 1))


def _any(value: Optional[Tensor]) -> bool:
    """Whether something is not 0 in a tensor, if there is one and it has values."""
    return value is not None and not value.is_meta and bool(value.any())


def _num_channels(norm: Any) -> int:
    if isinstance(norm, CycleBatchNormList):
        return norm[0].num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    return norm.num_features if hasattr(norm, "num_features") else norm.weight.shape[0]


def _num_levels(norm: nn.Module) -> int:
    if isinstance(norm, CycleBatchNormList):
        return len(norm)
    return norm.num_levels if isinstance(norm, BatchChannelNorm) else 1


def _reference(*modules: nn.Module) -> Tensor:
    """The first floating-point tensor of the modules, for device and dtype."""
    tensors = (tensor for m in modules for tensor in (*m.parameters(), *m.buffers()))
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


# ---------------------------------------------------------------------------------- the new layers


def _successor(
    norm: nn.Module, option: NormOption, levels_in_head: int, frozen: bool
) -> Optional[nn.Module]:
    """The new layer, as it is built; None if the old one is of that kind.

    Raises:
        ValueError: if it cannot be built.
    """
    channels, own_levels = _num_channels(norm), _num_levels(norm)
    levels = max(levels_in_head, own_levels)
    new = option.build(channels)
    request = weight_standardization_request(new)
    if request is not None:
        request.done = True  # with the conversion
    kind = type(new)
    if isinstance(new, BatchChannelNorm):
        if levels > 1:
            new.set_num_levels(levels)
    elif kind in CYCLED and levels > 1:
        new = CycleBatchNormList(levels, kind, num_features=channels)
    elif kind in _BATCH_NORMS and own_levels > 1:
        raise ValueError(
            f"it has statistics for {own_levels} feature levels, and {kind.__name__} for one only"
        )
    elif kind in _TRAINABLE_BATCH_NORMS and frozen and kind is not type(norm):
        new = FrozenBatchNorm2d(channels)
    return None if _is_same_kind(norm, new) else new


def _is_same_kind(norm: nn.Module, new: nn.Module) -> bool:
    if isinstance(norm, CycleBatchNormList) and isinstance(new, CycleBatchNormList):
        norm, new = norm[0], new[0]
    arguments = ("num_groups", "mode", "update_rate", "num_levels", "_stats_mode")
    return type(norm) is type(new) and all(
        getattr(norm, key, None) == getattr(new, key, None) for key in arguments
    )


def _carry(norm: nn.Module, new: nn.Module, keep_function: bool) -> None:
    """Gives a new layer what the old one has learned. The old one is not changed."""
    if isinstance(norm, _TRAINABLE_BATCH_NORMS) and type(new) in CYCLED:
        vars(new).update(vars(norm))  # with or without affine and statistics
        return
    _carry_arguments(norm, new)
    for key in ("running_mean", "running_var"):
        _carry_statistics(norm, new, key)

    # Of the two affines of BCN, BatchNorm has the first, others the second.
    first = second = (getattr(norm, "weight", None), getattr(norm, "bias", None))
    if isinstance(norm, BatchChannelNorm):
        second = (norm.group_weight, norm.group_bias)
    elif isinstance(norm, ChannelNorm) and isinstance(new, BatchChannelNorm):
        first = (None, None)
    has_values = first[0] is not None and not first[0].is_meta
    is_zero = has_values and not _any(first[0]) and not _any(first[1])

    if not isinstance(new, BatchChannelNorm):
        _assign(new, ("weight", "bias"), first if isinstance(new, _BATCH_NORMS) else second)
    elif isinstance(norm, (BatchChannelNorm, ChannelNorm)):
        _assign(new, ("weight", "bias"), first)
        _assign(new, ("group_weight", "group_bias"), second)
    elif is_zero:
        new.group_weight.zero_()  # see convert
    else:
        _assign(new, ("weight", "bias"), first)
        if keep_function:
            _match_channel_norm(new)


def _carry_arguments(norm: nn.Module, new: nn.Module) -> None:
    old = norm[0] if isinstance(norm, CycleBatchNormList) else norm
    for layer in new if isinstance(new, CycleBatchNormList) else [new]:
        for key in ("eps", "momentum"):
            if hasattr(old, key) and hasattr(layer, key):
                setattr(layer, key, getattr(old, key))


def _carry_statistics(norm: nn.Module, new: nn.Module, key: str) -> None:
    levels = list(norm) if isinstance(norm, CycleBatchNormList) else [norm]
    # Those of InstanceNorm lack how images differ.
    if getattr(levels[0], key, None) is None or isinstance(norm, nn.InstanceNorm2d):
        return
    values = torch.cat([getattr(level, key).view(-1, _num_channels(norm)) for level in levels])
    if isinstance(new, CycleBatchNormList):
        for i, layer in enumerate(new):
            getattr(layer, key).copy_(values[i % len(values)])
    elif hasattr(new, key):
        target = getattr(new, key)
        target.copy_(values.expand_as(target) if target.dim() == 2 else values[0])


def _assign(
    new: nn.Module, names: Tuple[str, str], values: Tuple[Optional[Tensor], Optional[Tensor]]
) -> None:
    """Parameters remain the same objects if their shape does."""
    for name, value in zip(names, values):
        if value is None:
            continue
        target = getattr(new, name)
        if isinstance(value, nn.Parameter) and isinstance(target, nn.Parameter):
            if value.shape == target.shape:
                setattr(new, name, value)
                continue
        # From one per group or channel to one per group or channel.
        per_channel = value.repeat_interleave(_num_channels(new) // len(value))
        target.copy_(per_channel.unflatten(0, (len(target), -1)).mean(1))


def _match_channel_norm(bcn: BatchChannelNorm) -> None:
    """Gives the channel normalization of BCN the affine with which it changes nothing, if channels
    come from the batch normalization with mean 0 and variance 1.

    The affine of the latter makes ``z = weight * x + bias`` of them. Over a group, the mean of z is
    that of ``bias``, and the variance that of ``bias`` plus the mean of ``weight ** 2``.
    """
    weight, bias = (p.unflatten(0, (bcn.num_groups, -1)) for p in (bcn.weight, bcn.bias))
    variance = bias.var(1, unbiased=False) + weight.square().mean(1)
    bcn.group_weight.copy_(torch.sqrt(variance + bcn.eps))
    bcn.group_bias.copy_(bias.mean(1))


# -------------------------------------------------------------------------------------- the change


def _keep_filters(conv: WeightStandardized) -> None:
    """Makes the filters that a standardized convolution uses those that it has."""
    filters = conv.weight
    if isinstance(conv, nn.ConvTranspose2d):
        # (C_in, C_out / groups, kh, kw): each group of inputs has outputs of its own
        filters = filters.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
    filters = filters.flatten(1)
    dtype = torch.promote_types(filters.dtype, torch.float32)
    variance, mean = torch.var_mean(filters.double(), 1, unbiased=False)
    conv.ws_scale = torch.sqrt(variance + conv.eps).to(dtype)
    conv.ws_shift = mean.to(dtype)
