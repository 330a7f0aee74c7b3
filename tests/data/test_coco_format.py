"""What strangers' files look like, and what pycocotools makes of them afterwards."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data.small_coco import SIDE, coco
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data.datasets import register_coco_instances
from detectron2_models import logged
from PIL import Image

from wsbcn_d2.data import check_datasets, check_images, coco_format
from wsbcn_d2.data.coco_format import is_run_length_encoded


def changed(place, index, value=None, **keys):
    """The content of a file in which an entry is another, or has other keys (None: not at all)."""
    content = coco()
    if not keys:
        content[place][index] = value
    for key, new in keys.items():
        if new is None:
            content[place][index].pop(key)
        else:
            content[place][index][key] = new
    return content


def annotation(**keys):
    return changed("annotations", 1, **keys)


VIA = {"1.jpg1234": {"filename": "1.jpg", "regions": []}, "_via_settings": {}}
NO_COCO = "is not in COCO's format"
WRONG = {
    "via": (VIA, f"{NO_COCO}: the list 'images' is missing; its keys are '1.jpg1234'"),
    "list": ([1], f"{NO_COCO}: it is a list, and must be an object with the lists images"),
    "cut": ('{"images": [{"id"', "is not a JSON file"),
    "binary": (b"\xff\xd8\xff\xe0\x00\x10", "is not a JSON file"),
    "empty": ("", "is not a JSON file"),
    "no categories": ({"images": []}, "the list 'categories' is missing; its keys are 'images'"),
    "categories are names": ({**coco(), "categories": {"1": "a"}}, "'categories' is a dict"),
    "null annotations": ({**coco(), "annotations": None}, "'annotations' is a NoneType"),
    "empty categories": ({**coco(), "categories": []}, "the list 'categories' is empty"),
    "no images": ({**coco(), "images": []}, "has no images"),
    "no size": (changed("images", 1, width=None), r"images\[1\]: width is missing; .* positive in"),
    "size": (changed("images", 1, height="64"), r"images\[1\]: height is '64'; it must be a posit"),
    "no name": (changed("images", 0, file_name=None), r"images\[0\]: file_name is missing"),
    "image": (changed("images", 0, "1.jpg"), r"images\[0\] is '1.jpg'; it must be an object"),
    "image ids": (changed("images", 1, id="2"), r"images\[1\]: id is '2'; it must be an integer"),
    "same images": (changed("images", 1, id=1), "the id 1 occurs twice in images"),
    "no class": (changed("categories", 1, name=None), r"categories\[1\]: name is missing"),
    "class id": (changed("categories", 1, id="2"), r"categories\[1\]: id is '2'; .* an integer"),
    "same classes": (changed("categories", 1, id=1), "the id 1 occurs twice in categories"),
    "annotation": (changed("annotations", 1, [1, 2]), r"annotations\[1\] is \[1, 2\]"),
    "no box": (annotation(bbox=None), r"annotations\[1\] \(id 2\): bbox is missing; .* 4 numbers"),
    "text": (annotation(bbox=["1", "2", "3", "4"]), r"bbox is \['1', '2', '3', '4'\]; it must be"),
    "3": (annotation(bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\]; it must be 4 numbers, x, y, width"),
    "empty box": (annotation(bbox=[]), r"bbox is \[\]"),
    "nan": (annotation(bbox=[1, 2, 3, float("nan")]), "bbox is .*nan"),
    "fractions": (
        coco(images=1, objects=1, bbox=[0.1, 0.2, 0.3, 0.8]),
        "must be x, y, width and height in pixels, and not in fractions",
    ),
    "turned": (annotation(bbox=[9, 9, -3, 2]), "bbox is .*the last two not negative"),
    "no class id": (annotation(category_id=None), "category_id is missing"),
    "foreign class": (annotation(category_id=7), "category_id is 7; .*one of the categories: 1, 2"),
    "no id": (annotation(id=None), r"annotations\[1\] \(id None\): id is missing"),
    "same ids": (annotation(id=1), "the id 1 occurs twice in annotations"),
    "no image id": (annotation(image_id=None), "image_id is missing"),
    "crowd": (annotation(iscrowd="0"), "iscrowd is '0'; it must be 0 or 1, or left out"),
    "ignore": (annotation(ignore=1), "ignore is 1; it must be 0 or left out"),
    "area": (annotation(area="12"), "area is '12'; it must be a number"),
    "flat": (annotation(segmentation=[1, 1, 5, 1, 5, 5]), r"segmentation is \[1, .* list of polyg"),
    "texts": (annotation(segmentation=[["1", "2"]]), "segmentation is .* list of polygons"),
    "name": (annotation(segmentation="1.png"), "segmentation is '1.png'; it must be polygons, or"),
    "other size": (
        annotation(segmentation={"counts": [0, 100], "size": [10, 10]}),
        r"with the image's size, \[64, 64\]",
    ),
    "size of texts": (
        annotation(image_id=99, segmentation={"counts": [1], "size": ["a", "b"]}),
        r"it must be polygons, or",
    ),
    "size of an image that is not listed": (
        annotation(image_id=99, segmentation={"counts": "ab", "size": 5}),
        r"segmentation is \{'counts': 'ab', 'size': 5\}; it must be polygons, or",
    ),
    "run lengths": (
        annotation(segmentation={"counts": [0, 100, 3995], "size": [SIDE, SIDE]}),
        "run lengths: counts whose sum is that of the pixels, 4096",
    ),
    "texts as run lengths": (
        annotation(segmentation={"counts": ["a"], "size": [SIDE, SIDE]}),
        "run lengths: counts whose sum",
    ),
    "run lengths of too few pixels": (
        annotation(segmentation={"counts": "", "size": [SIDE, SIDE]}),
        "segmentation is .* run lengths: counts whose sum",
    ),
    "text that is no run lengths": (
        annotation(segmentation={"counts": "garbage!!", "size": [SIDE, SIDE]}),
        "segmentation is .* run lengths: counts whose sum",
    ),
    "nan in a polygon": (annotation(segmentation=[[1, 1, 5, 1, float("nan"), 5]]), "list of polyg"),
    "keypoints": (annotation(keypoints=[1, 2]), "keypoints is .* x, y and visibility"),
    "foreign images": (
        {**coco(), "images": [{**i, "id": str(i["id"])} for i in coco()["images"]]},
        "no annotation is of one of the images: the first has the image_id 1, .* the id '1'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_says_what_is_wrong(tmp_path, case):
    content, message = WRONG[case]
    path = tmp_path / "a.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for read in (coco_format.coco_file, coco_format.load_coco):
        with pytest.raises(ValueError, match=message) as info:
            read(str(path))
        assert str(path) in str(info.value) and "\n" not in str(info.value)


def test_a_good_file(register):
    """It is left as it is, and what a run has to know is known."""
    content = coco(keypoints=("nose", "tail"), classes=("b", "a"))
    content["categories"].reverse()
    content["annotations"][0]["iscrowd"] = 1
    name = register(content)
    check_datasets([name])
    path = MetadataCatalog.get(name).json_file
    assert coco_format.load_coco(path).dataset == content
    assert coco_format.coco_file(path) == coco_format.CocoFile(
        path,
        classes=("b", "a"),
        has_annotations=True,
        num_objects=3,
        most_keypoints=4,
        num_keypoints=2,
        keypoint_names=("nose", "tail"),
        images=(("1.png", SIDE, SIDE), ("2.png", SIDE, SIDE)),
    )


def test_what_is_missing_is_completed_as_coco_has_it(tmp_path):
    content = coco(area=None, iscrowd=None, keypoints=("nose", "tail"))
    first, second, third, fourth = content["annotations"]
    second["segmentation"] = []
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:6, 10:14] = 1
    third["segmentation"] = {"size": [SIDE, SIDE], "counts": _counts(mask)}
    del third["num_keypoints"]
    third["keypoints"][2] = 0
    fourth.update(keypoints=[], area=None)
    del fourth["num_keypoints"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    read = coco_format.load_coco(str(tmp_path / "a.json"))
    annotations = read.loadAnns(read.getAnnIds(iscrowd=False))
    triangle = mask_util.area(mask_util.frPyObjects(first["segmentation"], SIDE, SIDE))[0]
    assert [a["area"] for a in annotations] == [triangle, 64, 12, triangle]
    assert [a["num_keypoints"] for a in annotations] == [2, 2, 1, 0]
    assert annotations[3]["keypoints"] == [0] * 6
    assert [a["id"] for a in annotations] == [1, 2, 3, 4]


def _counts(mask):
    """Run lengths as people write them, down the columns."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff(ends, prepend=0).tolist()


