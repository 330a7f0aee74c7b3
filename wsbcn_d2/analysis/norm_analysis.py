"""Everything that is measured of the normalization layers of a checkpoint, as one dictionary."""

import json
import math
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from torch import Tensor, nn

from ..config import changed
from ..engine.checkpoint import CompleteCheckpointer, atomic_write
from ..engine.setup import built_model
from ..engine.statistics import seeded_batches
from .files import load_kind
from .norms import analyze_layers, estimate_drift, filter_statistics
from .probe import STEPS, probe_loss

Analysis = Dict[str, Any]  # what is written to JSON

KIND = "norm analysis"


def analyze_checkpoint(
    cfg: CfgNode,
    label: str,
    *,
    num_images: int = 20,
    num_probe_images: int = 8,
    steps: Sequence[float] = STEPS,
    seed: int = 0,
    progress: bool = False,
) -> Analysis:
    """Builds the model of a config, loads its weights and measures it on training images.

    Args:
        cfg: names the weights (``MODEL.WEIGHTS``), the training data and the learning rate
            (``SOLVER.BASE_LR``) that the steps of the probe are multiples of.
        label: what the model is called on the page.
        num_images: training images, rounded up to whole batches, the same for every model whose
            config asks for the same data.
        num_probe_images: how many of them the loss is probed with; 0: not at all.
        steps: of the probe, see :func:`.probe.probe_loss`.
        seed: of the choice of images.
        progress: show progress bars.

    Returns:
        What :mod:`.norms_page` shows, of types that JSON knows.

    Raises:
        ValueError: if an argument is out of range, or the weights are not given or not those of the
            model.
    """
    if num_images < 1 or num_probe_images < 0:
        raise ValueError(
            f"num_images ({num_images}) must be positive and num_probe_images "
            f"({num_probe_images}) not negative"
        )
    if num_probe_images and not (steps and all(step > 0 for step in steps)):
        raise ValueError(f"steps must be positive numbers, got {list(steps)}")
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty; it must name the checkpoint to analyze")
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty, and must name a dataset")
    cfg = changed(cfg, "DATALOADER.NUM_WORKERS", 0)  # as `seeded_batches` needs it
    model = built_model(cfg)
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    per_batch = cfg.SOLVER.IMS_PER_BATCH
    wanted = max(num_images, num_probe_images)
    batches = seeded_batches(
        lambda: build_detection_train_loader(cfg), math.ceil(wanted / per_batch), seed
    )
    return analyze_model(
        model,
        batches[: math.ceil(num_images / per_batch)],
        label,
        probe_batches=batches[: math.ceil(num_probe_images / per_batch)],
        learning_rate=cfg.SOLVER.BASE_LR,
        steps=steps,
        progress=progress,
    )


def analyze_model(
    model: nn.Module,
    batches: Sequence[Any],
    label: str,
    *,
    probe_batches: Sequence[Any] = (),
    learning_rate: float = 0.01,
    steps: Sequence[float] = STEPS,
    progress: bool = False,
) -> Analysis:
    """The same for any model and data.

    Args:
        model: called with each batch; left as it was.
        batches: inputs for training mode.
        label: what the model is called on the page.
        probe_batches: inputs that the loss is probed with; none: not at all.
        learning_rate, steps: see :func:`.probe.probe_loss`.
        progress: show progress bars.
    """
    layers = analyze_layers(model, batches, progress=progress)
    drift = estimate_drift(model, batches, progress=progress)
    filters = filter_statistics(model)
    described: List[Dict[str, Any]] = []
    for layer in layers:
        entry: Dict[str, Any] = {
            "name": layer.name,
            "kind": layer.kind,
            "normalized_mean": _list(layer.normalized_mean),
            "normalized_std": _list(layer.normalized_std),
            "relu_mean": _list(layer.relu_mean),
            "relu_std": _list(layer.relu_std),
            "active": _list(layer.active),
        }
        if layer.name in drift:
            entry["drift_mean"] = _list(drift[layer.name].mean)
            entry["drift_log_std"] = _list(drift[layer.name].log_std)
        conv = filters.get(layer.name.rpartition(".")[0])  # of a norm layer inside a convolution
        if conv is not None:
            entry["filter_mean"], entry["filter_std"] = _list(conv.mean), _list(conv.std)
            entry["weight_standardization"] = conv.standardized
        described.append(entry)
    probe = None
    if len(probe_batches):
        found = probe_loss(model, probe_batches, learning_rate, steps=steps, progress=progress)
        probe = {
            "learning_rate": learning_rate,
            "steps": list(steps),
            "weight_norm": _rounded(found.weight_norm),
            "loss": _list(found.loss),
            "gradient_norm": _list(found.gradient_norm),
            "loss_change": [_list(row) for row in found.loss_change],
            "gradient_change": [_list(row) for row in found.gradient_change],
            "smoothness": _list(found.smoothness),
        }
    return {
        "label": label,
        "batches": len(batches),
        "layers": described,
        "probe": probe,
    }


def write_analyses(analyses: Sequence[Analysis], path: str) -> None:
    """Writes analyses to a JSON file, a line for each layer."""
    models = []
    for analysis in analyses:
        # without spaces, of which there would be one for each channel
        compact = [json.dumps(layer, separators=(",", ":")) for layer in analysis["layers"]]
        lines = ",\n   ".join(compact)
        rest = json.dumps({k: v for k, v in analysis.items() if k != "layers"})
        models.append(f'{rest[:-1]}, "layers": [\n   {lines}\n  ]}}')
    with atomic_write(path, "w") as file:
        file.write(
            f'{{"kind": {json.dumps(KIND)}, "models": [\n  ' + ",\n  ".join(models) + "\n]}\n"
        )


def load_analyses(path: str) -> List[Analysis]:
    """Reads what :func:`write_analyses` has written.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else.
    """
    return load_kind(path, KIND, ["models"])["models"]


def _list(values: Any) -> Optional[List[Optional[float]]]:
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.numpy()
    return [_rounded(value) for value in np.asarray(values, dtype=float)]


def _rounded(value: float) -> Optional[float]:
    """Four digits, which keeps the files small; None for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
