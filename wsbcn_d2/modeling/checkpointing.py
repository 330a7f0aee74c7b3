"""Activation checkpointing: parts of a model keep only their input for the backward pass, and run
there again. Less memory, more time, the same gradients.

It is PyTorch's, ``torch.utils.checkpoint``. What is added here is which parts of Detectron2's
models it is good for, and that nothing is learned twice: :class:`BatchChannelNorm` sees to that
itself (:mod:`wsbcn_d2.ops.recomputation`), for BatchNorm see :class:`_Repetition`.

A part remains the same object, and gets a class derived from its own, so that names and state dicts
stay as they are.
"""

import contextlib
import copy
import functools
import logging
from collections import Counter
from itertools import chain
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple, Type

import torch
from detectron2.layers import CNNBlockBase, CycleBatchNormList
from detectron2.modeling import FPN
from detectron2.modeling.meta_arch import FCOS, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .heads import FusedConvUpsampleHead, run_layers

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

# From the one that needs most memory to the one that needs least.
CHECKPOINTED = ("", "backbone", "all")

# The layers of PyTorch that may have running statistics.
_LEARNING = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
# How many regions the last layers of the mask head take at a time, and the losses of RetinaNet and
# FCOS how many anchors of each image.
_REGIONS, _ANCHORS = 32, 2**15
# The methods that are known to treat regions one by one after the convolutions, and to be sums over
# anchors.
_MASK_LAYERS = (MaskRCNNConvUpsampleHead.layers, FusedConvUpsampleHead.layers)
_DENSE_LOSSES = (RetinaNet.losses, FCOS.losses)


def checkpoint_activations_(model: nn.Module, what: str = "all") -> None:
    """Chooses which parts of a model run again in the backward pass of training, in place.

    ``"backbone"``: stem and residual blocks of ResNets (and RegNets), one by one, also those of a
    C4 head. ``"all"``: besides, the FPN, the RPN head and the heads of RetinaNet and FCOS level by
    level, their losses, box, mask and keypoint heads, and the levels of the semantic head of
    Panoptic FPN.
    ``""``: none, as it was built.

    Losses and gradients are the same to rounding, estimates and running statistics move once.
    Names of parameters, state dicts and optimizers are not affected, so it can be called at any
    time; each call replaces what an earlier one has chosen. Parts that are frozen, or not in
    training mode, run as ever.

    Args:
        model: a model of Detectron2, or a part of one, such as ``model.backbone``.
        what: one of :data:`CHECKPOINTED`.

    Raises:
        ValueError: if ``what`` is another word, or the model has no such part. It is unchanged.
    """
    if what not in CHECKPOINTED:
        allowed = ", ".join(map(repr, CHECKPOINTED))
        raise ValueError(f"what to checkpoint: {what!r} is not one of {allowed}")
    parts = dict(_parts_of(model, what))
    if what and not parts:
        raise ValueError(
            f"{type(model).__name__} has no part that can be checkpointed for {what!r}: no ResNet"
            + (", and none of Detectron2's FPN and heads" if what == "all" else "")
        )
    for module in model.modules():
        if isinstance(module, _Part):
            module.__class__ = module.computed_class
    kinds = Counter(type(part).__name__ for part in parts)
    for part, kind in parts.items():
        part.__class__ = _checkpointed_class(type(part), kind)
    if parts:
        counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
        logger.info(f"Activation checkpointing of {what!r}: {counts}")


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """For the time of the context, parts have the classes that they would have without
    checkpointing, and may become of others."""
    parts = [module for module in model.modules() if isinstance(module, _Part)]
    kinds = [type(part).kind for part in parts]
    for part in parts:
        part.__class__ = part.computed_class
    try:
        yield
    finally:
        for part, kind in zip(parts, kinds):
            part.__class__ = _checkpointed_class(type(part), kind)


# ------------------------------------------------------------------------------- classes of parts


