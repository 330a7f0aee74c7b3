"""The names of weights in other projects, and their counterparts in Detectron2.

Where each layout was looked up:

- ``torchvision``: torchvision.models.resnet, whose names the authors' ImageNet models have too
  (github.com/joe-siyuan-qiao/WeightStandardization and its pytorch-classification;
  Batch-Channel-Normalization, imagenet/models: the norm ``bn1`` has ``weight`` and ``bias`` of
  shape (1, 32, 1) and a BatchNorm ``pbn``);
- ``mmdetection``: version 2.x, configs/gn+ws (mmdet.models: ResNet, FPN, RPNHead,
  Shared4Conv1FCBBoxHead, FCNMaskHead; mmcv.cnn.ConvModule, whose norm is ``gn`` or ``bn``);
- ``maskrcnn-benchmark``: the authors' fork, github.com/joe-siyuan-qiao/maskrcnn-benchmark (ResNet
  with ``BottleneckWithGN``, ``make_layers.py``, ``FPNXconv1fcFeatureExtractor``,
  ``MaskRCNNFPNFeatureExtractor``, ``MaskRCNNC4Predictor``);
- ``detectron2``: Detectron2's own, and its Caffe2 names, which it renames itself.

The detectors of the other projects are those with an FPN.
"""

import re
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

# What the state dict of a standardized convolution of this package has beside its weight.
WS_ENTRIES = ("ws_eps", "ws_scale", "ws_shift")


@dataclass(frozen=True)
class Layout:
    """One way to name the weights of a model.

    Attributes:
        name: for messages and options.
        marks: patterns; the names of a checkpoint of this layout match all of them.
        rules: patterns with their replacements, for whole names; the first that matches counts.
        transforms: for names in Detectron2, what to do to the tensor.
        formula: of the weight standardization that its models have, see :mod:`.formulas`; None if
            they have none, or not all of them.
        ambiguous: whether others, without weight standardization, have the same names.
        ignored: patterns of names that have no counterpart.
    """

    name: str
    marks: Tuple[str, ...]
    rules: Tuple[Tuple[str, str], ...]
    formula: Optional[str] = None
    ambiguous: bool = False
    transforms: Tuple[Tuple[str, Transform], ...] = ()
    ignored: Tuple[str, ...] = (r".*num_batches_tracked",)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether these are names of this layout."""
        names = list(names)
        return all(any(re.fullmatch(mark, name) for name in names) for mark in self.marks)

    def rename(self, name: str) -> Optional[str]:
        """The name in Detectron2; None if there is none.

        For the weights of a ResNet it begins with the stage (``stem``, ``res2``, ...): where the
        stage is depends on the model.
        """
        module, _, entry = name.rpartition(".")
        if entry in WS_ENTRIES:  # beside the weight, in models that this package has converted
            weight = self._renamed(f"{module}.weight")
            return weight and f"{weight[: -len('weight')]}{entry}"
        return self._renamed(name)

    def _renamed(self, name: str) -> Optional[str]:
        for pattern, replacement in self.rules:
            match = re.fullmatch(pattern, name)
            if match:
                return re.sub(
                    r"\{(\w+)\+(\d+)\}",
                    lambda m: str(int(match[m[1]]) + int(m[2])),
                    match.expand(replacement),
                )
        return None

    def transform(self, name: str, value: Tensor) -> Tensor:
        """The tensor for a name in Detectron2."""
        for pattern, function in self.transforms:
            if re.fullmatch(pattern, name):
                value = function(value)
        return value

    def ignores(self, name: str) -> bool:
        """Whether nothing is lost without this tensor."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


_AFFINE = "(?P<p>weight|bias|running_mean|running_var)"


def _resnet(prefix: str, norms: str) -> Tuple[Tuple[str, str], ...]:
    """Rules for a ResNet with torchvision's names.

    Args:
        prefix: pattern of what is before them.
        norms: pattern of the names of norms, without the number: ``bn`` or ``gn``.
    """
    block = rf"{prefix}layer(?P<s>\d)\.(?P<b>\d+)\."
    to = r"res{s+1}.\g<b>."
    return (
        (rf"{prefix}(?:stem\.)?conv1\.weight", "stem.conv1.weight"),
        (rf"{prefix}(?:stem\.)?{norms}1\.{_AFFINE}", r"stem.conv1.norm.\g<p>"),
        (block + r"conv(?P<c>\d)\.weight", to + r"conv\g<c>.weight"),
        (block + rf"{norms}(?P<c>\d)\.{_AFFINE}", to + r"conv\g<c>.norm.\g<p>"),
        (block + r"downsample\.0\.weight", to + "shortcut.weight"),
        (block + rf"downsample\.1\.{_AFFINE}", to + r"shortcut.norm.\g<p>"),
    )


