import copy
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from data.small_coco import coco, detections, outputs
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2_models import logged, small_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from wsbcn_d2.engine import build_evaluator
from wsbcn_d2.engine.evaluation import _EVALUATORS, CocoFileEvaluator, detections_per_image


@pytest.fixture
def dataset(tmp_path):
    """A registered dataset of one image with instances and a semantic segmentation."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "1.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "1.png")
    annotation = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 4, 4], area=16, iscrowd=0)
    data = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{**annotation, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    name = f"evaluated_{tmp_path.name}"
    register_coco_instances(name, {}, str(tmp_path / "instances.json"), str(tmp_path))
    stock = DatasetCatalog.get(name)
    DatasetCatalog.remove(name)
    records = [{**record, "sem_seg_file_name": str(tmp_path / "1.png")} for record in stock]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        stuff_classes=["thing", "stuff"],
        ignore_label=255,
        dirname=str(tmp_path),
        split="val",
        year=2012,
        thing_dataset_id_to_contiguous_id={1: 0},
        stuff_dataset_id_to_contiguous_id={},
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


EXPECTED = {
    "coco": CocoFileEvaluator,
    "coco_panoptic_seg": DatasetEvaluators,
    "sem_seg": SemSegEvaluator,
    "lvis": LVISEvaluator,
    "pascal_voc": PascalVOCDetectionEvaluator,
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "cityscapes_sem_seg": CityscapesSemSegEvaluator,
}


def test_all_types_are_tested():
    assert set(EXPECTED) == set(_EVALUATORS)


@pytest.mark.parametrize("evaluator_type", EXPECTED)
def test_evaluator_follows_the_type_of_the_dataset(dataset, evaluator_type, tmp_path):
    if evaluator_type == "lvis":
        pytest.importorskip("lvis")
    metadata = MetadataCatalog.get(dataset)
    del metadata.evaluator_type
    metadata.evaluator_type = evaluator_type
    evaluator = build_evaluator(dataset, str(tmp_path / "out"))
    assert type(evaluator) is EXPECTED[evaluator_type]
    if evaluator_type == "coco_panoptic_seg":
        parts = [type(part) for part in evaluator._evaluators]
        assert parts == [SemSegEvaluator, CocoFileEvaluator, COCOPanopticEvaluator]


def evaluate(register, tmp_path, content, predicted=None, masks=False, **settings):
    """The results of detections of every object of `predicted` (default: of the same file)."""
    name = register(content)
    MetadataCatalog.get(name).thing_classes = [c["name"] for c in content["categories"]]
    ids = {c["id"]: i for i, c in enumerate(content["categories"])}
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = ids
    evaluator = build_evaluator(name, str(tmp_path / "out"), **settings)
    evaluator.reset()
    for pair in outputs(predicted or content, masks):
        evaluator.process(*pair)
    return evaluator.evaluate()


def assert_equal(results, expected):
    assert set(results) == set(expected)
    for kind in expected:
        assert results[kind] == pytest.approx(expected[kind], nan_ok=True)


@pytest.mark.parametrize("limit", [150, 200, -1])
def test_all_detections_that_the_config_allows_count(register, tmp_path, limit):
    """COCO's 100 are for each class of an image: of 150 perfect ones it counts two thirds."""
    content = crowded(150)
    results = evaluate(register, tmp_path, content, max_detections=limit, masks=True)
    for kind in ("bbox", "segm"):
        assert results[kind]["AP"] == results[kind]["AP-cat"] == pytest.approx(100)
        assert results[kind]["AP@100"] == pytest.approx(at_100(content))
        assert results[kind]["AP-cow"] != results[kind]["AP-cow"]  # NaN: there is none
    standard = evaluate(register, tmp_path, content)["bbox"]
    assert standard["AP"] == pytest.approx(at_100(content))
    assert "AP@100" not in standard


