"""What a measurement was taken on."""

import os
import platform
from pathlib import Path
from typing import Dict

import detectron2
import torch

from .. import ops
from ..version import __version__


def describe_machine(device: torch.device) -> Dict[str, str]:
    """Hardware and software that the times depend on, in words.

    Args:
        device: where the benchmark runs; GPU and CUDA are named for a GPU only.
    """
    machine = {
        "CPU": f"{_cpu_name()}, {_available_cores()} cores, {torch.get_num_threads()} threads used",
        "memory": f"{_memory_gib():.0f} GiB",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine[
            "GPU"
        ] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        machine["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        machine["TF32"] = (
            f"convolutions {_yes(torch.backends.cudnn.allow_tf32)}, "
            f"matrix products {_yes(torch.backends.cuda.matmul.allow_tf32)}"
        )
    machine["software"] = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}, wsbcn_d2 {__version__}"
    )
    added = ", with the extension of PyTorch" if ops.has_extension() else ""
    machine["kernels of wsbcn_d2"] = ops.backend_name(device) + added
    return machine


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _available_cores() -> int:
    # a container or a batch system may give us fewer than there are
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
