"""What the documents tell people to run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo.digits import make_digits_dataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# for patterns in file names, one that must exist
PLACEHOLDERS = {"<norm>": "bcn_ws", "<schedule>": "2x", "<images>": "1img"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    text = document.read_text()
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    folders = "tools|configs|docs|requirements|tests|wsbcn_d2"
    paths = set(re.findall(rf"\b((?:{folders})/[\w/.-]+\.\w+)", text))
    paths |= {path for path in re.findall(r"\]\(([\w.-]+\.md)\)", text) if document.parent == ROOT}
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_tools_can_be_executed():
    assert [t for t in (ROOT / "tools").iterdir() if t.suffix and not os.access(t, os.X_OK)] == []


def one_class_with_polygons(annotations):
    """What the command of the README expects: Detectron2's balloon dataset is like that."""
    data = json.loads(annotations.read_text())
    data["categories"] = [{"id": 1, "name": "balloon"}]
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["category_id"] = 1
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    annotations.write_text(json.dumps(data))


def test_your_own_lazy_config(tmp_path):
    (config,) = re.findall(r"^```python\n([^`]*lr_multiplier.*?)```", README, re.S | re.M)
    (norm,) = re.findall(r"--config-file my_lazy.py '(train.norm=.*?)'`", README)
    make_digits_dataset(
        str(tmp_path / "balloon"), num_train=2, num_val=2, image_size=64, progress=False
    )
    for annotations in (tmp_path / "balloon" / "annotations").iterdir():
        one_class_with_polygons(annotations)
    (tmp_path / "my_lazy.py").write_text(config)
    size = "mapper.augmentations.0.short_edge_length"
    small = [
        *("train.max_iter=1", "train.device=cpu"),
        *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
        *(f"dataloader.train.{size}=[64]", f"dataloader.test.{size}=64"),
    ]
    command = [sys.executable, str(ROOT / "tools" / "lazyconfig_train_net.py")]
    command += ["--config-file", "my_lazy.py", norm, *small]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "groups=16" in (tmp_path / "output" / "lazy" / "config.yaml").read_text()
    assert (tmp_path / "output" / "lazy" / "model_final.pth").is_file()


def test_your_own_dataset(tmp_path):
    text = README
    section = re.search(r"## Your own dataset\n(.*?)\n## ", text, re.S)
    # and one of COCO's configs, which needs weights from the network
    commands = re.findall(r"^```\n(.*?)```", section[1], re.S | re.M)[:2]
    (predictor,) = re.findall(r"^```python\n([^`]*DefaultPredictor\(.*?)```", text, re.S | re.M)
    make_digits_dataset(
        str(tmp_path / "balloon"), num_train=4, num_val=2, image_size=96, progress=False
    )
    for annotations in (tmp_path / "balloon" / "annotations").iterdir():
        one_class_with_polygons(annotations)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # all detections, as there are hardly good ones after so few steps
    shorter = "SOLVER.MAX_ITER 2 SOLVER.STEPS '()' MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 OUTPUT_DIR"
    assert "OUTPUT_DIR" in commands[0] and "compare.py" in commands[1]
    script = "".join(commands).replace("OUTPUT_DIR", shorter)
    script = re.sub("^tools/", f"{sys.executable} {ROOT}/tools/", script, flags=re.M)
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True)
    predictor += "import numpy; print(predictor(numpy.zeros((96, 80, 3), 'uint8')))"
    subprocess.run([sys.executable, "-c", predictor], cwd=tmp_path, check=True)
    run = tmp_path / "output" / "my"
    metrics = json.loads((run / "metrics.json").read_text().splitlines()[-1])
    compared = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert compared["dataset"]["name"] == "my_val"
    assert compared["groups"][0]["ap"]["bbox"]["AP"]["value"] == pytest.approx(
        metrics["bbox/AP"], abs=1e-3
    )
    assert (run / "differ.png").stat().st_size > 1000
    assert (run / "folded" / "config.yaml").is_file()
