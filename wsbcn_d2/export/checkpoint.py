"""Exports the checkpoint of a config, in any format: what ``tools/export_model.py`` calls."""

import os

import torch
from detectron2.config import CfgNode

from ..engine.checkpoint import CompleteCheckpointer, atomic_write, check_output
from ..engine.setup import built_model
from .fold import fold
from .stock import CHECKPOINT, CONFIG, LOADER, check_folder, save_for_detectron2, stock_config

FORMATS = ("detectron2", "tracing", "scripting", "onnx", "onnx-backbone")


def export_checkpoint(cfg: CfgNode, output: str, format: str = "detectron2") -> str:
    """Folds the model of a config and writes it in one of several formats.

    Args:
        cfg: names the weights, ``MODEL.WEIGHTS``.
        output: the folder to write, for "detectron2"; else the file. Files appear when they are
            complete, and folders for them are made.
        format: one of ``FORMATS``: files for Detectron2 (see :func:`save_for_detectron2`),
            TorchScript by tracing or scripting, ONNX of the whole model or of its backbone.

    Returns:
        What was written, for the person who asked for it.

    Raises:
        ValueError: if the weights do not belong to the model, or the format cannot express it,
            or their file would be replaced.
        OSError: if the output cannot be written.
        ImportError: if the package ``onnx`` is needed, and not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; allowed are {', '.join(FORMATS)}")
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty; it must name the checkpoint to export")
    if format == "detectron2":
        check_output(os.path.join(output, CHECKPOINT), source=cfg.MODEL.WEIGHTS)
        check_folder(output)
        stock_config(cfg)  # raises, before long work, if there is none
    else:
        check_output(output, source=cfg.MODEL.WEIGHTS)
        from .deployment import export_backbone_onnx, export_onnx, script, trace
    original = built_model(cfg)
    CompleteCheckpointer(original).load(cfg.MODEL.WEIGHTS)
    model = fold(original)
    if format == "detectron2":
        alone = save_for_detectron2(model, cfg, output)
        return f"{output}: {CONFIG}, {CHECKPOINT} and {LOADER}, " + (
            "which Detectron2 loads without the last, too"
            if alone
            else f"to be loaded with {LOADER}: BCN became biases that Detectron2 does not build"
        )
    if format in ("onnx", "onnx-backbone"):
        if format == "onnx":
            onnx = export_onnx(model)
        else:
            onnx = export_backbone_onnx(model.backbone, len(cfg.MODEL.PIXEL_MEAN))
        with atomic_write(output) as file:
            file.write(onnx)
        return output
    if format == "tracing":
        scripted, keys = trace(model)
        names = f": (image) -> ({', '.join(keys)})"
    else:
        scripted, names = script(model), ""
    with atomic_write(output) as file:
        torch.jit.save(scripted, file)
    return output + names
