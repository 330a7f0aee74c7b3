"""The extension of PyTorch, :file:`extension.cpp`, compiled when first needed.

It does without Python what :mod:`.batch_channel_norm` and :mod:`.branch` do in Python, and computes
the same. The C++ compiler of the machine makes it in half a minute, once for a version of PyTorch
(:mod:`.compiler`); ``CXX`` chooses another compiler. Where that fails, Python it is, and a warning
says why; with ``WSBCN_D2_EXTENSION=0`` in the environment it is not tried.
"""

import importlib.machinery
import importlib.util
import logging
import os
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Optional, Tuple

import torch

from .compiler import Program, cached

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

_VARIABLE = "WSBCN_D2_EXTENSION"
_NAME = "wsbcn_d2_extension"
# Older versions have other nodes.
_OLDEST = (2, 1)


def extension() -> Optional[ModuleType]:
    """The extension; None where Python is to do its work."""
    # Compiled autograd asks a node what it is made of, which one of the extension does not say.
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and getattr(compiled, "compiled_autograd_enabled", False):
        return None
    return load()


@lru_cache(maxsize=None)
def load() -> Optional[ModuleType]:
    """The extension, compiled if need be; None where that fails or is not wanted."""
    if os.environ.get(_VARIABLE, "1") == "0" or _version_of_torch() < _OLDEST:
        return None
    try:
        return cached(_program(), _load, _announce)
    except Exception as problem:  # no compiler, no headers of Python, no place to write to, ...
        logger.warning(
            "The extension of PyTorch cannot be compiled, so BCN and WS need more time on the "
            f"host, which counts with few images on a GPU: {type(problem).__name__}: {problem}"
        )
        return None


def has_extension() -> bool:
    """Whether the extension is there, which is found out by compiling it, once on a machine."""
    return load() is not None


def _announce() -> None:
    # A warning, for it is the level that is shown where nothing has been set up to show messages,
    # and a program that says nothing for so long seems to hang.
    logger.warning("Compiling the extension of PyTorch for BCN (once, about half a minute) ...")


def _version_of_torch() -> Tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _program() -> Program:
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include"]
    includes.append(Path(sysconfig.get_paths()["include"]))
    return Program(
        Path(__file__).with_name("extension.cpp"),
        language="C++",
        variable="CXX",
        compilers=("c++", "g++", "clang++"),
        flags=(
            # What the headers of PyTorch want.
            "-std=c++20" if _version_of_torch() >= (2, 14) else "-std=c++17",
            "-O1",  # there is nothing to compute
            "-w",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            *(f"-isystem{path}" for path in includes),
        ),
        libraries=(f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"),
        depends_on=(torch.__version__, sysconfig.get_config_var("SOABI") or ""),
    )


def _load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
