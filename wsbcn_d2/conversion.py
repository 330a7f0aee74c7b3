"""Conversion: the normalization layers of a model that exists become others, in place.

For models that are not built from norm options: those of other libraries, or saved as a whole.
"""

import logging
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple, Type, cast

import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from .detectron2_hooks import CYCLED, settle
from .feeding import (
    ONE_WEIGHT,
    NotFed,
    feeding_convolution,
    followed_convolutions,
    path_of,
    preceding_layer,
)
from .layers import (
    BatchChannelNorm,
    ChannelNorm,
    WeightStandardized,
    adaptation,
    become,
    is_convolution,
    outputs_first,
    standardize_,
    weights_per_filter,
)
from .levels import levels_of, restart_levels_before_forward
from .modeling import fuse_, without_checkpointing
from .norm_options import NormOption, weight_standardization_request
from .observation import Observation, observe
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

# timm's normalization layers with what they are without the activation that they may contain.
_TIMM: Dict[str, Type[nn.Module]] = {
    "BatchNormAct2d": nn.BatchNorm2d,
    "SyncBatchNormAct": nn.SyncBatchNorm,
    "FrozenBatchNormAct2d": FrozenBatchNorm2d,
    "GroupNorm": nn.GroupNorm,
    "GroupNorm1": nn.GroupNorm,
    "GroupNormAct": nn.GroupNorm,
    "GroupNorm1Act": nn.GroupNorm,
}

# What stays, although its statistics are those of a batch, too.
_OTHER_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm3d)

# A GroupNorm behind one of these has no feature maps of shape (N, C, H, W).
_OF_OTHER_SHAPES = (nn.Linear, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)


