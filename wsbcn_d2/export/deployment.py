"""A folded model as TorchScript or ONNX.

Inputs are images as Detectron2's models take them: (C, H, W), float32, values 0 to 255, in the
channel order of ``INPUT.FORMAT``, where C is the length of ``PIXEL_MEAN``. Outputs are those before
the final resizing: boxes (N, 4) in pixels of the input, and masks of R-CNNs (N, 1, 28, 28) in the
box.
"""

import contextlib
import copy
import inspect
import io
import os
import sys
import warnings
from typing import Any, Dict, Iterator, List, Tuple, cast

import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import Backbone, GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from ..weights.files import cause_of

# Half-pixel RoIAlign, which is what Detectron2's ROIAlignV2 is, came with version 16. With
# Detectron2's STABLE_ONNX_OPSET_VERSION, 11, boxes are wrong by tens of pixels.
_OPSET = 17

# The exporter by tracing, which knows torchvision's operations.
_HAS_DYNAMO = "dynamo" in inspect.signature(torch.onnx.export).parameters
_BY_TRACING: Dict[str, Any] = {"dynamo": False} if _HAS_DYNAMO else {}

# What Instances may hold while a detector runs.
_FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
    "pred_keypoints": Tensor,
    "pred_keypoint_heatmaps": Tensor,
}


def trace(model: nn.Module) -> Tuple[torch.jit.ScriptModule, List[str]]:
    """Traces a detector or semantic segmenter by Detectron2's TracingAdapter.

    Args:
        model: from :func:`fold`.

    Returns:
        A function of an image (C, H, W) of any size, and the names of the tensors it returns, for
        example ``["pred_boxes", "pred_classes", "pred_masks", "scores"]``. To load it, a program
        needs ``torch`` and ``torchvision``.

    Raises:
        ValueError: if the outputs are not tensors (PanopticFPN), or PyTorch cannot trace it.
    """
    adapter, image = _adapter(model)
    with _expected_warnings(), _failure_in_a_line(model, "traced"):
        # The check would call it with the same image again.
        traced = torch.jit.trace(adapter, (image,), check_trace=False)
    return traced, adapter.outputs_schema.keys


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """Scripts a detector by Detectron2's scripting_with_instances.

    Args:
        model: from :func:`fold`.

    Returns:
        A function of a list of ``{"image": (C, H, W)}`` that returns a list of dictionaries. Boxes
        of RetinaNet and FCOS may reach beyond the image, which Detectron2 clips only later.

    Raises:
        ValueError: if the model cannot be scripted.
    """
    detector = isinstance(model, (GeneralizedRCNN, DenseDetector))
    if not detector or isinstance(model, PanopticFPN):
        raise ValueError(
            f"a {type(model).__name__} cannot be scripted; Detectron2 can script R-CNNs and dense "
            "detectors"
        )
    if any(isinstance(module, CycleBatchNormList) for module in model.modules()):
        raise ValueError(
            "Detectron2's CycleBatchNormList, which a head with estimates for each feature level "
            "folds to, cannot be scripted; trace the model instead"
        )
    kind = _ScriptableRCNN if isinstance(model, GeneralizedRCNN) else _ScriptableDetector
    # A copy, since it changes the ResNet that it is given.
    with _failure_in_a_line(model, "scripted; trace it instead"):
        return scripting_with_instances(kind(copy.deepcopy(model)).eval(), _FIELDS)


def export_onnx(model: nn.Module) -> bytes:
    """A detector or semantic segmenter as ONNX.

    Proposals with equal scores may be taken in another order than by PyTorch, whose order is
    unspecified, too; that can change which boxes remain.

    Args:
        model: from :func:`fold`.

    Returns:
        A file with the input ``image``, (3, height, width), and outputs named as by :func:`trace`.

    Raises:
        ImportError: if the package ``onnx`` is not installed.
        ValueError: if the outputs are not tensors (PanopticFPN), or PyTorch cannot write it.
    """
    adapter, image = _adapter(model)
    return _to_onnx(
        adapter, image, adapter.outputs_schema.keys, {"image": {1: "height", 2: "width"}}
    )


def export_backbone_onnx(backbone: Backbone, channels: int = 3) -> bytes:
    """A backbone, for example ResNet-FPN, as ONNX.

    Args:
        backbone: of a model from :func:`fold`.
        channels: C of its inputs.

    Returns:
        A file with the input ``images``, (N, C, H, W), normalized by ``MODEL.PIXEL_MEAN`` and
        ``PIXEL_STD``, H and W multiples of ``backbone.size_divisibility``; and the feature maps as
        outputs, by name.

    Raises:
        ImportError: if the package ``onnx`` is not installed.
        ValueError: if PyTorch cannot write it.
    """
    names = list(backbone.output_shape())
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    axes.update({name: {0: "batch", 2: f"{name}_height", 3: f"{name}_width"} for name in names})
    device = next(backbone.parameters()).device
    sample = torch.zeros(1, channels, 256, 320, device=device)
    adapter = TracingAdapter(backbone, sample, lambda model, x: [model(x)[name] for name in names])
    return _to_onnx(adapter.eval(), sample, names, axes)


