import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU, Triton's kernels are tested by its interpreter, which is chosen when Triton is
# imported, as Detectron2 does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

# The processes of the tests share the cores: several threads each would wait for one another.
torch.set_num_threads(1)

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


def _forget_datasets():
    """Those that a test, or a fixture of a module, registers, or a config that it reads, are gone
    after it."""
    with pytest.MonkeyPatch.context() as patch:
        for catalog in (DatasetCatalog, MetadataCatalog):
            patch.setattr(catalog, "data", dict(catalog.data))
        yield


_of_tests = pytest.fixture(autouse=True)(_forget_datasets)
_of_modules = pytest.fixture(autouse=True, scope="module")(_forget_datasets)


@pytest.fixture
def register(tmp_path):
    """Writes the content of a file in COCO's format and its images, and registers the dataset."""
    names = []

    def write(content, name=None, **metadata):
        name = name or f"{tmp_path.name}_{len(names)}"
        folder = tmp_path / name
        folder.mkdir()
        for image in content["images"] if isinstance(content, dict) else ():
            size = (image["height"], image["width"], 3)
            Image.fromarray(np.zeros(size, np.uint8)).save(folder / image["file_name"])
        (folder / "annotations.json").write_text(json.dumps(content))
        register_coco_instances(name, metadata, str(folder / "annotations.json"), str(folder))
        names.append(name)
        return name

    return write
