"""What the documents tell people to run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wsbcn_d2.data import make_digits_dataset

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# for patterns in file names, one that must exist
PLACEHOLDERS = {"<norm>": "bcn_ws", "<schedule>": "2x", "<images>": "1img"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    text = document.read_text()
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    paths = set(re.findall(r"\b((?:tools|configs|docs|requirements|wsbcn_d2)/[\w/.-]+\.\w+)", text))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_tools_can_be_executed():
    assert [t for t in (ROOT / "tools").iterdir() if t.suffix and not os.access(t, os.X_OK)] == []


def one_class_with_polygons(annotations):
    """What the script of the README expects: Detectron2's balloon dataset is like that."""
    data = json.loads(annotations.read_text())
    data["categories"] = [{"id": 1, "name": "balloon"}]
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["category_id"] = 1
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    annotations.write_text(json.dumps(data))


def test_your_own_dataset(tmp_path):
    script = re.search(
        r"in a dozen lines.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    make_digits_dataset(
        str(tmp_path / "balloon"), num_train=4, num_val=2, image_size=96, progress=False
    )
    for annotations in (tmp_path / "balloon" / "annotations").iterdir():
        one_class_with_polygons(annotations)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shorter = '"SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "OUTPUT_DIR"'
    assert '"OUTPUT_DIR"' in script[1]
    code = script[1].replace('"OUTPUT_DIR"', shorter)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    metrics = (tmp_path / "output" / "my" / "metrics.json").read_text()
    assert "bbox/AP" in json.loads(metrics.splitlines()[-1])
    # What tools/compare.py tells runs apart by.
    assert "BCN+WS" in (tmp_path / "output" / "my" / "config.yaml").read_text()