def crowded(number):
    """Two classes, of which one has objects, in one image."""
    content = coco(images=1, objects=number, classes=("cat",))
    for k, entry in enumerate(content["annotations"]):
        x, y = 4 * (k % 15), 4 * (k // 15)
        entry.update(bbox=[x, y, 3, 3], segmentation=[[x, y, x + 3, y, x + 3, y + 3, x, y + 3]])
    content["categories"].append({"id": 2, "name": "cow"})
    return content


def at_100(content):
    """By pycocotools, as it is."""
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(detections(content)), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats[0] * 100


@pytest.mark.parametrize("first", [0, -3])
def test_ids_from_0_do_not_lose_an_object(register, tmp_path, first):
    content = coco(images=1, objects=3, classes=("cat",))
    numbered_from_1 = copy.deepcopy(content)
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = first + number
    results = evaluate(register, tmp_path, content, masks=True)
    assert_equal(results, evaluate(register, tmp_path, numbered_from_1, masks=True))
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    if first == 0:
        assert at_100(content) < 99  # what pycocotools makes of it


def test_annotations_without_optional_keys(register, tmp_path):
    content = coco(area=None, iscrowd=None)
    content["annotations"][0]["iscrowd"] = 1
    predicted = coco()
    predicted["annotations"].pop()
    complete = coco()
    complete["annotations"][0]["iscrowd"] = 1
    for entry in complete["annotations"]:
        polygons = mask_util.frPyObjects(entry["segmentation"], 64, 64)
        entry["area"] = int(mask_util.area(polygons)[0])
    results = evaluate(register, tmp_path, content, predicted, masks=True)
    assert_equal(results, evaluate(register, tmp_path, complete, predicted, masks=True))
    assert 0 < results["bbox"]["AP"] < 100


def test_sigmas_of_a_skeleton_of_three(register, tmp_path):
    content = coco(classes=("person",), keypoints=("a", "b", "c"))
    for entry in content["annotations"]:
        entry["area"] = 2000  # COCO has no small persons
    shifted = copy.deepcopy(content)
    for entry in shifted["annotations"]:
        entry["keypoints"] = [v + (i % 3 < 2) for i, v in enumerate(entry["keypoints"])]
    ap = [
        evaluate(register, tmp_path, content, of, oks_sigmas=[sigma] * 3)["keypoints"]["AP"]
        for of, sigma in ((content, 0.01), (shifted, 0.1), (shifted, 0.01))
    ]
    assert ap == pytest.approx([100, 100, oks_ap(1, 0.01, 2000)])


def oks_ap(shift, sigma, area):
    """The object keypoint similarity of points that are off by `shift` in x and y, as an AP: the
    share of the thresholds 0.5, 0.55, ..., 0.95 that it reaches."""
    similarity = math.exp(-(2 * shift**2) / (2 * area * (2 * sigma) ** 2))
    return 100 * np.mean(np.arange(0.5, 0.96, 0.05) <= similarity)


def test_more_persons_than_coco_counts(register, tmp_path):
    """Of keypoints, whatever the config allows."""
    names = [str(i) for i in range(17)]
    content = coco(images=1, objects=30, classes=("person",), keypoints=names)
    for entry in content["annotations"]:
        entry["area"] = 2000  # COCO has no small persons
    with logged("detectron2.evaluation.coco_evaluation") as messages:
        for limit in (100, 150):
            results = evaluate(register, tmp_path, content, max_detections=limit)
            assert results["bbox"]["AP"] == pytest.approx(100)
            assert results["keypoints"]["AP"] == pytest.approx(67 / 101 * 100)  # 20 of 30
    said = [m for m in messages if "up to 30 objects with keypoints in an image" in m]
    assert len(said) == 2 and "counts the 20 detections" in said[0]
    content["annotations"] = content["annotations"][:20]
    with logged("detectron2.evaluation.coco_evaluation") as messages:
        assert evaluate(register, tmp_path, content)["keypoints"]["AP"] == pytest.approx(100)
    assert not any("with keypoints in" in m for m in messages)


@pytest.mark.parametrize("keypoints", [(), ("a", "b", "c")])
def test_an_empty_list_of_annotations(register, tmp_path, keypoints):
    content = coco(keypoints=keypoints)
    assert evaluate(register, tmp_path, {**content, "annotations": []}, content) == {}


def test_a_dataset_that_nobody_has_read(register, tmp_path):
    """As with a loader of one's own; classes are not the numbers of categories."""
    content = coco()
    for category in content["categories"]:
        category["id"] += 16
    for entry in content["annotations"]:
        entry["category_id"] += 16
    name = register(content)
    evaluator = build_evaluator(name, str(tmp_path / "out"))
    evaluator.reset()
    for pair in outputs(content):
        evaluator.process(*pair)
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    DatasetCatalog.get(name)  # agrees


@pytest.mark.parametrize(
    "base", ["COCO-Detection/faster_rcnn_R_50_FPN_1x", "COCO-Detection/retinanet_R_50_FPN_1x"]
)
def test_how_many_detections_a_model_returns(base):
    assert detections_per_image(small_model(f"{base}.yaml", "BN")) == 5
    assert detections_per_image(torch.nn.Linear(1, 1)) == 100


def test_detections_of_classes_that_there_are_not(register, tmp_path):
    """Of a model with more classes than the data."""
    content = coco()
    name = register(content)
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {1: 0, 2: 1}
    evaluator = build_evaluator(name, str(tmp_path / "out"))
    evaluator.reset()
    for inputs, (output,) in outputs(content):
        found = output["instances"]
        more = found[:1]
        more.pred_classes = torch.tensor([2])
        evaluator.process(inputs, [{"instances": found.cat([found, more])}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_a_file_that_is_not_in_cocos_format(register, tmp_path):
    content = coco()
    del content["annotations"][1]["category_id"]
    name = register(content)
    with pytest.raises(ValueError, match=r"annotations\[1\] \(id 2\): category_id is missing"):
        build_evaluator(name, str(tmp_path))


def test_unknown_type(dataset, tmp_path):
    del MetadataCatalog.get(dataset).evaluator_type
    MetadataCatalog.get(dataset).evaluator_type = "mine"
    with pytest.raises(ValueError, match="'mine'; its metadata must name one of coco"):
        build_evaluator(dataset, str(tmp_path))