@torch.no_grad()
def convert(
    model: nn.Module,
    norm: str = "BCN+WS",
    *,
    keep_function: bool = False,
    data: Any = None,
    example_inputs: Any = None,
    pairs: Optional[Mapping[str, Optional[str]]] = None,
    unfed: str = "convert",
) -> nn.Module:
    """Gives a model another normalization, in place.

    Every layer that normalizes feature maps of shape (N, C, H, W) becomes that of the norm option:
    PyTorch's BatchNorm2d, SyncBatchNorm, GroupNorm and InstanceNorm2d, Detectron2's and
    torchvision's FrozenBatchNorm2d, Detectron2's NaiveSyncBatchNorm, CycleBatchNormList and
    (channel-first) LayerNorm, BatchChannelNorm and ChannelNorm, and timm's BatchNormAct2d,
    GroupNormAct and their like, which become a Sequential of the new layer and their activation.
    PyTorch's LayerNorm, which is that of transformers, stays, and so does BatchNorm1d, which the
    log names. Objects remain the same and change their class, so that whatever refers to them, such
    as the plain lists of Detectron2's FPN and ResNet, sees the change.

    With "+WS" the convolution that feeds such a layer is standardized. Which one that is,
    ``example_inputs`` tell for certain; without them it is what the structure of the model says
    (:func:`wsbcn_d2.feeding.feeding_convolution`). Layers that no convolution feeds, as in
    pre-activation networks, are converted all the same; the log names them. A convolution with
    filters of one weight each (1x1, depthwise) stays as it is, since they would become 0. Without
    "+WS", convolutions that are standardized stay so.

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
        data: for ``keep_function`` where layers without running statistics (GroupNorm, LayerNorm,
            InstanceNorm) become some that have them (BN, BCN): an iterable of what to call the
            model with, each a tuple of arguments or the only one. The statistics are those of these
            data, and affines such that a typical image gives what it gave. Some hundred images.
        example_inputs: arguments to call the model with, once, in evaluation mode: a tuple, or the
            only one. A layer's convolution is the one whose output it gets then. For models that
            register their parts in another order than they call them.
        pairs: what feeds a layer, by the full names of the layer and of the convolution; None for
            what is to be converted without weight standardization. It overrules everything else.
        unfed: what to do to layers that no convolution feeds, with "+WS": "convert" or "leave".

    Returns:
        ``model``

    Raises:
        ValueError: if the norm option is unknown or its groups do not divide the channels, if it
            cannot be told which convolution feeds a layer, if a GroupNorm follows what gives no
            feature maps, if there is nothing to convert, if the function cannot be kept without
            data, or the model cannot be called with these or the example. It names the layer, and
            the model is unchanged.
        TypeError: if a layer is of a class derived from those above, or the model is within
            DistributedDataParallel or DataParallel. The model is unchanged.
    """
    option = NormOption.parse(norm)
    if unfed not in ("convert", "leave"):
        raise ValueError(f"unfed must be 'convert' or 'leave', got {unfed!r}")
    changes, heads = _plan(model, option, keep_function, data, example_inputs, pairs or {}, unfed)
    if not changes:
        kinds = ", ".join(dict.fromkeys(kind.__name__ for kind in _CONVERTED))
        raise ValueError(f"{type(model).__name__} has nothing to convert: none of {kinds}")
    trained = any(_is_trained(change.norm) for change in changes)
    without = {change.path: change.unfed for change in changes if change.unfed}
    if unfed == "leave":
        changes = [change for change in changes if change.path not in without]

    standardized = 0
    for change in changes:
        settle(change.norm)
        for conv in change.convs:
            if not isinstance(conv, WeightStandardized):
                standardize_(conv)
                standardized += 1
                if keep_function:
                    _keep_filters(cast(WeightStandardized, conv))
        if change.new is not None:
            become(change.norm, change.new)
    for head in heads:
        if any(isinstance(m, BatchChannelNorm) and m.num_levels > 1 for m in head.modules()):
            restart_levels_before_forward(head)

    frozen = sum(change.frozen for change in changes)
    logger.info(
        f"Converted {len(changes)} normalization layers to {option}"
        + (f"; {frozen} of them are frozen, as before" if frozen else "")
    )
    if without:
        names = ", ".join(f"{path} ({why})" for path, why in without.items())
        done = (
            "left as they are" if unfed == "leave" else "converted without weight standardization"
        )
        logger.warning(f"{len(without)} normalization layers were {done}: {names}")
    left = [name for name, m in model.named_modules() if isinstance(m, _OTHER_BATCH_NORMS)]
    if left:
        logger.warning(f"Not for feature maps of shape (N, C, H, W), and left: {', '.join(left)}")
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
        path: name of the layer in the model.
        norm: the layer.
        plain, activation: what it consists of, see :func:`_taken_apart`.
        new: what it becomes; None if it is that already.
        convs: the convolutions to standardize.
        unfed: why none is standardized though the option asks for it; empty if that is not so.
        frozen: whether the layer is frozen.
    """

    path: str
    norm: nn.Module
    plain: nn.Module
    activation: List[nn.Module]
    new: Optional[nn.Module]
    convs: List[nn.Module]
    unfed: str
    frozen: bool


def _plan(
    model: nn.Module,
    option: NormOption,
    keep_function: bool,
    data: Any,
    example_inputs: Any,
    pairs: Mapping[str, Optional[str]],
    unfed: str,
) -> Tuple[List[_Change], Set[nn.Module]]:
    """Whatever can go wrong does so here, where nothing is changed yet.

    Returns:
        The changes, and the modules that call layers for one feature level after the other.
    """
    found = _find(model)
    if option.weight_standardization:
        _check_pairs(model, found, pairs)
    heads = _levels_in_heads(model)
    followed: Dict[nn.Module, List[nn.Module]] = {}
    if example_inputs is not None:
        names = {norm: places[0][0] for norm, places in found.items()}
        followed, levels = followed_convolutions(model, names, example_inputs)
        heads = {**{norm: (model, number) for norm, number in levels.items()}, **heads}
    _check_groups(option, found)
    changes = []
    for norm, places in found.items():
        path, parent, _ = places[0]
        path = path or "the model"
        if type(norm) not in _CONVERTED and not _is_timm(norm):
            raise TypeError(
                f"cannot convert {path}, a {type(norm).__module__}.{type(norm).__name__}: it is "
                "derived from a normalization layer and may do more than that. Other parts of the "
                "model can be converted one by one."
            )
        plain, activation = _taken_apart(norm)
        frozen = _is_frozen(plain, parent)
        change = _Change(path, norm, plain, activation, None, [], "", frozen)
        changes.append(change)
        try:
            for place in places if norm not in followed else ():
                _check_shape(model, place[0], plain)
            if option.weight_standardization:
                change.convs, change.unfed = _feeding_convolutions(
                    model, norm, places, followed, pairs
                )
            if change.unfed and unfed == "leave":
                continue
            change.new = _successor(plain, option, heads.get(norm, (model, 1))[1], change.frozen)
        except ValueError as error:
            raise ValueError(f"cannot convert {path}: {error}") from error
        if change.new is not None:
            like = _reference(norm, parent or norm, model)
            change.new.to(device=like.device, dtype=like.dtype)
            change.new.train(norm.training).requires_grad_(not change.frozen)
    observed = _observations(model, changes, data) if keep_function else {}
    for change in changes:
        if change.new is not None:
            _carry(change.plain, change.new, keep_function, observed.get(change.norm))
        if change.activation:
            parts = [change.new or change.plain, *change.activation]
            change.new = nn.Sequential(*parts).train(change.norm.training)
        elif change.new is None and change.plain is not change.norm:
            change.new = change.plain
    return changes, {head for head, _ in heads.values()}


def _observations(
    model: nn.Module, changes: List[_Change], data: Any
) -> Dict[nn.Module, List[Observation]]:
    """Of the layers that have no statistics, which those that they become need.

    Raises:
        ValueError: if there are such, and no data.
    """
    lacking = [
        change
        for change in changes
        if isinstance(change.new, (BatchChannelNorm, *_BATCH_NORMS))
        and (
            getattr(change.plain, "running_mean", None) is None
            and not isinstance(change.plain, CycleBatchNormList)
            or isinstance(change.plain, nn.InstanceNorm2d)
        )
        and not (isinstance(change.plain, _TRAINABLE_BATCH_NORMS) and type(change.new) in CYCLED)
    ]
    if not lacking:
        return {}
    if data is None:
        kinds = [f"{type(c.plain).__name__} {c.path}" for c in lacking]
        raise ValueError(
            f"keep_function: {type(lacking[0].new).__name__} needs statistics, which "
            f"{len(lacking)} layers do not have ({_some(kinds)}): give data to take them from, or "
            "choose a norm without statistics (GN, CN)"
        )
    return observe(
        model,
        {change.norm: change.path for change in lacking},
        {change.norm: _num_levels(cast(nn.Module, change.new)) for change in lacking},
        data,
    )


def _is_timm(norm: nn.Module) -> bool:
    kind = type(norm)
    return kind.__name__ in _TIMM and kind.__module__.partition(".")[0] == "timm"


def _taken_apart(norm: nn.Module) -> Tuple[nn.Module, List[nn.Module]]:
    """A layer without the activation that it contains, with the same parameters and buffers; and
    what it does to its result."""
    if type(norm) in _CONVERTED:
        return norm, []
    kind = _TIMM[type(norm).__name__]
    if kind is nn.GroupNorm:
        plain = kind(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
    elif kind is FrozenBatchNorm2d:
        plain = kind(_num_channels(norm), norm.eps)
    else:
        arguments = (norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        plain = kind(norm.num_features, *arguments)
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    activation = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return plain.train(norm.training), activation


def _find(model: nn.Module) -> Dict[nn.Module, List[_Place]]:
    """The normalization layers of a model, and all places where each is registered."""
    places: Dict[nn.Module, List[_Place]] = {}
    if isinstance(model, _CONVERTED) or _is_timm(model):
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
            if isinstance(child, _CONVERTED) or _is_timm(child):
                path = f"{prefix}.{name}" if prefix else name
                places.setdefault(child, []).append((path, parent, name))
    return places


def _levels_in_heads(model: nn.Module) -> Dict[nn.Module, Tuple[nn.Module, int]]:
    """The layers that feature levels share in heads that are known, with the head, and how many."""
    levels = {head: levels_of(head) for head in model.modules()}
    for detector in model.modules():
        if isinstance(detector, (RetinaNet, FCOS)):
            levels[detector.head] = len(detector.anchor_generator.sizes)
    return {
        norm: (head, number)
        for head, number in levels.items()
        if number > 1
        for norm in head.modules()
    }


def _check_groups(option: NormOption, norms: Mapping[nn.Module, List[_Place]]) -> None:
    channels = [_num_channels(norm) for norm in norms]
    for number, places in zip(channels, norms.values()):
        try:
            option.check_channels(number, *channels)
        except ValueError as error:
            raise ValueError(f"cannot convert {places[0][0] or 'the model'}: {error}") from error


def _check_shape(model: nn.Module, path: str, norm: nn.Module) -> None:
    if type(norm) is not nn.GroupNorm or not path:  # others take feature maps only
        return
    previous, certain = preceding_layer(path_of(model, path))
    # What a module of its own class has registered before is not always what it calls before: the
    # blocks of diffusion models have a Linear there, for something else.
    if isinstance(previous, _OF_OTHER_SHAPES if certain else _OF_OTHER_SHAPES[1:]):
        raise ValueError(
            f"it follows a {type(previous).__name__}, and not feature maps of shape (N, C, H, W). "
            "Other parts of the model can be converted one by one."
        )


def _check_pairs(
    model: nn.Module,
    norms: Mapping[nn.Module, List[_Place]],
    pairs: Mapping[str, Optional[str]],
) -> None:
    paths = [place[0] for places in norms.values() for place in places]
    modules = dict(model.named_modules(remove_duplicate=False))
    for norm, conv in pairs.items():
        if norm not in paths:
            raise ValueError(f"pairs: {norm!r} is none of the layers to convert: {_some(paths)}")
        if conv is not None and not (conv in modules and is_convolution(modules[conv])):
            found = type(modules[conv]).__name__ if conv in modules else "not in the model"
            raise ValueError(
                f"pairs: {norm!r}: {conv!r} is {found}, and no convolution that can be standardized"
            )


def _feeding_convolutions(
    model: nn.Module,
    norm: nn.Module,
    places: List[_Place],
    followed: Mapping[nn.Module, List[nn.Module]],
    pairs: Mapping[str, Optional[str]],
) -> Tuple[List[nn.Module], str]:
    """The convolutions to standardize, one for each place, and why there is none if so."""
    convs: Dict[nn.Module, None] = {}
    unfed: List[str] = []
    for path, parent, _ in places:
        if parent is None:
            raise ValueError(
                "'+WS' needs the convolution before the layer, but there is the layer only"
            )
        if path in pairs:
            conv, why = pairs[path], "as pairs say"
            found = [] if conv is None else [model.get_submodule(conv)]
        elif norm in followed and not is_convolution(parent):
            found, why = followed[norm], "gets the output of no convolution"
        else:
            found, why = [], ""
            try:
                found = [feeding_convolution(path_of(model, path), _num_channels(norm))]
            except NotFed as error:
                why = str(error)
            except ValueError as error:
                raise ValueError(
                    f"it has {_num_channels(norm)} channels and {error}. Say what feeds it: "
                    f"pairs={{{path!r}: 'NAME OF THE CONVOLUTION'}}, None for none; or give "
                    "example_inputs"
                ) from error
        if any(weights_per_filter(conv) == 1 for conv in found):
            found, why = [], ONE_WEIGHT
        convs.update(dict.fromkeys(found))
        if not found:
            unfed.append(why)
    return list(convs), "; ".join(dict.fromkeys(unfed))


def _some(names: List[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
    elif kind in CYCLED and levels > 1 and frozen:
        raise ValueError(
            f"it is frozen, and {kind.__name__} for {levels} feature levels cannot be; make its "
            "parameters trainable first"
        )
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


def _carry(
    norm: nn.Module,
    new: nn.Module,
    keep_function: bool,
    observed: Optional[List[Observation]] = None,
) -> None:
    """Gives a new layer what the old one has learned. The old one is not changed."""
    if observed is None and isinstance(norm, _TRAINABLE_BATCH_NORMS) and type(new) in CYCLED:
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
        if keep_function and observed is None:
            _match_channel_norm(new)
    if observed is not None:
        _take_statistics(new, observed, None if is_zero else second)
        if isinstance(new, BatchChannelNorm) and not is_zero:
            _match_channel_norm(new)


def _take_statistics(
    new: nn.Module,
    observed: List[Observation],
    affine: Optional[Tuple[Optional[Tensor], Optional[Tensor]]],
) -> None:
    """Gives a new layer statistics, and the affine with which it computes what the old one does of
    an image that is as all are on average.

    The old one computes ``weight * (x - own_mean) / own_std + bias``, the new one
    ``w * (x - mean) / std + b``, so that w is ``weight * std / own_std`` and b is
    ``bias + weight * (mean - own_mean) / own_std``; on average over feature levels.
    """
    layers = new if isinstance(new, CycleBatchNormList) else [new]
    for key in ("running_mean", "running_var"):
        values = torch.stack([getattr(o, key[len("running_") :]) for o in observed])
        for layer, value in zip(layers, values if len(layers) > 1 else [values]):
            target = getattr(layer, key)
            target.copy_(value.view_as(target))
    if affine is None:
        return
    eps = layers[0].eps
    own_std = torch.stack([torch.sqrt(o.own_var + eps) for o in observed])
    scale = (torch.stack([torch.sqrt(o.var + eps) for o in observed]) / own_std).mean(0)
    shift = (torch.stack([o.mean - o.own_mean for o in observed]) / own_std).mean(0)
    weight = torch.ones_like(scale) if affine[0] is None else _per_channel(affine[0], new).double()
    bias = torch.zeros_like(scale) if affine[1] is None else _per_channel(affine[1], new).double()
    for key, value in (("weight", weight * scale), ("bias", bias + weight * shift)):
        target = getattr(new, key)
        if isinstance(target, nn.Parameter):  # perhaps that of the old layer
            setattr(new, key, nn.Parameter(value.to(target), target.requires_grad))
        else:
            target.copy_(value)


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
        target.copy_(_per_channel(value, new).unflatten(0, (len(target), -1)).mean(1))


def _per_channel(value: Tensor, norm: nn.Module) -> Tensor:
    return value.repeat_interleave(_num_channels(norm) // len(value))


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
    weight = conv.weight
    if isinstance(conv, nn.ConvTranspose2d):
        weight = outputs_first(weight, conv.groups)
    conv.ws_scale, conv.ws_shift = adaptation(weight, conv.eps)
