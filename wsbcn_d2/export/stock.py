"""A folded model as files of stock Detectron2: config, checkpoint and loader."""

import os
from functools import reduce
from pathlib import Path
from typing import Dict, Iterator

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from torch import nn

from ..config import add_wsbcn_config, flatten_config
from ..engine.checkpoint import atomic_write
from ..layers.folded import FOLDED
from ..modeling import BACKBONES
from ..norm_options import NormOption
from .load_model import add_folded_parts

CHECKPOINT, CONFIG, LOADER = "model.pth", "config.yaml", "load_model.py"

# Options that fold to GroupNorm, which Detectron2's option "GN" builds with 32 groups.
_GROUP_NORM = ("BCN", "BatchBCN", "SyncBCN", "CN", "GN")

_HEADER = """\
# A folded model, made by wsbcn_d2, which it does not need. For inference only.
"""
_NEEDS_LOADER = """\
# Load it with load_model.py beside this file: Detectron2 alone would leave out the biases that the
# checkpoint has and GN models lack, and say so in the log only. So MODEL.WEIGHTS is empty.
"""


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of stock Detectron2 that describes the folded model of a config.

    Backbones of this package become Detectron2's of the same kind, norm options lose ``+WS``, and
    BCN and CN become "GN". Keys of this package are left out.

    Args:
        cfg: a config with or without the keys of :func:`wsbcn_d2.add_wsbcn_config`.

    Raises:
        ValueError: naming the key that stock Detectron2 lacks, or whose value it cannot express
            (a number of groups other than 32).
    """
    stock = get_cfg()
    known = flatten_config(stock).keys()
    with_ours = get_cfg()
    add_wsbcn_config(with_ours)
    ours = flatten_config(with_ours).keys() - known
    for key, value in flatten_config(cfg.clone()).items():
        if key in ours:
            continue
        if key not in known:
            raise ValueError(f"{key}: Detectron2 has no such key, so it cannot load the model")
        if key == "MODEL.BACKBONE.NAME":
            value = _stock_backbone(value)
        elif key.endswith(".NORM") and isinstance(value, str) and value:
            value = _stock_norm(key, value)
        *nodes, name = key.split(".")
        reduce(getattr, nodes, stock)[name] = value
    return stock


def save_for_detectron2(model: nn.Module, cfg: CfgNode, folder: str) -> bool:
    """Writes a folded model as ``config.yaml``, ``model.pth`` and ``load_model.py``.

    The latter imports PyTorch and Detectron2 only, and loads the former two. Without BCN (GN+WS,
    CN, BN+WS, ...) the model has the parameters of a stock model, and Detectron2 itself can load
    them, strictly: ``MODEL.WEIGHTS`` is set to the checkpoint. With BCN it cannot, see
    docs/export.md, and ``MODEL.WEIGHTS`` is empty.

    The checkpoint is marked as folded: to load it into a model with weight standardization or BCN
    is an error.

    Args:
        model: from :func:`fold`.
        cfg: the config that the original was built from.
        folder: made if it is not there. Each file appears when it is complete.

    Returns:
        Whether Detectron2 can load the checkpoint without ``load_model.py``.

    Raises:
        ValueError: if Detectron2 cannot express the config, or the config does not describe the
            model.
        FileExistsError: if the folder has another ``config.yaml``, as that of a run has.
    """
    check_folder(folder)
    stock = stock_config(cfg)
    state = model.state_dict()
    alone = _check(stock, model, state)
    os.makedirs(folder, exist_ok=True)
    checkpoint = os.path.join(folder, CHECKPOINT)
    stock.MODEL.WEIGHTS = checkpoint if alone else ""
    with atomic_write(os.path.join(folder, LOADER), "w") as file:
        file.write(Path(__file__).with_name(LOADER).read_text())
    with atomic_write(os.path.join(folder, CONFIG), "w") as file:
        file.write(_HEADER + ("" if alone else _NEEDS_LOADER) + stock.dump())
    for entry in state._metadata.values():  # type: ignore[attr-defined]
        entry[FOLDED] = True
    with atomic_write(checkpoint) as file:
        torch.save({"model": state}, file)
    return alone


def check_folder(folder: str) -> None:
    """Raises FileExistsError if the folder has the config of a run, which would be lost."""
    path = Path(folder, CONFIG)
    if path.is_file() and not path.read_text(errors="replace").startswith(_HEADER[:20]):
        raise FileExistsError(f"{str(path)!r} is not of an export; give another folder")


def _stock_backbone(name: str) -> str:
    if name not in [backbone.__name__ for backbone in BACKBONES]:
        return name
    stock = name.replace("wsbcn_", "")
    if stock not in BACKBONE_REGISTRY:
        raise ValueError(f"MODEL.BACKBONE.NAME: Detectron2 has no counterpart of {name}")
    return stock


def _stock_norm(key: str, value: str) -> str:
    option = NormOption.parse(value)
    if option.name not in _GROUP_NORM:
        return option.name
    if option.arguments.get("groups", 32) != 32:
        raise ValueError(
            f"{key}: {value!r} has {option.arguments['groups']} groups, and Detectron2's configs "
            "know GroupNorm with 32 only. TorchScript and ONNX can express it, and so can a "
            "program that pickles the result of wsbcn_d2.fold(model)"
        )
    return "GN"


def _check(stock: CfgNode, model: nn.Module, state: Dict[str, torch.Tensor]) -> bool:
    """Builds the model of the stock config, and compares.

    Returns:
        Whether it has the parameters of the folded model without further ado.
    """
    stock = stock.clone()
    stock.MODEL.DEVICE = "cpu"
    built = build_model(stock).eval()
    alone = built.state_dict().keys() == state.keys()
    add_folded_parts(built, state)
    for found, expected in zip(_describe(built), _describe(model)):
        if found != expected:
            raise ValueError(
                "the config does not describe the model. After folding, it has\n  "
                f"{expected}\nwhere Detectron2 builds from the config\n  {found}"
            )
    return alone


def _describe(model: nn.Module) -> Iterator[str]:
    """One line for each module, with its arguments, parameters and buffers; then an end."""
    for name, module in model.named_modules():
        kind = f"{type(module).__name__}({module.extra_repr()})"
        if next(module.children(), None) is None:
            kind = repr(module)
        tensors = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
        yield f"{name or 'the model'}: {kind}, {shapes}"
    yield "nothing more"