def _bcn_resnet() -> Tuple[Tuple[str, str], ...]:
    """Those of the authors' BCN models: the norm itself is the channel normalization."""
    rules: List[Tuple[str, str]] = []
    for pattern, replacement in _resnet("", "bn"):
        if r"\g<p>" not in replacement:
            rules.append((pattern, replacement))
            continue
        stem = pattern[: -len(_AFFINE)]
        rules.append((stem + rf"pbn\.{_AFFINE}", replacement))
        rules.append((stem + "(?P<p>weight|bias)", replacement.replace(r"\g<p>", r"group_\g<p>")))
    return tuple(rules)


def _background_last(value: Tensor) -> Tensor:
    return torch.cat([value[1:], value[:1]])


_MASKRCNN_BENCHMARK_HEADS = (
    (r"backbone\.fpn\.fpn_inner(?P<i>\d)\.0\.(?P<p>\w+)", r"backbone.fpn_lateral{i+1}.\g<p>"),
    (r"backbone\.fpn\.fpn_inner(?P<i>\d)\.1\.(?P<p>\w+)", r"backbone.fpn_lateral{i+1}.norm.\g<p>"),
    (r"backbone\.fpn\.fpn_layer(?P<i>\d)\.0\.(?P<p>\w+)", r"backbone.fpn_output{i+1}.\g<p>"),
    (r"backbone\.fpn\.fpn_layer(?P<i>\d)\.1\.(?P<p>\w+)", r"backbone.fpn_output{i+1}.norm.\g<p>"),
    (r"rpn\.head\.conv\.(?P<p>\w+)", r"proposal_generator.rpn_head.conv.\g<p>"),
    (r"rpn\.head\.cls_logits\.(?P<p>\w+)", r"proposal_generator.rpn_head.objectness_logits.\g<p>"),
    (r"rpn\.head\.bbox_pred\.(?P<p>\w+)", r"proposal_generator.rpn_head.anchor_deltas.\g<p>"),
    # convolution, norm and ReLU of each layer follow one another
    *(
        rule
        for i in range(8)
        for rule in (
            (
                rf"roi_heads\.box\.feature_extractor\.xconvs\.{3 * i}\.(?P<p>\w+)",
                rf"roi_heads.box_head.conv{i + 1}.\g<p>",
            ),
            (
                rf"roi_heads\.box\.feature_extractor\.xconvs\.{3 * i + 1}\.(?P<p>\w+)",
                rf"roi_heads.box_head.conv{i + 1}.norm.\g<p>",
            ),
        )
    ),
    (r"roi_heads\.box\.feature_extractor\.fc6\.(?P<p>\w+)", r"roi_heads.box_head.fc1.\g<p>"),
    (
        r"roi_heads\.box\.predictor\.(?P<l>cls_score|bbox_pred)\.(?P<p>\w+)",
        r"roi_heads.box_predictor.\g<l>.\g<p>",
    ),
    (
        r"roi_heads\.mask\.feature_extractor\.(?P<l>mask_fcn\d)\.0\.(?P<p>\w+)",
        r"roi_heads.mask_head.\g<l>.\g<p>",
    ),
    (
        r"roi_heads\.mask\.feature_extractor\.(?P<l>mask_fcn\d)\.1\.(?P<p>\w+)",
        r"roi_heads.mask_head.\g<l>.norm.\g<p>",
    ),
    (r"roi_heads\.mask\.predictor\.conv5_mask\.(?P<p>\w+)", r"roi_heads.mask_head.deconv.\g<p>"),
    (
        r"roi_heads\.mask\.predictor\.mask_fcn_logits\.(?P<p>\w+)",
        r"roi_heads.mask_head.predictor.\g<p>",
    ),
)

