"""The digits dataset, and how configs find it."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from demo import digits
from demo.digits import make_digits_dataset
from wsbcn_d2 import model_zoo
from wsbcn_d2.engine import load_config

datasets = pytest.importorskip("sklearn.datasets")

REPO = Path(__file__).resolve().parents[2]
CONFIG = "Digits-InstanceSegmentation/mask_rcnn_R_18_FPN_bcn_ws.yaml"
SMALL = dict(num_train=24, num_val=10, progress=False)
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return Path(make_digits_dataset(str(tmp_path_factory.mktemp("data") / "digits"), **SMALL))


def read(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def coco(root, split):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}.json"))


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class TestContent:
    @pytest.mark.parametrize("split", SPLITS)
    def test_images_and_categories(self, root, split):
        content = read(root, split)
        assert len(content["images"]) == SMALL[f"num_{split}"]
        assert [c["id"] for c in content["categories"]] == list(range(1, 11))
        assert [c["name"] for c in content["categories"]] == list("0123456789")
        for image in content["images"]:
            with Image.open(root / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"]) == (192, 192)
                assert opened.mode == "RGB"
        assert len(list((root / split).iterdir())) == len(content["images"])

    @pytest.mark.parametrize("split", SPLITS)
    def test_annotations_agree_with_their_masks(self, root, split):
        api = coco(root, split)
        assert api.anns
        for annotation in api.anns.values():
            run_lengths = annotation["segmentation"]
            assert run_lengths["size"] == [192, 192]
            assert annotation["bbox"] == list(mask_util.toBbox(run_lengths))
            assert annotation["area"] == mask_util.area(run_lengths) > 0
            assert annotation["iscrowd"] == 0
            assert 20 <= annotation["bbox"][3] <= 96

    @pytest.mark.parametrize("split", SPLITS)
    def test_two_to_six_digits_that_do_not_overlap(self, root, split):
        api = coco(root, split)
        for image_id in api.imgs:
            annotations = api.loadAnns(api.getAnnIds([image_id]))
            assert 2 <= len(annotations) <= 6
            assert sum(api.annToMask(a).astype(int) for a in annotations).max() == 1

    @pytest.mark.parametrize("split", SPLITS)
    def test_masks_lie_on_the_digits_of_the_images(self, root, split):
        """A digit is of one colour, and another one than what is around it."""
        api = coco(root, split)
        for annotation in api.anns.values():
            name = api.imgs[annotation["image_id"]]["file_name"]
            pixels = np.asarray(Image.open(root / split / name)).astype(float)
            mask = api.annToMask(annotation).astype(bool)
            inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
            x, y, w, h = annotation["bbox"]
            box = np.zeros_like(mask)
            box[y : y + h, x : x + w] = True
            color = np.median(pixels[inside], axis=0)
            assert np.quantile(np.abs(pixels[inside] - color).max(axis=1), 0.9) < 20
            assert np.median(np.abs(pixels[box & ~mask] - color).max(axis=1)) > 25

    @pytest.mark.parametrize("split", SPLITS)
    def test_masks_have_the_shape_of_the_handwritten_samples(self, root, split):
        samples = datasets.load_digits()
        api = coco(root, split)
        correlations = []
        for annotation in api.anns.values():
            sample_id = annotation["sample_id"]
            assert samples.target[sample_id] == annotation["category_id"] - 1
            x, y, w, h = annotation["bbox"]
            crop = Image.fromarray(api.annToMask(annotation)[y : y + h, x : x + w] * 255)
            ink = samples.images[sample_id]
            ink = ink[:, (ink > 8).any(axis=0)]
            shape = np.asarray(crop.resize(ink.shape[::-1], Image.BOX)).astype(float)
            correlations.append(np.corrcoef(shape.ravel(), ink.ravel())[0, 1])
        assert np.median(correlations) > 0.7

    def test_no_sample_is_in_both_splits(self):
        materials = digits.load_materials()
        train, val = (set(materials[split].sample_ids) for split in SPLITS)
        assert not train & val
        assert train | val == set(range(1797))
        for split, fraction in zip(SPLITS, (0.75, 0.25)):
            counts = np.bincount(materials[split].labels, minlength=10)
            totals = np.bincount(datasets.load_digits().target)
            assert np.abs(counts / totals - fraction).max() < 0.01

    def test_images_use_the_samples_of_their_split(self, root):
        used = [{a["sample_id"] for a in read(root, split)["annotations"]} for split in SPLITS]
        assert not used[0] & used[1]

    @pytest.mark.parametrize("iou_type", ["bbox", "segm"])
    def test_ground_truth_as_predictions_has_full_ap(self, root, iou_type):
        truth = coco(root, "val")
        with contextlib.redirect_stdout(io.StringIO()):
            results = truth.loadRes([{**a, "score": 1.0} for a in truth.anns.values()])
            evaluation = COCOeval(truth, results, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)

    @pytest.mark.parametrize("image_size", [64, 301])
    def test_digits_grow_with_the_image(self, tmp_path, image_size):
        root = make_digits_dataset(
            str(tmp_path / "digits"), 8, 4, image_size=image_size, progress=False
        )
        content = read(Path(root), "train")
        heights = np.array([a["bbox"][3] for a in content["annotations"]]) / image_size
        assert 0.1 < heights.min() and heights.max() < 0.5


class TestMaking:
    def test_same_parameters_give_the_same_bytes(self, root, tmp_path):
        again = make_digits_dataset(str(tmp_path / "again"), **SMALL)
        assert contents(Path(again)) == contents(root)

    def test_seed_changes_the_images_but_not_the_split(self, root, tmp_path):
        other = Path(make_digits_dataset(str(tmp_path / "other"), **SMALL, seed=1))
        assert contents(other)["train/000001.jpg"] != contents(root)["train/000001.jpg"]
        train, val = (
            {annotation["sample_id"] for annotation in read(folder, split)["annotations"]}
            for folder, split in ((root, "train"), (other, "val"))
        )
        assert not train & val

    def test_an_image_does_not_depend_on_how_many_there_are(self, root, tmp_path):
        fewer = make_digits_dataset(str(tmp_path / "fewer"), 3, 2, progress=False)
        images = {k: v for k, v in contents(Path(fewer)).items() if k.endswith(".jpg")}
        assert len(images) == 5
        assert images.items() <= contents(root).items()

    def test_is_left_alone_if_there_already(self, root, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # not needed then
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        assert make_digits_dataset(str(root), **SMALL) == str(root)
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    def test_other_parameters_are_refused(self, root):
        before = contents(root)
        with pytest.raises(FileExistsError) as error:
            make_digits_dataset(str(root), **{**SMALL, "num_val": 11})
        for part in (str(root), "num_val=10", "num_val=11", "delete it, or choose another root"):
            assert part in str(error.value)
        assert contents(root) == before

    @pytest.mark.parametrize("lost", ["train/000002.jpg", "annotations/instances_val.json"])
    def test_an_incomplete_dataset_is_refused(self, root, tmp_path, lost):
        copy = shutil.copytree(root, tmp_path / "copy")
        (copy / lost).unlink()
        with pytest.raises(FileExistsError, match="not a complete digits dataset"):
            make_digits_dataset(str(copy), **SMALL)

    def test_other_files_are_refused_and_kept(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("all of it")
        with pytest.raises(FileExistsError, match="not a complete digits dataset"):
            make_digits_dataset(str(tmp_path), **SMALL)
        assert contents(tmp_path) == {"thesis.tex": b"all of it"}

    def test_an_empty_folder_is_used(self, tmp_path):
        assert make_digits_dataset(f"{tmp_path}/", 1, 1, progress=False) == str(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"train", "val", "annotations"}

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
    def test_interruption_leaves_nothing(self, tmp_path, monkeypatch, failure):
        compose, calls = digits._compose_image, []

        def fail_in_the_middle(*args):
            calls.append(args)
            if len(calls) == 26:  # the second of the validation images
                assert any(tmp_path.rglob("*.jpg"))
                raise failure("interrupted")
            return compose(*args)

        monkeypatch.setattr(digits, "_compose_image", fail_in_the_middle)
        with pytest.raises(failure):
            make_digits_dataset(str(tmp_path / "digits"), **SMALL)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_may_be_first(self, root, tmp_path, monkeypatch):
        def be_late(_, target):
            shutil.copytree(root, target)
            raise OSError("Directory not empty")

        monkeypatch.setattr(digits.os, "rename", be_late)
        made = make_digits_dataset(str(tmp_path / "digits"), **SMALL)
        assert contents(Path(made)) == contents(root)
        assert os.listdir(tmp_path) == ["digits"]

    @pytest.mark.parametrize(
        "name, value, allowed",
        [
            ("num_train", 0, "at least 1"),
            ("num_val", -3, "at least 1"),
            ("num_train", 2.5, "an integer"),
            ("num_train", True, "an integer"),
            ("image_size", 63, "at least 64"),
            ("seed", -1, "at least 0"),
            ("seed", "0", "an integer"),
        ],
    )
    def test_bad_arguments(self, tmp_path, name, value, allowed):
        with pytest.raises(ValueError) as error:
            make_digits_dataset(str(tmp_path / "digits"), **{name: value})
        for part in (name, repr(value), allowed):
            assert part in str(error.value)
        assert not any(tmp_path.iterdir())

    def test_scikit_learn_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match="pip install scikit-learn"):
            make_digits_dataset(str(tmp_path / "digits"), **SMALL)
        assert not any(tmp_path.iterdir())


def test_default_root(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert digits.default_root() == "datasets/digits"
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/somewhere")
    assert digits.default_root() == os.path.expanduser("~/somewhere/digits")


def test_configs_find_it_where_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = Path(make_digits_dataset(digits.default_root(), **SMALL))
    load_config(model_zoo.get_config_file(CONFIG))
    for split in SPLITS:
        assert MetadataCatalog.get(f"digits_{split}").evaluator_type == "coco"
        records = DatasetCatalog.get(f"digits_{split}")
        assert MetadataCatalog.get(f"digits_{split}").thing_classes == list("0123456789")
        assert len(records) == SMALL[f"num_{split}"]
        for record, image in zip(records, read(root, split)["images"]):
            assert record["file_name"] == str(root / split / image["file_name"])
            assert {a["category_id"] for a in record["annotations"]} <= set(range(10))


def test_an_installed_package_knows_nothing_of_it():
    code = """if True:
        import sys
        import wsbcn_d2, wsbcn_d2.data, wsbcn_d2.engine, wsbcn_d2.analysis
        from detectron2.data import DatasetCatalog
        assert not [name for name in sys.modules if name.partition(".")[0] == "demo"]
        assert not [name for name in DatasetCatalog.list() if "digits" in name]
    """
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)


class TestCommand:
    def test_command(self, tmp_path):
        command = [sys.executable, "-m", "demo.digits", "--num-train", "2", "--num-val", "1"]
        environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(REPO)}
        result = subprocess.run(
            command + ["--image-size", "96"], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == [
            f"{tmp_path}/digits: made 2 training and 1 validation images"
        ]
        assert len(read(tmp_path / "digits", "train")["images"]) == 2

    def test_error_is_one_line(self, root, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["digits.py", "--root", str(root), "--seed", "7"])
        assert digits.main() == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith(f"python -m demo.digits: {root} ")
        assert "seed=7" in captured.err
