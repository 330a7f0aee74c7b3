"""What weights were trained with: the format of the images, the stride of bottleneck blocks, the
poolers of detectors.

The weights themselves do not show it: a model with other values runs, and computes something else.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

from detectron2 import model_zoo
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from torch import Tensor, nn

from ..config import flatten_config
from . import mmdetection
from .files import Checkpoint

# Values by keys of the config.
Keys = Dict[str, Any]

FORMAT, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
_POOLERS = {"box_pooler": "MODEL.ROI_BOX_HEAD", "mask_pooler": "MODEL.ROI_MASK_HEAD"}
_POOLER_KEYS = [f"{h}.POOLER_{k}" for h in _POOLERS.values() for k in ("TYPE", "SAMPLING_RATIO")]

_BGR_MEAN = [103.53, 116.28, 123.675]
# torchvision.models, both repositories of the authors (imagenet.py), mmdetection's configs/gn+ws
TORCHVISION = {FORMAT: "RGB", MEAN: _BGR_MEAN[::-1], STD: [58.395, 57.12, 57.375], STRIDE: False}
# Detectron2's configs/COCO-*/*_R_50_*, Misc/mask_rcnn_R_50_FPN_3x_gn and COCO-*/*_X_101_32x8d_*
MSRA = {FORMAT: "BGR", MEAN: _BGR_MEAN, STD: [1.0, 1.0, 1.0], STRIDE: True}
FAIR_GN = {**MSRA, STRIDE: False}
FAIR_RESNEXT = {**FAIR_GN, STD: [57.375, 57.12, 58.395]}
# maskrcnn_benchmark/config/defaults.py and layers/roi_align.py, configs/gn_baselines of the fork
MASKRCNN_BENCHMARK = {
    **FAIR_GN,
    MEAN: [102.9801, 115.9465, 122.7717],
    **{key: "ROIAlign" if key.endswith("TYPE") else 2 for key in _POOLER_KEYS},
}


def trained_with(checkpoint: Checkpoint, layout: str) -> Tuple[Keys, str]:
    """What the weights of a checkpoint were trained with, as far as it is known.

    Args:
        checkpoint: the weights, by their names in the file.
        layout: the name of its layout.

    Returns:
        Values of config keys, and how they are known, or that they are assumed.
    """
    names = checkpoint.tensors
    config = _zoo_config(checkpoint.file)
    if config:
        values = flatten_config(model_zoo.get_config(config))
        keys = {key: values[key] for key in (FORMAT, MEAN, STD, STRIDE, *_POOLER_KEYS)}
        return keys, f"Detectron2's {config}"
    batch_norm = any(re.search(r"_bn_|\.running_mean$", name) for name in names)
    if layout == "maskrcnn-benchmark":
        stride = batch_norm and not _is_resnext(names)
        return {**MASKRCNN_BENCHMARK, STRIDE: stride}, "assumed: as in maskrcnn-benchmark's configs"
    if checkpoint.caffe2 and not batch_norm:
        return FAIR_GN, "the names are those of FAIR's GN models"
    if checkpoint.caffe2 and _is_resnext(names):
        return FAIR_RESNEXT, "the names are those of FAIR's ResNeXt"
    if checkpoint.caffe2:
        return MSRA, "the names are those of MSRA's models"
    if layout == "mmdetection":
        inputs, caffe_style = mmdetection.inputs(checkpoint.text)
        if inputs is None:
            return TORCHVISION, "assumed: as in mmdetection's configs/gn+ws"
        return {**dict(zip((FORMAT, MEAN, STD), inputs)), STRIDE: caffe_style}, "the file's config"
    if checkpoint.author == "torchvision":
        return TORCHVISION, "the file says that it is torchvision's"
    if layout == "authors-bcn-ws":
        return TORCHVISION, "as the authors' ImageNet models"
    if layout != "detectron2":
        return TORCHVISION, "assumed: as ImageNet models with torchvision's names are"
    # Checkpoints of Detectron2 before 2021 have these two.
    buffers = {key: names.get(key.split(".")[1].lower()) for key in (MEAN, STD)}
    keys = {key: value.flatten().tolist() for key, value in buffers.items() if value is not None}
    rest = "assumed: INPUT.FORMAT and MODEL.RESNETS.STRIDE_IN_1X1 are the config's"
    return keys, f"the file says no more; {rest}" if keys else f"the file does not say; {rest}"


def keys_of(model: nn.Module) -> Keys:
    """The values that a model was built with, of the keys that :func:`trained_with` may have."""
    keys: Keys = {}
    if getattr(model, "input_format", None):
        keys[FORMAT] = model.input_format
    for key, buffer in ((MEAN, "pixel_mean"), (STD, "pixel_std")):
        if hasattr(model, buffer):
            keys[key] = [round(x, 4) for x in getattr(model, buffer).flatten().tolist()]
    for block in model.modules():
        if isinstance(block, (BottleneckBlock, DeformBottleneckBlock)):
            strides = [max(c.stride) for c in (block.conv1, block.conv2)]
            if max(strides) > 1:
                keys[STRIDE] = strides[0] > 1
    for name, head in _POOLERS.items():
        pooler = getattr(getattr(model, "roi_heads", None), name, None)
        for align in getattr(pooler, "level_poolers", ()):
            if hasattr(align, "aligned"):
                keys[f"{head}.POOLER_TYPE"] = "ROIAlignV2" if align.aligned else "ROIAlign"
                keys[f"{head}.POOLER_SAMPLING_RATIO"] = align.sampling_ratio
    return keys


def differences(expected: Keys, found: Keys) -> Keys:
    """Those of the expected values that differ from the found ones."""
    return {
        key: value
        for key, value in expected.items()
        if key in found and not _is_close(value, found[key])
    }


def as_options(keys: Keys) -> str:
    """Keys and values as they stand in a command line."""
    return " ".join(
        f"{key} " + (f'"{value}"' if isinstance(value, list) or value == "" else str(value))
        for key, value in keys.items()
    )


def _is_close(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(abs(x - y) < 0.01 for x, y in zip(a, b))
    return bool(a == b)


def _zoo_config(file: str) -> str:
    """The config in Detectron2's model zoo of a file from there; empty if it is from elsewhere."""
    root = Path(model_zoo.__file__).parent / "configs"
    for path in sorted(root.rglob("*.yaml")):
        config = path.relative_to(root).as_posix()
        with contextlib.suppress(RuntimeError):  # it has no weights
            if os.path.basename(model_zoo.get_checkpoint_url(config)) == file:
                return config
    return ""


def _is_resnext(names: Mapping[str, Tensor]) -> bool:
    """Whether the 3x3 convolutions of bottleneck blocks are grouped."""
    return any(
        value.shape[0] != value.shape[1]
        for name, value in names.items()
        if re.search(r"(?:_branch2b_w|layer\d\.\d+\.conv2\.weight)$", name)
    )
