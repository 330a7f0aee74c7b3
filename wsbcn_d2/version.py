"""The version, where setup.py can read it without importing the package, and those of others."""

import re
import sys

import torch
from detectron2.layers import FrozenBatchNorm2d

__version__ = "0.2.0"

# The oldest that are supported; docs/versions.md says with which the tests have run.
_PYTHON = (3, 10)
_TORCH = (2, 4)


def check_versions() -> None:
    """Raises ImportError, naming it, if something that this package builds on is too old."""
    too_old = []
    if sys.version_info < _PYTHON:
        too_old.append(f"Python {sys.version.split()[0]}")
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers and tuple(map(int, numbers.groups())) < _TORCH:
        too_old.append(f"torch {torch.__version__}")
    # Its number has been 0.6 since 2021, so a method tells, which came in June 2023: what lies
    # between that and 2024 is not noticed.
    if not hasattr(FrozenBatchNorm2d, "convert_frozenbatchnorm2d_to_batchnorm2d"):
        too_old.append("a Detectron2 of before 2024, as its release 0.6 is")
    if too_old:
        raise ImportError(
            "wsbcn_d2 needs Python 3.10, torch 2.4 and Detectron2's main branch of 2024, or newer; "
            f"this environment has {' and '.join(too_old)}."
        )