@pytest.mark.parametrize("density", [0, 0.001, 0.1, 0.5, 1])
def test_run_lengths_that_pycocotools_writes(density):
    mask = np.random.default_rng(0).random((60, 300)) < density
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = encoded["counts"].decode()
    for form in (counts, encoded["counts"], _counts(mask)):
        assert is_run_length_encoded({"size": [60, 300], "counts": form})
        assert not is_run_length_encoded({"size": [60, 301], "counts": form})
    for broken in (counts[:-1], counts + counts, counts[:-1] + "~", counts + "é"):
        assert not is_run_length_encoded({"size": [60, 300], "counts": broken})


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [-1, 5, 6, 7], ["a", "b", "c", "d"]])
def test_ids_that_pycocotools_cannot_use_are_said_and_replaced(tmp_path, ids):
    content = coco()
    for entry, new in zip(content["annotations"], ids):
        entry["id"] = new
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with logged("detectron2.wsbcn_d2.data") as messages:
        read = coco_format.load_coco(str(path))
    assert sorted(read.anns) == [1, 2, 3, 4]
    assert f"positive integers, but annotations[0] has {ids[0]!r}" in messages[0]


def test_a_file_is_read_once_unless_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco()))
    loads = []
    load = json.load
    monkeypatch.setattr(json, "load", lambda file: loads.append(1) or load(file))
    for _ in range(3):
        coco_format.coco_file(str(path))
    assert len(loads) == 1
    path.write_text(json.dumps(coco(classes=("a", "b", "c"))))
    os.utime(path, ns=(1, 1))
    assert coco_format.coco_file(str(path)).classes == ("a", "b", "c")


