import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from PIL import Image

from wsbcn_d2.engine import build_evaluator
from wsbcn_d2.engine.evaluation import _EVALUATORS


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
    "coco": COCOEvaluator,
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
        assert parts == [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator]


def test_unknown_type(dataset, tmp_path):
    del MetadataCatalog.get(dataset).evaluator_type
    MetadataCatalog.get(dataset).evaluator_type = "mine"
    with pytest.raises(ValueError, match="'mine'; its metadata must name one of coco"):
        build_evaluator(dataset, str(tmp_path))
