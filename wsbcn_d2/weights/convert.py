"""Weights of other projects for a given Detectron2 model."""

import re
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn

from ..layers import BatchChannelNorm, ChannelNorm, WeightStandardized, adaptation, outputs_first
from ..layers.folded import refuse_folded
from .architecture import keys_that_fit
from .files import Checkpoint, checkpoint_of
from .formulas import FORMULAS, rescaled_weight, source_filters
from .layouts import LAYOUTS, Layout, detect_layout
from .mmdetection import parts_by_standardization
from .training import as_options, differences, keys_of, trained_with

# What a model has without a checkpoint.
_NOT_TRAINED = r"pixel_(?:mean|std)|.*anchor_generator\..*|.*\.num_batches_tracked"

# What has several parts in it, which may be converted without each other.
_CONTAINERS = ("roi_head", "roi_heads")


class ConversionError(ValueError):
    """A checkpoint that cannot be converted for a model."""


@dataclass
class ConversionReport:
    """What became of every weight.

    Attributes:
        layout: name of the layout of the checkpoint.
        formula: of its weight standardization; None if it has none.
        taken: names in the checkpoint and in Detectron2.
        filters: what was done to the filters of convolutions, and to how many of them.
        initialized: weights of the model that the checkpoint cannot have and that start anew.
        left_over: names in the checkpoint that the model has no place for.
        missing: names of the model that should have been in the checkpoint.
        other_norms: norms, by their names in the model, with entries in the checkpoint that the
            model has no place for: it has norms of another kind after these convolutions, or none.
        trained_with: what the weights were trained with, by keys of the config, as far as known.
        origin: how that is known, or what is assumed.
        fitting: keys of the config with which the model has a place for all norms and heads of the
            checkpoint; empty if it has.
    """

    layout: str
    formula: Optional[str]
    taken: Dict[str, str] = field(default_factory=dict)
    filters: "Counter[str]" = field(default_factory=Counter)
    initialized: List[str] = field(default_factory=list)
    left_over: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)
    other_norms: List[str] = field(default_factory=list)
    trained_with: Dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    fitting: Dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        standardization = f"formula {self.formula!r}" if self.formula else "none"
        lines = [
            f"source: {self.layout}, weight standardization: {standardization}",
            " ".join(filter(None, ["trained with:", as_options(self.trained_with)]))
            + f" ({self.origin})",
            f"taken: {len(self.taken)}",
            *(f"  {source} -> {target}" for source, target in self.taken.items()),
            *(f"filters {what}: {count} convolutions" for what, count in self.filters.items()),
        ]
        for what in ("initialized", "left_over", "missing"):
            names = getattr(self, what)
            lines.append(f"{what.replace('_', ' ')}: {len(names)}")
            lines.extend(f"  {name}" for name in names)
        if self.other_norms:
            lines.append(
                f"warning: {len(self.other_norms)} norms of the file are of another kind in the "
                "model, or not there, so it does not compute what the source does"
            )
            lines.extend(f"  {name}" for name in self.other_norms)
        return "\n".join(lines)


