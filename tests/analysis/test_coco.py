"""AP against pycocotools, and AP of resampled images against pycocotools on datasets that really
have the copies."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
from analysis.random_coco import duplicated, random_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from wsbcn_d2.analysis import CocoEvaluation, coco, resample_images


def load(content):
    ground_truth = COCO()
    ground_truth.dataset = content
    ground_truth.createIndex()
    return ground_truth


def judged(content, predictions, iou_type):
    """What Detectron2 reports: pycocotools' summary in percent, and AP of each class."""
    ground_truth = load(content)
    predictions = copy.deepcopy(predictions)
    if iou_type == "segm":
        for prediction in predictions:
            del prediction["bbox"]
    judge = COCOeval(ground_truth, ground_truth.loadRes(predictions), iou_type)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    result = {n: v * 100 if v >= 0 else np.nan for n, v in zip(names, judge.stats)}
    for k, category in enumerate(content["categories"]):
        precision = judge.eval["precision"][:, :, k, 0, -1]
        precision = precision[precision > -1]
        result[f"AP-{category['name']}"] = np.mean(precision) * 100 if precision.size else np.nan
    return result


def assert_identical(measured, expected):
    """To the last digit; NaN is NaN."""
    assert set(measured) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(measured[name], value, err_msg=name)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_is_exactly_pycocotools(iou_type, seed):
    content, predictions = random_coco(seed=seed)
    evaluation = CocoEvaluation(load(content), predictions, iou_type)
    measured = {name: value[0] for name, value in evaluation.evaluate().items()}
    expected = judged(content, predictions, iou_type)
    assert 0 < expected["AP"] < 100 and np.isnan(expected["AP-nine"])
    assert_identical(measured, expected)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_a_draw_is_exactly_pycocotools_on_copied_images(iou_type):
    content, predictions = random_coco(seed=3)
    draws = resample_images(12, 5, seed=1)
    draws[-1] = 0
    draws[-1, 2] = 12  # one image only
    evaluation = CocoEvaluation(load(content), predictions, iou_type)
    measured = evaluation.evaluate(draws)
    assert any(cell.tied is not None for cells in evaluation._cells for cell in cells)
    for i, draw in enumerate(draws):
        expected = judged(*duplicated(content, predictions, draw), iou_type)
        assert_identical({name: values[i] for name, values in measured.items()}, expected)


def test_draws_do_not_depend_on_how_many_are_evaluated_at_a_time(monkeypatch):
    content, predictions = random_coco()
    evaluation = CocoEvaluation(load(content), predictions, "bbox")
    draws = resample_images(12, 7)
    together = evaluation.evaluate(draws)
    monkeypatch.setattr(coco, "_MAX_ELEMENTS", 1)
    assert len(list(evaluation._chunks(draws))) == 7
    assert_identical(evaluation.evaluate(draws), together)


def test_size_of_a_detection_is_that_of_its_mask():
    """As in Detectron2: the box of what is found where nothing is has 1,600 pixels and is medium,
    its mask is small."""
    content, _ = random_coco(num_images=1)
    there, elsewhere = (stripes(10), stripes(100))
    annotation = dict(id=1, image_id=10, category_id=1, bbox=[10, 10, 40, 40], area=400, iscrowd=0)
    content["annotations"] = [{**annotation, "segmentation": there}]
    detection = dict(image_id=10, category_id=1)
    found = [
        {**detection, "bbox": [10, 10, 40, 40], "score": 0.5, "segmentation": there},
        {**detection, "bbox": [100, 10, 40, 40], "score": 0.9, "segmentation": elsewhere},
    ]
    measured = CocoEvaluation(load(content), found, "segm").evaluate()
    assert measured["APs"] == pytest.approx(50) and np.isnan(measured["APm"])
    assert_identical({k: v[0] for k, v in measured.items()}, judged(content, found, "segm"))


def stripes(left):
    mask = np.zeros((160, 160), np.uint8)
    mask[10:50, left : left + 40 : 4] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_no_predictions_are_an_ap_of_zero():
    content, _ = random_coco()
    measured = CocoEvaluation(load(content), [], "segm").evaluate(resample_images(12, 3))
    assert (measured["AP"] == 0).all() and np.isnan(measured["AP-nine"]).all()


def test_predictions_of_another_dataset():
    content, predictions = random_coco()
    with pytest.raises(ValueError, match="image_id 7, which is not in the dataset"):
        CocoEvaluation(load(content), [*predictions, {**predictions[0], "image_id": 7}], "bbox")


def test_what_cannot_be_evaluated():
    content, predictions = random_coco()
    for mask in (
        [[0, 0, 9, 0, 9, 9]],
        None,
        {**predictions[0]["segmentation"], "size": [80, 320]},  # as many pixels
        {**predictions[0]["segmentation"], "counts": "garbage!!"},
        {**predictions[0]["segmentation"], "counts": ""},
    ):
        wrong = [*predictions, {**predictions[0], "segmentation": mask}]
        message = (
            rf"prediction {len(predictions)}: the mask must be run-length encoded, .* \[160, 160\]"
        )
        with pytest.raises(ValueError, match=message):
            CocoEvaluation(load(content), wrong, "segm")
        CocoEvaluation(load(content), wrong, "bbox")
    with pytest.raises(ValueError, match="the annotations have no categories"):
        CocoEvaluation(load({**content, "categories": []}), [], "bbox")


def test_predictions_are_left_alone():
    content, predictions = random_coco()
    before = copy.deepcopy(predictions)
    CocoEvaluation(load(content), predictions, "segm")
    assert predictions == before


def test_draws():
    draws = resample_images(50, 400, seed=3)
    assert draws.shape == (400, 50) and (draws.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(draws, resample_images(50, 400, seed=3))
    assert (draws != resample_images(50, 400, seed=4)).any()
    # each image is drawn 50 times with probability 1/50: mean 1, variance 49/50
    assert draws.mean() == 1 and abs(draws.var() - 0.98) < 0.05