# ---------------------------------------------------------------------------------------- adapters


def _adapter(model: nn.Module) -> Tuple[TracingAdapter, Tensor]:
    """A function from tensor to tensors, which has been called once, and its input."""
    # Nothing is found in it, and what is recorded holds for all images.
    channels = len(cast(Tensor, model.pixel_mean))
    image = torch.zeros(channels, 256, 320, device=next(model.parameters()).device)
    adapter = TracingAdapter(model, image, _predict).eval()
    with _failure_in_a_line(model, "called with an image alone"):
        adapter(image)
    return adapter, image


def _predict(model: nn.Module, image: Tensor) -> Dict[str, Tensor]:
    inputs = [{"image": image}]
    if isinstance(model, GeneralizedRCNN):
        outputs: Dict[str, Any] = {"instances": model.inference(inputs, do_postprocess=False)[0]}
    else:
        outputs = model(inputs)[0]
    tensors: Dict[str, Tensor] = {}
    for name, value in outputs.items():
        if not isinstance(value, (Instances, Tensor)):
            raise ValueError(
                f"a {type(model).__name__} cannot be traced as a whole: its output {name!r} is a "
                f"{type(value).__name__}"
            )
        fields = value.get_fields() if isinstance(value, Instances) else {name: value}
        tensors.update({k: v.tensor if isinstance(v, Boxes) else v for k, v in fields.items()})
    return tensors


@contextlib.contextmanager
def _expected_warnings() -> Iterator[None]:
    """Detectron2's assertions are not part of a trace, which PyTorch reports one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


@contextlib.contextmanager
def _failure_in_a_line(model: nn.Module, what: str) -> Iterator[None]:
    """What fails within PyTorch, for models that it cannot express, is a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of many types
        raise ValueError(
            f"a {type(model).__name__} like this cannot be {what} ({cause_of(error)})"
        ) from error


@contextlib.contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """PyTorch writes a graph of a thousand lines there, from C++, when an export fails."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


class _ScriptableRCNN(nn.Module):
    """Returns dictionaries, since a script that returns Instances cannot be saved
    (https://github.com/pytorch/pytorch/issues/46944)."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Tensor]]:
        instances = self.model.inference(inputs, do_postprocess=False)
        return [i.get_fields() for i in instances]


class _ScriptableDetector(nn.Module):
    """The same for RetinaNet and FCOS."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Tensor]]:
        instances = self.model(inputs)
        return [i.get_fields() for i in instances]


# -------------------------------------------------------------------------------------------- ONNX


def _to_onnx(
    adapter: TracingAdapter, sample: Tensor, names: List[str], axes: Dict[str, Dict[int, str]]
) -> bytes:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX files need the package onnx: pip install onnx (or wsbcn_d2[export])"
        ) from error
    file = io.BytesIO()
    expected = _failure_in_a_line(adapter.model, "written as ONNX")
    with expected, _group_norm_of_nothing(), _expected_warnings(), _nothing_on_stdout():
        torch.onnx.export(
            adapter,
            (sample,),
            file,  # type: ignore[arg-type]  # a file does, too
            input_names=list(axes)[:1],
            output_names=names,
            dynamic_axes=axes,
            opset_version=_OPSET,
            **_BY_TRACING,
        )
    return file.getvalue()


@contextlib.contextmanager
def _group_norm_of_nothing() -> Iterator[None]:
    """Exports GroupNorm so that it takes an empty batch, as the heads of an R-CNN get where nothing
    is detected. PyTorch's own reshapes to (0, groups, -1), which onnxruntime refuses."""
    torch.onnx.register_custom_op_symbolic("aten::group_norm", _group_norm_symbolic, _OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::group_norm", _OPSET)


@symbolic_helper.parse_args("v", "i", "v", "v", "f", "b")
def _group_norm_symbolic(g, x, groups, weight, bias, eps, cudnn):  # type: ignore[no-untyped-def]
    def constant(value: Tensor) -> Any:
        return g.op("Constant", value_t=value)

    shape = g.op("Shape", x)
    batch = g.op("Shape", x, start_i=0, end_i=1)
    per_image = g.op("ReduceProd", g.op("Shape", x, start_i=1), keepdims_i=1)
    per_group = g.op("Div", per_image, constant(torch.tensor([groups])))
    grouped = g.op("Concat", batch, constant(torch.tensor([groups])), per_group, axis_i=0)
    y = g.op("Reshape", x, grouped, allowzero_i=1)
    ones, zeros = constant(torch.ones(groups)), constant(torch.zeros(groups))
    y = g.op("InstanceNormalization", y, ones, zeros, epsilon_f=eps)
    y = g.op("Reshape", y, shape, allowzero_i=1)
    axes = constant(torch.tensor([1, 2]))
    y = g.op("Mul", y, g.op("Unsqueeze", weight, axes))
    return g.op("Add", y, g.op("Unsqueeze", bias, axes))