class _Part:
    """What is derived from it comes before the class of a part, and checkpoints one method of it.

    Attributes:
        computed_class: the class without checkpointing.
        kind: the class derived from this one.
    """

    computed_class: Type[nn.Module]
    kind: "Type[_Part]"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made at run time have no place where pickle could find them.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, (self.computed_class, self.kind), *state)


class _CheckpointedForward(_Part):
    """Of one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, super().forward, x)


class _CheckpointedLayers(_Part):
    """Of a mask or keypoint head, whose ``forward`` computes the loss, too."""

    def layers(self, x: Tensor) -> Tensor:
        return _run(self, super().layers, x)


class _CheckpointedMaskHead(_Part):
    """Of Detectron2's mask head: the convolutions, and then, for some regions at a time, what makes
    the maps four times as large, and needs most."""

    def layers(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().layers(x)
        layers, count = list(self), len(self.conv_norm_relus)
        x = _run(self, functools.partial(run_layers, layers[:count]), x)
        upsample = functools.partial(run_layers, layers[count:])
        return torch.cat([_run(self, upsample, regions) for regions in x.split(_REGIONS)])


class _CheckpointedLevels(_Part):
    """Of a head whose outputs are lists with an element for each feature map."""

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        of_levels, forward = super().forward, lambda x: of_levels([x])
        levels = [_run(self, forward, x) for x in features]
        return tuple(list(chain(*outputs)) for outputs in zip(*levels))


class _CheckpointedFPN(_Part):
    """Of an FPN: convolution by convolution, so that one map of the highest resolution is made
    again at a time."""

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        # Its forward takes the convolutions from plain lists. They cannot be parts themselves:
        # their class tells whether they can be standardized.
        fpn = copy.copy(self)
        for name in ("lateral_convs", "output_convs"):
            setattr(fpn, name, [functools.partial(_run, c, c) for c in getattr(self, name)])
        return super(_CheckpointedFPN, fpn).forward(x)


class _CheckpointedLosses(_Part):
    """Of RetinaNet or FCOS, with some ten tensors of the size of the logits: sums over anchors,
    taken for some anchors at a time, and then divided by an average of how many have an object."""

    def losses(
        self,
        anchors: List[Boxes],
        logits: List[Tensor],
        labels: List[Tensor],
        deltas: List[Tensor],
        boxes: List[Tensor],
        *centerness: List[Tensor],
    ) -> Dict[str, Tensor]:
        sums, averaged = copy.copy(self), {}
        sums.__class__ = self.computed_class

        def not_divided(name: str, value: float, initial_value: float) -> float:
            averaged.update(name=name, initial_value=initial_value)
            return 1.0

        sums._ema_update = not_divided

        def of_levels(levels: List[Tensor]) -> List[Tensor]:
            return [part for level in levels for part in level.split(_ANCHORS, dim=1)]

        def of_images(images: List[Tensor]) -> Iterable[Tuple[Tensor, ...]]:
            return zip(*(image.split(counts) for image in images))

        def losses_of(anchors, logits, labels, deltas, boxes, *centerness):  # type: ignore
            with EventStorage():  # which nobody reads
                return sums.losses(
                    [kind(anchors)], [logits], labels, [deltas], boxes, *([c] for c in centerness)
                )

        counts, kind = [part.shape[1] for part in of_levels(logits)], type(anchors[0])
        parts = zip(
            kind.cat(anchors).tensor.split(counts),
            of_levels(logits),
            of_images(labels),
            of_levels(deltas),
            of_images(boxes),
            *map(of_levels, centerness),
        )
        totals: Dict[str, Any] = Counter()
        for part in parts:
            for name, loss in checkpoint(losses_of, *part, use_reentrant=False).items():
                totals[name] = totals[name] + loss
        found = sum(int(((label >= 0) & (label != self.num_classes)).sum()) for label in labels)
        get_event_storage().put_scalar("num_pos_anchors", found / len(labels))
        normalizer = self._ema_update(value=max(found, 1), **averaged)
        return {name: loss / normalizer for name, loss in totals.items()}


@functools.lru_cache(maxsize=None)
def _checkpointed_class(computed: Type[nn.Module], kind: Type[_Part]) -> Type[nn.Module]:
    own = {"__module__": __name__, "computed_class": computed, "kind": kind}
    return type(f"Checkpointed{computed.__name__}", (kind, computed), own)


def _new(computed: Type[nn.Module], kind: Type[_Part]) -> nn.Module:
    cls = _checkpointed_class(computed, kind)
    return cls.__new__(cls)


# ------------------------------------------------------------------------------------------- parts


def _parts_of(model: nn.Module, what: str) -> Iterator[Tuple[nn.Module, Type[_Part]]]:
    """The parts of a model, and what each is to become."""
    for module in model.modules():
        computed = getattr(module, "computed_class", type(module))
        if what and isinstance(module, CNNBlockBase):
            yield module, _CheckpointedForward
        if what != "all":
            continue
        if isinstance(module, FPN):
            yield module, _CheckpointedFPN
        elif isinstance(module, RetinaNet | FCOS) and computed.losses in _DENSE_LOSSES:
            yield module, _CheckpointedLosses
        elif isinstance(module, StandardRPNHead):
            yield module, _CheckpointedLevels
        elif isinstance(module, RetinaNetHead):  # or FCOSHead
            yield module.cls_subnet, _CheckpointedForward
            yield module.bbox_subnet, _CheckpointedForward
        elif isinstance(module, FastRCNNConvFCHead):
            yield module, _CheckpointedForward
        elif isinstance(module, MaskRCNNConvUpsampleHead) and computed.layers in _MASK_LAYERS:
            yield module, _CheckpointedMaskHead
        elif isinstance(module, (BaseMaskRCNNHead, BaseKeypointRCNNHead)):
            yield module, _CheckpointedLayers
        elif isinstance(module, SemSegFPNHead):
            yield from ((level, _CheckpointedForward) for level in module.scale_heads)


def _run(part: nn.Module, function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``, which is of ``part`` and has its parameters."""
    recorded = (
        part.training
        and torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and any(t.requires_grad for t in chain(inputs, part.parameters()))
    )
    if not recorded:
        return function(*inputs)
    options: Dict[str, Any] = {}
    repetition = _Repetition(part)
    if repetition.needed:
        options["context_fn"] = lambda: (contextlib.nullcontext(), repetition)
    return checkpoint(function, *inputs, use_reentrant=False, **options)


class _Repetition:
    """The context in which a call of a part is repeated: what its BatchNorm layers learn is thrown
    away, and those that cycle through feature levels are at the level of the call."""

    def __init__(self, part: nn.Module) -> None:
        """
        Args:
            part: which is about to be called.
        """
        norms = (m for m in part.modules() if isinstance(m, _LEARNING))
        self._learning = [m for m in norms if m.training and m.running_mean is not None]
        cycles = (m for m in part.modules() if isinstance(m, CycleBatchNormList))
        self._levels = {cycle: cycle._pos for cycle in cycles}

    @property
    def needed(self) -> bool:
        """Whether there is such a layer."""
        return bool(self._learning or self._levels)

    def __enter__(self) -> None:
        self._statistics = [dict(norm._buffers) for norm in self._learning]
        self._present = {cycle: cycle._pos for cycle in self._levels}
        for norm, statistics in zip(self._learning, self._statistics):
            norm._buffers.update({name: value.clone() for name, value in statistics.items()})
        for cycle, level in self._levels.items():
            cycle._pos = level

    def __exit__(self, *_: Any) -> None:
        for norm, statistics in zip(self._learning, self._statistics):
            norm._buffers.update(statistics)
        for cycle, level in self._present.items():
            cycle._pos = level
