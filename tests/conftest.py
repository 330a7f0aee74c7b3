import os
import sys
from pathlib import Path

import pytest
import torch

# The processes of the tests share the cores: several threads each would wait for one another.
torch.set_num_threads(1)

# Without a GPU, Triton's kernels are tested by its interpreter, which is chosen on import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for oracles.py
sys.path.append(str(ROOT))  # for what is no part of the package


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
