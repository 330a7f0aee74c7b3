"""Recalibration of a finished checkpoint."""

import math

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader

from ..config import changed
from .checkpoint import CompleteCheckpointer, atomic_write, check_output
from .setup import built_model
from .statistics import named_batch_channel_norms, recalibrate_estimates, seeded_batches


def recalibrate_checkpoint(
    cfg: CfgNode, output: str, num_images: int, *, progress: bool = False
) -> None:
    """Writes a checkpoint with the weights of another and new estimates.

    Args:
        cfg: names the weights (``MODEL.WEIGHTS``) and the training data.
        output: file to write, which Detectron2 loads as ``MODEL.WEIGHTS``. Appears when complete.
        num_images: number of training images, rounded up to whole batches.
        progress: show a progress bar.

    Raises:
        ValueError: if there is nothing to recalibrate, or nothing to do it with, or the weights are
            not those of the model, or ``output`` is their file.
        OSError: if ``output`` cannot be written.
    """
    if num_images < 1:
        raise ValueError(f"the number of images must be positive, got {num_images}")
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty; it must name the checkpoint to recalibrate")
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty, and must name a dataset")
    check_output(output, source=cfg.MODEL.WEIGHTS)
    cfg = changed(cfg, "DATALOADER.NUM_WORKERS", 0)  # as `seeded_batches` needs it
    model = built_model(cfg)
    if next(named_batch_channel_norms(model), None) is None:
        raise ValueError("the model of the config has no BCN layers")
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    num_batches = math.ceil(num_images / cfg.SOLVER.IMS_PER_BATCH)
    batches = seeded_batches(lambda: build_detection_train_loader(cfg), num_batches)
    recalibrate_estimates(model.train(), batches, progress=progress)
    with atomic_write(output) as file:
        torch.save({"model": model.state_dict()}, file)