def corners(content):
    """Boxes as many write them: x0, y0, x1, y1."""
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
    return content


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            corners(coco(objects=7)),
            r"6 of 14 boxes reach out of .*\[4\] \(id 5\) has \[36, 0, 44, 8\] in an image",
        ),
        (annotation(image_id=9), "1 of 4 annotations are of images that it does not list"),
        (annotation(bbox=[-2.2, 0, 68, 64.5]), None),
        (annotation(bbox=[-2.3, 0, 60, 60]), "1 of 4 boxes reach out of"),
    ],
)
def test_what_training_would_do_without_a_word_is_said(tmp_path, content, expected):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with logged("detectron2.wsbcn_d2.data") as messages:
        coco_format.coco_file(str(path))
    assert len(messages) == (expected is not None)
    assert not messages or re.search(expected, messages[0])


def test_images_that_are_not_there(register):
    content = coco(images=3)
    name = register(content)
    folder = Path(MetadataCatalog.get(name).image_root)
    check_images([name])
    (folder / "sub").mkdir()
    (folder / "2.png").rename(folder / "sub" / "2.png")
    content["images"][1]["file_name"] = "sub/2.png"
    (folder / "annotations.json").write_text(json.dumps(content))
    check_images([name])
    (folder / "3.png").unlink()
    check_datasets([name])  # for what needs annotations only
    message = f"1 of 3 images of .* are not in '{folder}'; the first is '3.png'"
    with pytest.raises(FileNotFoundError, match=message):
        check_images([name])
    vars(MetadataCatalog.get(name))["image_root"] = "https://example.org"
    check_images([name])


def test_images_with_damaged_exif_and_paths_of_pathlib(tmp_path):
    """Detectron2 reads them, too."""
    content = coco(images=1)
    content["images"][0]["file_name"] = "1.jpg"
    exif = b"Exif\x00\x00garbage garbage"
    Image.new("RGB", (64, 64)).save(tmp_path / "1.jpg", dpi=(72, 72), exif=exif)
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"{tmp_path}_pathlib"
    register_coco_instances(name, {}, tmp_path / "a.json", tmp_path)
    check_datasets([name])
    check_images([name])
    assert utils.read_image(str(tmp_path / "1.jpg")).shape == (64, 64, 3)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_sizes_of_images(register, orientation):
    """As Detectron2 reads them, which otherwise finds out in training."""
    content = coco(images=20)
    for image in content["images"]:
        image.update(file_name=f"{image['id']}.jpg", height=40)
    name = register(content)
    root = Path(MetadataCatalog.get(name).image_root)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    for image in content["images"]:
        size = (40, 64) if orientation in (6, 8) else (64, 40)
        Image.new("RGB", size).save(root / image["file_name"], exif=exif)
        utils.check_image_size(image, utils.read_image(str(root / image["file_name"])))
    check_images([name])
    Image.new("RGB", (40, 64) if size == (64, 40) else (64, 40)).save(root / "3.jpg", exif=exif)
    with pytest.raises(ValueError, match="3.jpg' has 40 x 64 .* width and height are 64 and 40"):
        check_images([name])
    (root / "1.jpg").write_text("no image")
    with pytest.raises(ValueError, match="1.jpg' cannot be read as an image"):
        check_images([name])


def test_degenerate_polygons_do_not_count_as_masks(tmp_path):
    """Detectron2 trains without such objects, and pycocotools takes 4 numbers for a box."""
    path = tmp_path / "a.json"
    content = coco()
    content["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]
    path.write_text(json.dumps(content))
    file = coco_format.coco_file(str(path))
    assert file.without_mask is None
    assert file.without_usable_mask == "annotations[1] (id 2)"


@pytest.mark.parametrize(
    "files, message",
    [
        (lambda p: (p, p), "its json_file .* is a folder, and must be a file"),
        (lambda p: (p / "a.json", p / "a.json"), "its image_root .* is a file, and must be a fo"),
    ],
)
def test_swapped_file_and_folder(register, tmp_path, files, message):
    name = register(coco())
    metadata = MetadataCatalog.get(name)
    (tmp_path / "a.json").write_text("{}")
    json_file, image_root = files(tmp_path)
    vars(metadata).update(json_file=str(json_file), image_root=str(image_root))
    with pytest.raises(ValueError, match=message):
        check_datasets([name])


def test_classes_that_were_registered_otherwise(register):
    """Detectron2's AssertionError, when the file is read."""
    name = register(coco(), thing_classes=["dog", "cat"])
    with pytest.raises(ValueError, match="thing_classes are dog, cat, and .* of their ids, cat, d"):
        check_datasets([name])
