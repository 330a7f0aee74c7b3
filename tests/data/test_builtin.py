"""The registration of the datasets of a config, and the check that their files exist."""

import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsbcn_d2.data import check_datasets, register_coco_format

MINE = ("mine", "$DETECTRON2_DATASETS/my/val.json", "$DETECTRON2_DATASETS/my/val")


@pytest.mark.parametrize("root", [None, "~/somewhere"])
def test_paths_beside_the_datasets_of_detectron2(root, monkeypatch):
    if root is None:
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    else:
        monkeypatch.setenv("DETECTRON2_DATASETS", root)
    register_coco_format([MINE])
    metadata = MetadataCatalog.get("mine")
    expected = os.path.expanduser(root or "datasets")
    assert metadata.json_file == f"{expected}/my/val.json"
    assert metadata.image_root == f"{expected}/my/val"
    register_coco_format([MINE])  # the same again
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    with pytest.raises(ValueError, match="'mine' is the name of another dataset, whose files are"):
        register_coco_format([MINE])


def test_dataset_that_was_not_put_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_coco_format([MINE])
    with pytest.raises(FileNotFoundError) as error:
        check_datasets(["mine"])
    for part in ("'mine'", repr(str(tmp_path / "my/val.json")), f"is {str(tmp_path)!r}"):
        assert part in str(error.value)
    assert str(error.value).endswith("or set DETECTRON2_DATASETS to the folder it is in")


def test_dataset_where_no_folder_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    register_coco_format([MINE])
    with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS is not set, so it is"):
        check_datasets(["mine"])


def test_unknown_name():
    with pytest.raises(ValueError) as error:
        check_datasets(["coco_2017_vla"])
    for part in ("'coco_2017_vla'", "coco_2017_val", f"{len(DatasetCatalog.list())} others"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="none has a similar name"):
        check_datasets(["qqqqqqqq"])


@pytest.mark.parametrize(
    "attribute",
    ["json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root"]
    + ["image_dir", "gt_dir", "dirname"],
)
def test_missing_path(tmp_path, monkeypatch, attribute):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    DatasetCatalog.register("my_dataset", list)
    check_datasets(["my_dataset"])
    path = str(tmp_path / "nowhere")
    MetadataCatalog.get("my_dataset").set(**{attribute: path})
    with pytest.raises(FileNotFoundError) as error:
        check_datasets(iter(["my_dataset"]))
    for part in ("my_dataset", attribute, path, "put it there, or name another path"):
        assert part in str(error.value)
    assert "DETECTRON2_DATASETS" not in str(error.value)  # which has nothing to do with it
    os.mkdir(path)
    check_datasets(["my_dataset"])


def test_remote_location_is_not_checked():
    DatasetCatalog.register("my_dataset", list)
    MetadataCatalog.get("my_dataset").set(json_file="https://example.org/a.json", image_root="")
    check_datasets(["my_dataset"])
