"""Loads the exported model in this folder: config.yaml and model.pth.

    from load_model import load_model
    model = load_model()
    outputs = model([{"image": image}])  # as any model of Detectron2

Needs PyTorch and Detectron2, nothing else. The model is for inference. Its convolutions have biases
that Detectron2 does not build where a normalization layer follows, and which it would silently
leave out when loading the checkpoint itself.
"""

import os
from typing import Dict, Optional

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import Tensor, nn


def load_config(folder: str = os.path.dirname(os.path.abspath(__file__))) -> CfgNode:
    """The config of the model in a folder; without a GPU, ``MODEL.DEVICE`` is "cpu".

    Args:
        folder: default: that of this file.
    """
    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(folder, "config.yaml"))
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def load_model(
    folder: str = os.path.dirname(os.path.abspath(__file__)), device: Optional[str] = None
) -> nn.Module:
    """
    Args:
        folder: default: that of this file.
        device: default: ``MODEL.DEVICE`` of the config.

    Returns:
        The model, in evaluation mode, without trainable parameters.

    Raises:
        RuntimeError: if config and checkpoint do not fit together exactly.
    """
    cfg = load_config(folder)
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    model = build_model(cfg)
    path = os.path.join(folder, "model.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    add_folded_parts(model, state)
    model.load_state_dict(state)
    return model.to(cfg.MODEL.DEVICE).eval().requires_grad_(False)


def add_folded_parts(model: nn.Module, state: Dict[str, Tensor]) -> None:
    """Adds what a checkpoint has and the model lacks, in place.

    Args:
        model: as Detectron2 builds it, with GroupNorm.
        state: the state dict of the folded model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.GroupNorm):
            if f"{name}.0.0.running_mean" in state:  # estimates for each feature level
                levels = 0
                while f"{name}.0.{levels}.running_mean" in state:
                    levels += 1
                first = CycleBatchNormList(levels, num_features=module.num_channels)
            elif f"{name}.0.running_mean" in state:
                first = FrozenBatchNorm2d(module.num_channels)
            else:
                continue
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Sequential(first, module))
        elif getattr(module, "bias", 0) is None and f"{name}.bias" in state:
            module.bias = nn.Parameter(torch.zeros_like(state[f"{name}.bias"]))
