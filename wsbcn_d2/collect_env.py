"""One screen on this installation, for bug reports: ``python -m wsbcn_d2.collect_env``."""

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import List, Optional, Tuple

import detectron2
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY

from . import detectron2_hooks, norm_options, ops
from .modeling import BACKBONES
from .version import __version__

_OTHER_PACKAGES = ("torchvision", "triton", "fvcore", "pycocotools", "numpy", "cv2", "PIL")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DETECTRON2_DATASETS",
    "OMP_NUM_THREADS",
    "WSBCN_D2_BACKEND",
)
_NAME_WIDTH = 22
_LINE_WIDTH = 100


def collect_env_info() -> str:
    """Returns what a bug report needs to say: versions, kernels in use, what is registered."""
    lines: List[str] = []
    for name, value in _collect():
        indent = " " * _NAME_WIDTH
        lines += textwrap.wrap(
            value,
            _LINE_WIDTH,
            initial_indent=name.ljust(_NAME_WIDTH),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [name]
    return "\n".join(lines)


def _collect() -> List[Tuple[str, str]]:
    info = [
        ("wsbcn_d2", f"{__version__} {_commit()}@ {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()} @ {sys.executable}"),
        ("system", f"{platform.platform()}, {os.cpu_count()} CPUs"),
        ("torch", f"{torch.__version__}, {_cuda()}"),
        *_gpus(),
        ("detectron2", f"{detectron2.__version__} @ {Path(detectron2.__file__).parent}"),
        ("detectron2._C", _compiled_ops()),
    ]
    info += [(name, _version(name)) for name in _OTHER_PACKAGES]
    info += [(f"${name}", os.environ[name]) for name in _VARIABLES if name in os.environ]
    info += [
        ("kernels", _kernels()),
        ("registered", "yes" if detectron2_hooks.is_registered() else "no"),
        ("norm options", ", ".join(norm_options.list_norm_options()) + "; each also with +WS"),
        ("backbones", ", ".join(_backbones()) or "none"),
        ("datasets here", ", ".join(_datasets()) or "none"),
    ]
    return info


def _commit() -> str:
    """The commit if this is a checkout, and whether it was changed since."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        text = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or somebody else's checkout
        return ""
    return f"(git {text}) "


def _cuda() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if not torch.version.cuda:
        return "built without CUDA"
    available = "" if torch.cuda.is_available() else ", no GPU available"
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}{available}"


def _gpus() -> List[Tuple[str, str]]:
    counts: "Counter[str]" = Counter()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        counts[f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"] += 1
    return [("GPU", f"{count} x {gpu}") for gpu, count in counts.items()]


def _kernels() -> str:
    """Those in use, on a GPU too if there is one."""
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return ", ".join(f"{name}: {ops.backend_name(torch.device(name))}" for name in names)


def _compiled_ops() -> str:
    """Which of Detectron2's own compiled operations can be used; it runs without them."""
    try:
        compiled = importlib.import_module("detectron2._C")
    except ImportError as error:
        return (
            f"not usable ({error}): no deformable convolution, rotated boxes or fast COCOeval; "
            "NMS and RoIAlign are torchvision's"
        )
    has = {
        "deformable convolution": hasattr(compiled, "deform_conv_forward"),
        "rotated boxes": hasattr(torch.ops.detectron2, "nms_rotated"),
        "fast COCOeval": hasattr(compiled, "COCOevalEvaluateImages"),
    }
    return ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in has.items())


def _version(module: str) -> str:
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        return f"not usable ({error})"
    return getattr(imported, "__version__", None) or _distribution_version(module)


def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _backbones() -> List[str]:
    """Those of this package that Detectron2 can build at present."""
    return [name for name, build in BACKBONE_REGISTRY if build in BACKBONES]


def _datasets() -> List[str]:
    """Those known to Detectron2 whose annotations are on this machine."""
    found = []
    for name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        path: Optional[str] = metadata.get("json_file") or metadata.get("panoptic_json")
        if path and os.path.exists(path):
            found.append(name)
    return found


if __name__ == "__main__":
    print(collect_env_info())