_MMDETECTION_HEADS = (
    (r"neck\.lateral_convs\.(?P<i>\d)\.conv\.(?P<p>\w+)", r"backbone.fpn_lateral{i+2}.\g<p>"),
    (r"neck\.lateral_convs\.(?P<i>\d)\.[gb]n\.(?P<p>\w+)", r"backbone.fpn_lateral{i+2}.norm.\g<p>"),
    (r"neck\.fpn_convs\.(?P<i>\d)\.conv\.(?P<p>\w+)", r"backbone.fpn_output{i+2}.\g<p>"),
    (r"neck\.fpn_convs\.(?P<i>\d)\.[gb]n\.(?P<p>\w+)", r"backbone.fpn_output{i+2}.norm.\g<p>"),
    (r"rpn_head\.rpn_conv\.(?P<p>\w+)", r"proposal_generator.rpn_head.conv.\g<p>"),
    (r"rpn_head\.rpn_cls\.(?P<p>\w+)", r"proposal_generator.rpn_head.objectness_logits.\g<p>"),
    (r"rpn_head\.rpn_reg\.(?P<p>\w+)", r"proposal_generator.rpn_head.anchor_deltas.\g<p>"),
    (
        r"roi_head\.bbox_head\.shared_convs\.(?P<i>\d)\.conv\.(?P<p>\w+)",
        r"roi_heads.box_head.conv{i+1}.\g<p>",
    ),
    (
        r"roi_head\.bbox_head\.shared_convs\.(?P<i>\d)\.[gb]n\.(?P<p>\w+)",
        r"roi_heads.box_head.conv{i+1}.norm.\g<p>",
    ),
    (
        r"roi_head\.bbox_head\.shared_fcs\.(?P<i>\d)\.(?P<p>\w+)",
        r"roi_heads.box_head.fc{i+1}.\g<p>",
    ),
    (r"roi_head\.bbox_head\.fc_cls\.(?P<p>\w+)", r"roi_heads.box_predictor.cls_score.\g<p>"),
    (r"roi_head\.bbox_head\.fc_reg\.(?P<p>\w+)", r"roi_heads.box_predictor.bbox_pred.\g<p>"),
    (
        r"roi_head\.mask_head\.convs\.(?P<i>\d)\.conv\.(?P<p>\w+)",
        r"roi_heads.mask_head.mask_fcn{i+1}.\g<p>",
    ),
    (
        r"roi_head\.mask_head\.convs\.(?P<i>\d)\.[gb]n\.(?P<p>\w+)",
        r"roi_heads.mask_head.mask_fcn{i+1}.norm.\g<p>",
    ),
    (r"roi_head\.mask_head\.upsample\.(?P<p>\w+)", r"roi_heads.mask_head.deconv.\g<p>"),
    (r"roi_head\.mask_head\.conv_logits\.(?P<p>\w+)", r"roi_heads.mask_head.predictor.\g<p>"),
)

_CLASSIFIER = (r"fc\.\w+", r".*num_batches_tracked")

LAYOUTS: Dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "authors-bcn-ws",
            (r"conv1\.weight", r"bn1\.pbn\.weight", r"layer1\.0\.conv1\.weight"),
            _bcn_resnet(),
            formula="bcn",
            transforms=((r".*\.norm\.group_(?:weight|bias)", torch.flatten),),
            ignored=_CLASSIFIER,
        ),
        Layout(
            "torchvision-bn",
            (r"conv1\.weight", r"bn1\.running_mean", r"layer1\.0\.conv1\.weight"),
            _resnet("", "bn"),
            ignored=_CLASSIFIER,
        ),
        Layout(
            "authors-gn-ws",
            (r"conv1\.weight", r"[gb]n1\.weight", r"layer1\.0\.conv1\.weight"),
            _resnet("", "[gb]n"),  # OpenMMLab's copies have gn1
            formula="gn",
            ambiguous=True,
            ignored=_CLASSIFIER,
        ),
        Layout(
            "mmdetection",
            (r"backbone\.layer1\.0\.conv1\.weight", r"roi_head\.bbox_head\..*"),
            _resnet(r"backbone\.", "[gb]n") + _MMDETECTION_HEADS,
            ambiguous=True,
        ),
        Layout(
            "maskrcnn-benchmark",
            (r"backbone\.body\.layer1\.0\.conv1\.weight", r"rpn\.head\.conv\.weight"),
            _resnet(r"backbone\.body\.", "bn") + _MASKRCNN_BENCHMARK_HEADS,
            ambiguous=True,
            transforms=(
                (r"roi_heads\.box_predictor\.cls_score\.\w+", _background_last),
                # no box for the background, and no mask
                (r"roi_heads\.box_predictor\.bbox_pred\.\w+", lambda value: value[4:]),
                (r"roi_heads\.mask_head\.predictor\.\w+", lambda value: value[1:]),
            ),
            ignored=(r".*num_batches_tracked", r"rpn\.anchor_generator\..*"),
        ),
        Layout(
            "detectron2",
            (r"(?:backbone\.bottom_up\.|backbone\.)?stem\.conv1\.weight",),
            ((r".*", r"\g<0>"),),
            ignored=(
                r".*num_batches_tracked",
                r"pixel_(?:mean|std)",
                r".*anchor_generator\..*",
                r"(?:stem\.)?fc\..*",
                r".*fc1000.*",
                r"(?:.*\.)?stem\.conv1\.bias",  # of MSRA's, which Detectron2 does not use either
            ),
        ),
    )
}


def detect_layout(names: Iterable[str]) -> Optional[Layout]:
    """The layout of a checkpoint with these names; None if it is none of :data:`LAYOUTS`."""
    names = list(names)
    return next((layout for layout in LAYOUTS.values() if layout.matches(names)), None)