def convert_state_dict(
    checkpoint: Union[Checkpoint, Mapping[str, Any]],
    model: nn.Module,
    layout: Optional[str] = None,
    formula: str = "auto",
    leave_out: Sequence[str] = (),
    trust_model: bool = False,
) -> Tuple[Dict[str, Tensor], ConversionReport]:
    """Makes a state dict for a model of what another project has trained.

    The model computes what the source does if its norms are of the same kind (else the report lists
    them), by these rules for convolutions:

    - the source standardizes and the model does: the filters are scaled so that our formula gives
      what the source's gives (:func:`wsbcn_d2.weights.formulas.rescaled_weight`);
    - only the source does: the filters are the standardized ones;
    - only the model does: scale and mean of the filters are kept beside them, as ``ws_scale`` and
      ``ws_shift``;

    and for norms: BatchNorm weights and statistics become those of the batch normalization in BCN,
    whose channel normalization starts as it is built and is new to the function.

    Args:
        checkpoint: from :func:`wsbcn_d2.weights.read_checkpoint`, or a state dict.
        model: the Detectron2 model to convert for; it is not changed.
        layout: a name in ``LAYOUTS``. Default: found out from the names.
        formula: the weight standardization of the source: one of ``FORMULAS``, "none", or "auto":
            what the file says, or the layout if it is given.
        leave_out: patterns, as of file names, of what may be left over in parts of the model that
            are converted: ``"*.se.*"``, for example.
        trust_model: whether the weights were trained with the format of images, the stride and the
            poolers of the model, whatever the file and its names tell.

    Returns:
        The state dict, under the names of the model, and the report. The report may list missing
        weights, in which case the state dict is not complete.

    Raises:
        ConversionError: if the layout is not known, the file does not say whether its filters are
            standardized, a shape differs, the model has no place for any of the weights, or for
            some of a part that others are converted for, it has other inputs, strides or poolers
            than they were trained with, or they come from a folded model.
        TypeError: if ``checkpoint`` is neither a Checkpoint nor a dictionary.
    """
    if isinstance(checkpoint, Mapping):
        checkpoint = checkpoint_of(dict(checkpoint), "the state dict")
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(
            "checkpoint must be what read_checkpoint returns, or a state dict; got a "
            + type(checkpoint).__name__
        )
    _refuse_folded(checkpoint, model)
    tensors = checkpoint.tensors
    if checkpoint.caffe2:
        tensors, _ = convert_c2_detectron_names(dict(tensors))
    source = _layout(tensors, layout)
    if formula == "auto" and layout is not None and source.formula is not None:
        formula = source.formula
    formula = _formula(source, tensors, checkpoint.text, formula)
    report = ConversionReport(source.name, formula)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stages = _stages(shapes)
    convs = {
        f"{name}.weight".lstrip("."): module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    state: Dict[str, Tensor] = {}
    problems: List[str] = []
    in_file: Dict[str, Tuple[int, ...]] = {}
    for name, value in tensors.items():
        if source.ignores(name):
            continue
        target = source.rename(name)
        if target is None:
            report.left_over.append(name)
            continue
        target = _placed(target, stages)
        value = source.transform(target, value)
        in_file[target] = tuple(value.shape)
        if target.endswith(".ws_eps") and target not in shapes:
            raise ConversionError(
                f"{name}: the convolution was trained with weight standardization, which that of "
                "the model does not have: use a config with '+WS', or wsbcn_d2.fold"
            )
        if target not in shapes and not _is_adaptation(target, shapes):
            report.left_over.append(name)
            _note_other_norm(target, shapes, report)
            continue
        if target in shapes and in_file[target] != shapes[target]:
            problems.append(f"{name} {in_file[target]} does not fit {target} {shapes[target]}")
            continue
        state[target] = value
        report.taken[name] = target
    for name, module in model.named_modules():
        if f"{name}.weight" in state and f"{name}.running_mean" not in in_file:
            if _is_other_than_group_norm(module, source):
                report.other_norms.append(name)
    report.fitting = keys_that_fit(in_file, shapes)
    if trust_model:
        report.origin = "assumed: with the inputs and the stride of the model"
    else:
        report.trained_with, report.origin = trained_with(checkpoint, source.name)
    for name in list(state):
        if name in convs and state[name].dim() == 4:
            _convert_filters(name, convs[name], state, formula, report)
    _account_for_the_rest(model, shapes, stages, state, report)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    untrained = [name for name in report.initialized if name in frozen]
    _check(report, problems, untrained, keys_of(model), leave_out)
    return state, report


def _refuse_folded(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises ConversionError where loading the checkpoint into the model would be an error."""
    for name, module in model.named_modules():
        if isinstance(module, (BatchChannelNorm, ChannelNorm, WeightStandardized)):
            try:
                refuse_folded(checkpoint.metadata.get(name, {}), f"{name}.")
            except ValueError as error:
                raise ConversionError(str(error)) from error


def _layout(tensors: Dict[str, Tensor], name: Optional[str]) -> Layout:
    if name is not None:
        if name not in LAYOUTS:
            raise ConversionError(f"unknown layout {name!r}; allowed are {', '.join(LAYOUTS)}")
        return LAYOUTS[name]
    layout = detect_layout(tensors)
    if layout is None:
        names = ", ".join(list(tensors)[:5])
        raise ConversionError(
            f"the names ({names}, ...) are of no layout that is known: {', '.join(LAYOUTS)}"
        )
    return layout


def _formula(layout: Layout, names: Iterable[str], text: str, formula: str) -> Optional[str]:
    if formula not in (*FORMULAS, "none", "auto"):
        raise ConversionError(
            f"unknown formula {formula!r}; allowed are auto, none, {', '.join(FORMULAS)}"
        )
    if formula != "auto":
        return None if formula == "none" else formula
    if any(name.endswith(".ws_eps") for name in names):  # of a model of this package
        return None
    if not layout.ambiguous:
        return layout.formula
    if layout.name == "mmdetection" and text:  # its files contain their config
        standardized, others = parts_by_standardization(text)
        if standardized and others:
            raise ConversionError(
                f"the config in the file standardizes the filters of {', '.join(standardized)} and "
                f"not those of {', '.join(others)} (conv_cfg), which have norms, too. Files in "
                "which only some parts are standardized cannot be converted"
            )
        return "gn" if re.search(r"['\"]ConvWS['\"]", text) else None
    raise ConversionError(
        f"the names in the file, as in {layout.name}, do not tell whether its filters are "
        "standardized. Say it by the formula: none; gn, that of the GN+WS of the authors and of "
        "mmdetection; bcn; or paper"
    )


def _check(
    report: ConversionReport,
    shapes: List[str],
    untrained: List[str],
    built_with: Dict[str, Any],
    leave_out: Sequence[str],
) -> None:
    """
    Args:
        report: of all names.
        shapes: what is wrong with those of the weights.
        untrained: parameters of the model that start anew and are frozen.
        built_with: what the model was built with, by keys of the config.
        leave_out: see :func:`convert_state_dict`.

    Raises:
        ConversionError: if the model cannot take the weights, or would not compute with them what
            the source does.
    """
    wrong = []
    other = differences(report.trained_with, built_with)
    if other:
        values = (f"{key} is {built_with[key]!r}, not {value!r}" for key, value in other.items())
        wrong.append(
            f"the config is not what the weights were trained with ({report.origin}): "
            + ", ".join(values)
        )
    left = _left_over(report, leave_out)
    if shapes:
        wrong.append("the checkpoint is of another model than the config: " + "; ".join(shapes))
    elif not report.taken:
        wrong.append(
            f"the model has no place for any of the {len(report.left_over)} weights (layout "
            f"{report.layout}): {', '.join(report.left_over[:3])}, ..."
        )
    elif left:
        wrong.append(
            f"the model has no place for {len(left)} weights of parts that are converted, so it "
            f"would not compute what the source does: {', '.join(left[:5])}"
            + (", ..." if len(left) > 5 else "")
        )
    fitting = dict(report.fitting)
    if untrained:
        wrong.append(
            f"{len(untrained)} parameters are new to the weights and frozen in the model, so "
            f"nothing would train them, the first of them {untrained[0]}"
        )
        fitting["MODEL.BACKBONE.FREEZE_AT"] = 0
    if not wrong:
        return
    keys = {**other, **fitting}
    if keys:
        wrong.append(f"With these keys the config fits: {as_options(keys)}")
    if other:
        wrong.append(
            "Use the same keys wherever the weights are used. If the config is right as "
            "it is, and this source is not: --trust-config"
        )
    if left and not report.missing:
        patterns = dict.fromkeys(f"--leave-out '*{name[name.rfind('.') :]}'" for name in left)
        wrong.append(f"To convert the rest alone, leave them out by names: {' '.join(patterns)}")
    raise ConversionError(". ".join(part[0].upper() + part[1:] for part in wrong))


def _left_over(report: ConversionReport, leave_out: Sequence[str]) -> List[str]:
    """What is left over of parts that are converted, without which these compute something else."""
    converted = {prefix for name in report.taken for prefix in _prefixes(name)}
    return [
        name
        for name in report.left_over
        if converted.intersection(_prefixes(name))
        and not any(fnmatchcase(name, pattern) for pattern in leave_out)
    ]


def _prefixes(name: str) -> Iterable[str]:
    """The modules that an entry is in, as far out as the model's parts."""
    module = name.rpartition(".")[0]
    while module and module not in _CONTAINERS:
        yield module
        module = module.rpartition(".")[0]


def _stages(names: Iterable[str]) -> Dict[str, str]:
    """The stages of a model's ResNet: from their full names to those that layouts have for them.

    They are in ``backbone.bottom_up`` with an FPN, otherwise in ``backbone``, and the last one of
    C4 models is in ``roi_heads``.
    """
    stages = {}
    for name in names:
        # not DeepLab's decoders, which have a part "res2", too
        match = re.fullmatch(r"((?:.*\.)?(stem|res\d))(?:\.\d+)?\.conv1\.weight", name)
        if match:
            stages[match[1]] = match[2]
    return stages


def _placed(name: str, stages: Dict[str, str]) -> str:
    """The full name in the model of what a layout calls ``name``."""
    stage, _, rest = name.partition(".")
    return next((f"{place}.{rest}" for place, known in stages.items() if known == stage), name)


def _note_other_norm(
    name: str, shapes: Dict[str, Tuple[int, ...]], report: ConversionReport
) -> None:
    """To be called with what the model has no place for, under its name in Detectron2."""
    conv, found, _ = name.rpartition(".norm.")
    if found and f"{conv}.weight" in shapes and f"{conv}.norm" not in report.other_norms:
        report.other_norms.append(f"{conv}.norm")


def _is_other_than_group_norm(module: nn.Module, source: Layout) -> bool:
    """Whether a layer takes the weights of a group normalization, and computes something else.

    All sources have 32 groups, but Detectron2's models, whose file does not say how many.
    """
    other_groups = type(module) is nn.GroupNorm and module.num_groups != 32
    return isinstance(module, LayerNorm) or (other_groups and source.name != "detectron2")


def _is_adaptation(name: str, shapes: Dict[str, Tuple[int, ...]]) -> bool:
    """Whether it is one of the entries that a standardized convolution may have or lack."""
    owner, _, entry = name.rpartition(".")
    return entry in ("ws_scale", "ws_shift") and f"{owner}.ws_eps" in shapes


def _convert_filters(
    name: str,
    conv: nn.Module,
    state: Dict[str, Tensor],
    formula: Optional[str],
    report: ConversionReport,
) -> None:
    owner = name[: -len(".weight")]
    if not _is_normalized(conv, state, owner):
        return
    standardized = isinstance(conv, WeightStandardized)
    if f"{owner}.ws_eps" in state:  # of a model of this package
        report.filters["taken as they are"] += 1
        return
    weight = state[name]
    if standardized:
        state[f"{owner}.ws_eps"] = torch.tensor(conv.eps, dtype=torch.float64)
        transposed = isinstance(conv, nn.ConvTranspose2d)
        filters = outputs_first(weight, conv.groups) if transposed else weight
        if formula is None:
            scale, shift = adaptation(filters, conv.eps)
            state[f"{owner}.ws_scale"], state[f"{owner}.ws_shift"] = scale, shift
            report.filters["kept by scale and shift (ws_scale, ws_shift)"] += 1
        else:
            rescaled = rescaled_weight(filters, formula, conv.eps)
            state[name] = outputs_first(rescaled, conv.groups) if transposed else rescaled
            report.filters["rescaled for our formula"] += 1
    elif formula is not None:
        state[name] = source_filters(weight, formula).to(weight.dtype)
        report.filters["standardized for a model without weight standardization"] += 1


def _is_normalized(conv: nn.Module, state: Dict[str, Tensor], owner: str) -> bool:
    """Whether a norm follows: the sources standardize these convolutions only."""
    if isinstance(conv, WeightStandardized):
        return True
    return isinstance(conv, nn.Conv2d) and f"{owner}.norm.weight" in state


def _account_for_the_rest(
    model: nn.Module,
    shapes: Dict[str, Tuple[int, ...]],
    stages: Dict[str, str],
    state: Dict[str, Tensor],
    report: ConversionReport,
) -> None:
    backbone = tuple(f"{stage}." for stage in stages)
    backbone_only = all(name.startswith(backbone) for name in state)
    groups = {
        f"{name}.{entry}"
        for name, module in model.named_modules()
        if isinstance(module, BatchChannelNorm)
        for entry in ("group_weight", "group_bias")
    }
    for name in shapes:
        if name in state or re.fullmatch(_NOT_TRAINED, name):
            continue
        if name in groups or (backbone_only and not name.startswith(backbone)):
            report.initialized.append(name)
        else:
            report.missing.append(name)
