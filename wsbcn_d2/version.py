"""The version, where setup.py can read it without importing the package, and those of others."""

import importlib
import re

__version__ = "0.1.0"

# The oldest with which the tests pass; see docs/versions.md.
_OLDEST = {"detectron2": (0, 6), "torch": (2, 0)}


def check_versions() -> None:
    """Raises ImportError if Detectron2 or PyTorch is too old for this package."""
    for package, oldest in _OLDEST.items():
        version = importlib.import_module(package).__version__
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers and tuple(map(int, numbers.groups())) < oldest:
            raise ImportError(
                f"wsbcn_d2 needs {package} {oldest[0]}.{oldest[1]} or newer, but {version} is "
                "installed."
            )
