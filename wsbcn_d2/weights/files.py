"""Reading checkpoint files, which may come from strangers."""

import io
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Mapping

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

MAX_BYTES = 8 * 2**30

# What a pickled dictionary of numpy arrays, which is what Detectron2's model zoo has, refers to.
_ARRAY_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),  # from protocol 5 on
    ("numpy._core.numeric", "_frombuffer"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}


# What wraps the weights in a file, and what wrappers put into their names: torch.compile, FSDP,
# activation checkpointing anywhere, DistributedDataParallel and Lightning before all of them.
_KEYS = ("state_dict", "model", "blobs", "model_state_dict", "model_state", "module")
_INNER_PREFIXES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTER_PREFIXES = ("module.", "model.")

SAFETENSORS = ".safetensors"


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one that can be trusted."""


@dataclass
class Checkpoint:
    """The content of a file.

    Attributes:
        tensors: the weights by their names.
        text: what the file says of its config, if it does, otherwise empty.
        caffe2: whether the names are those of Caffe2, as in Detectron2's MSRA models.
        metadata: what the state dict says of the modules, by their names; empty if it says nothing.
        author: what the file says of where it is from, if it does, as those of Detectron2 do.
        file: its name, without folders; empty if the weights are from no file.
    """

    tensors: Dict[str, Tensor]
    text: str
    caffe2: bool
    metadata: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    author: str = ""
    file: str = ""


def read_checkpoint(path: str) -> Checkpoint:
    """Reads the weights in a file, without running any code that it may contain.

    Args:
        path: a file that ``torch.save`` has written (``.pth``, ``.pt``, ``.pth.tar``), one of
            Detectron2's model zoo (``.pkl``), or ``.safetensors``. Detectron2 downloads and keeps
            those with an address (``https://``, ``detectron2://``).

    Returns:
        The tensors, without the wrappers (``state_dict``, ``module.``, ``_orig_mod.``, ...) around
        them and their names.

    Raises:
        CheckpointError: if the file is missing, cannot be downloaded, is too large, holds anything
            but tensors, numbers and text, or no weights, or weights that are not finite, or if it
            needs a package that is not installed.
    """
    if "://" in path:
        path = _downloaded(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    size = os.path.getsize(path)
    if not 0 < size <= MAX_BYTES:
        raise CheckpointError(
            f"{path}: {size} bytes, expected between 1 and {MAX_BYTES} ({MAX_BYTES >> 30} GiB)"
        )
    if path.endswith(SAFETENSORS):
        content: Any = read_safetensors(path)
    else:
        content = _read_arrays(path) if path.endswith(".pkl") else _read_tensors(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    checkpoint = checkpoint_of(content, path)
    checkpoint.file = os.path.basename(path)
    return checkpoint


def checkpoint_of(content: Dict[str, Any], source: str) -> Checkpoint:
    """The weights in what a file holds: a state dict, within wrappers or without.

    Args:
        content: the dictionary in the file.
        source: what it is, for messages.

    Raises:
        CheckpointError: if it has no weights, or some that are not finite.
    """
    text = str(content.get("meta") or "")
    author = str(content.get("__author__") or "")
    weights = without_wrappers(unwrapped(content))
    tensors = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor) and isinstance(name, str):
            tensors[name] = value
    if not tensors:
        raise CheckpointError(f"{source}: no weights in it; its keys are {_some(content)}")
    prefix = _common_prefix(tensors)
    tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{source}: {name} has infinite or NaN values")
    caffe2 = author == "Caffe2" or any(name.endswith("_w") for name in tensors)
    metadata = {k.removeprefix(prefix): entry for k, entry in _metadata(weights).items()}
    return Checkpoint(tensors, text, caffe2, metadata, author)


def _downloaded(address: str) -> str:
    try:
        return PathManager.get_local_path(address)
    except Exception as error:  # of many types, by the kind of address
        cause = f"{type(error).__name__} {error}"
        raise CheckpointError(f"{address}: cannot be downloaded ({cause})") from error


def _read_tensors(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, and other ones in other versions of PyTorch
        raise CheckpointError(
            f"{path}: not a file of tensors that is safe to read ({cause_of(error)})"
        ) from error


def read_safetensors(path: str) -> Dict[str, Tensor]:
    """The tensors in a file of the package safetensors.

    Raises:
        CheckpointError: if the package is not installed, or it is no such file.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: to read it, the package safetensors is needed: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # of a type of its own
        raise CheckpointError(f"{path}: not a file of safetensors ({cause_of(error)})") from error


def without_wrappers(weights: Mapping[Any, Any]) -> Dict[Any, Any]:
    """A state dict with the names that its entries have in the model, which wrappers within it
    (torch.compile, FSDP, activation checkpointing) have changed; in the same order."""
    renamed: Dict[Any, Any] = OrderedDict((_unwrapped_name(k), v) for k, v in weights.items())
    if hasattr(weights, "_metadata"):
        metadata = ((_unwrapped_name(k), v) for k, v in weights._metadata.items())
        renamed._metadata = OrderedDict(metadata)
    return renamed


def _unwrapped_name(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return ".".join(part for part in name.split(".") if part not in _INNER_PREFIXES)


def _common_prefix(names: Iterable[str]) -> str:
    """What wrappers around a model have put before all names."""
    prefix, names = "", list(names)
    for _ in range(4):
        for outer in _OUTER_PREFIXES:
            if all(name.startswith(prefix + outer) for name in names):
                prefix += outer
    return prefix


def cause_of(error: Exception) -> str:
    """What went wrong when PyTorch read a file, in a line, without its advice to trust the file."""
    message = str(error).strip()
    reason = re.search(r"WeightsUnpickler error: (.*)", message)
    if reason is not None:
        message = reason[1].partition(". Please")[0]
    elif "weights_only" in message:
        message = "it holds something else than tensors"
    return ": ".join([type(error).__name__, *message.splitlines()[:1]])


def _read_arrays(path: str) -> Any:
    with open(path, "rb") as file:
        content = file.read()
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:
        raise CheckpointError(f"{path}: not a pickled dictionary of arrays ({error})") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not an array")
        return super().find_class(module, name)


def unwrapped(content: Dict[Any, Any]) -> Dict[Any, Any]:
    """The innermost dictionary under the names that programs give to weights in their files."""
    for key in _KEYS:
        inner = content.get(key)
        if isinstance(inner, dict):
            return unwrapped(inner)
    return content


def _metadata(weights: Dict[Any, Any]) -> Dict[str, Dict[str, Any]]:
    """What PyTorch keeps beside the entries of a state dict, and saves with it."""
    metadata = getattr(weights, "_metadata", None)
    if not isinstance(metadata, dict):
        return {}
    return {name: entry for name, entry in metadata.items() if isinstance(entry, dict)}


def _some(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
