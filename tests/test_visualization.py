"""Pictures of predictions beside the ground truth."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from wsbcn_d2 import visualization
from wsbcn_d2.visualization import (
    _from_annotation,
    _Object,
    draw_comparison,
    draw_predictions,
    image_quality,
    load_predictions,
)

REPO = Path(__file__).resolve().parents[1]
TOOL = REPO / "tools" / "visualize.py"
NAME = "test_visualization"
PANEL, GAP, TITLE = (
    visualization._PANEL_SIDE,
    visualization._GAP,
    visualization._TITLE_HEIGHT,
)
GRAY = 90


def coco_content(num_images):
    """Gray images of 60 x 40 pixels, each with one object: a square with a hole as polygons or
    run lengths, of categories with the ids 3 and 7."""
    square = np.zeros((40, 60), np.uint8)
    square[10:30, 20:40] = 1
    flat = np.concatenate([[0], np.ravel(square, order="F"), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    run_lengths = np.diff(np.concatenate([[0], edges, [square.size]])).tolist()
    polygon = [[20, 10, 40, 10, 40, 30, 20, 30]]
    segmentations = [polygon, {"size": [40, 60], "counts": run_lengths}]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 40, "width": 60}
            for i in range(1, num_images + 1)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": (3, 7)[i % 2],
                "bbox": [20, 10, 20, 20],
                "area": 400,
                "iscrowd": 0,
                "segmentation": segmentations[i % 2],
            }
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": 3, "name": "apple"}, {"id": 7, "name": "banana"}],
    }


@pytest.fixture
def content(tmp_path, monkeypatch):
    """A registered dataset of 5 images, as the content of its COCO file."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    content = coco_content(num_images=5)
    for image in content["images"]:
        cv2.imwrite(str(tmp_path / image["file_name"]), np.full((40, 60, 3), GRAY, np.uint8))
    (tmp_path / "instances.json").write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(tmp_path / "instances.json"), str(tmp_path))
    return content


def truth_as_predictions(content, score=0.9):
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{k: a[k] for k in keys}, "score": score} for a in content["annotations"]]


def panels(path):
    """The panels of a picture without their titles, by row and column, None where it is blank."""
    picture = cv2.imread(path)
    height = round(PANEL * 40 / 60)
    result = []
    for top in range(GAP, picture.shape[0] - 1, TITLE + height + GAP):
        row = []
        for left in range(GAP, picture.shape[1] - 1, PANEL + GAP):
            panel = picture[top + TITLE : top + TITLE + height, left : left + PANEL]
            row.append(None if (panel == 255).all() else panel)
        result.append(row)
    return result


def labels(monkeypatch):
    """Records every text that is drawn on an image."""
    drawn = []
    draw_text = Visualizer.draw_text

    def record(self, text, *args, **kwargs):
        drawn.append(text)
        return draw_text(self, text, *args, **kwargs)

    monkeypatch.setattr(Visualizer, "draw_text", record)
    return drawn


def test_ground_truth_left_and_predictions_right(content, tmp_path, monkeypatch):
    drawn = labels(monkeypatch)
    predictions = truth_as_predictions(content)[:1]
    path = draw_predictions(NAME, predictions, str(tmp_path / "new" / "a.png"), num_images=3)
    assert path == str(tmp_path / "new" / "a.png")
    assert os.listdir(tmp_path / "new") == ["a.png"]
    assert drawn == ["banana", "banana 90%", "apple", "banana"]

    (first, first_predicted, second, second_predicted), (third, third_predicted, *rest) = panels(
        path
    )
    assert rest == [None, None]
    for panel in (first, second, third, first_predicted):
        assert (panel[:, -20:] == GRAY).all(), "nothing but the object may be drawn on"
        assert (panel[160, 240] != GRAY).any(), "the middle of the object is covered"
    # A class has one colour wherever it is drawn; objects 1 and 3 are of the same one.
    np.testing.assert_array_equal(first[160, 240], third[160, 240])
    np.testing.assert_array_equal(first[160, 240], first_predicted[160, 240])
    assert (first[160, 240] != second[160, 240]).any()
    for panel in (second_predicted, third_predicted):
        assert (panel == GRAY).all(), "nothing was predicted"


ORIENTATION = 274  # the EXIF tag; 6: to be turned clockwise by a quarter when it is shown


@pytest.mark.parametrize(
    "stored, orientation, annotated",
    [
        ((40, 60), None, (40, 60)),
        ((40, 60), 6, (60, 40)),  # annotated as it is shown, and as models see it
        ((40, 60), 6, (40, 60)),  # annotated by a tool that knows no EXIF
        ((80, 120), None, (40, 60)),  # another copy of the photograph
        ((20, 30), None, (40, 60)),
        ((80, 120), 6, (60, 40)),
    ],
)
def test_boxes_are_where_the_objects_are(
    register, tmp_path, monkeypatch, stored, orientation, annotated
):
    """The object is white, and all else black."""
    seen = []
    init = Visualizer.__init__

    def record(self, image, *args, **kwargs):
        seen.append(np.array(image))
        init(self, image, *args, **kwargs)

    monkeypatch.setattr(Visualizer, "__init__", record)
    shown = np.zeros(annotated, np.uint8)
    x, y, w, h = 4, 8, 12, 16
    shown[y : y + h, x : x + w] = 255
    # as Pillow turns it back, if it is annotated as it is shown
    picture = Image.fromarray(shown)
    if annotated != stored and orientation:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    picture = picture.resize(stored[::-1], Image.Resampling.NEAREST)
    content = coco_content(1)
    content["images"][0].update(height=annotated[0], width=annotated[1])
    content["annotations"][0].update(bbox=[x, y, w, h])
    del content["annotations"][0]["segmentation"]
    name = register(content)
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    picture.save(tmp_path / name / "1.png", exif=exif)
    draw_predictions(name, [], str(tmp_path / "a.png"))
    draw_comparison(name, [[], []], ["A", "B"], str(tmp_path / "b.png"))
    assert len(seen) == 5
    for image in seen:
        np.testing.assert_array_equal(image, np.repeat(shown[..., None], 3, 2))


def test_image_of_another_shape_than_its_annotations(register, tmp_path):
    content = coco_content(1)
    name = register(content)
    Image.new("RGB", (60, 50)).save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match="1.png' has 60 x 50 pixels, .* are of 60 x 40; they must"):
        draw_predictions(name, [], str(tmp_path / "a.png"))


@pytest.mark.parametrize("label", ["US$ or CA$", r"$\frac{$", "5 $"])
def test_dollars_in_names_of_classes(register, tmp_path, monkeypatch, label):
    texts = []
    draw_text = Visualizer.draw_text

    def record(self, *args, **kwargs):
        output = draw_text(self, *args, **kwargs)
        texts.append(output.ax.texts[-1])
        return output

    monkeypatch.setattr(Visualizer, "draw_text", record)
    content = coco_content(1)
    content["categories"][1]["name"] = label
    draw_predictions(register(content), [], str(tmp_path / "a.png"))
    assert [(text.get_text(), text.get_parse_math()) for text in texts] == [(label, False)]


def test_colors_are_kept_and_holes_stay_open(content, tmp_path):
    hole = np.zeros((40, 60), np.uint8)
    hole[10:30, 20:40] = 1
    hole[15:25, 25:35] = 0
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 2] = 200  # OpenCV's order is BGR
    cv2.imwrite(str(tmp_path / "1.png"), red)
    run_lengths = mask_util.encode(np.asfortranarray(hole))
    run_lengths["counts"] = run_lengths["counts"].decode()
    prediction = {**truth_as_predictions(content)[0], "segmentation": run_lengths}
    path = draw_predictions(NAME, [prediction], str(tmp_path / "a.png"), num_images=1)
    [[_, panel]] = panels(path)
    np.testing.assert_array_equal(panel[-1, 0], [0, 0, 200])
    np.testing.assert_array_equal(panel[20 * 8, 30 * 8], [0, 0, 200])
    assert (panel[12 * 8, 30 * 8] != [0, 0, 200]).any()


def test_score_threshold_is_inclusive(content, tmp_path, monkeypatch):
    drawn = labels(monkeypatch)
    predictions = [
        *truth_as_predictions(content, 0.5)[:1],
        *truth_as_predictions(content, 0.49)[:1],
    ]
    draw_predictions(NAME, predictions, str(tmp_path / "a.png"), num_images=1)
    assert drawn == ["banana", "banana 50%"]


def test_boxes_alone_are_drawn(content, tmp_path, monkeypatch):
    drawn = labels(monkeypatch)
    predictions = truth_as_predictions(content)
    for prediction in predictions:
        del prediction["segmentation"]
    path = draw_predictions(NAME, predictions, str(tmp_path / "a.png"), num_images=1)
    [[_, panel]] = panels(path)
    assert drawn == ["banana", "banana 90%"]
    assert (panel[160, 240] == GRAY).all()
    assert (panel[160, 160] != GRAY).any()


def test_is_deterministic_and_takes_the_smallest_ids(content, tmp_path, monkeypatch):
    predictions = truth_as_predictions(content)
    first = draw_predictions(NAME, predictions, str(tmp_path / "a.png"), num_images=2)
    records = DatasetCatalog.get(NAME)[::-1]
    DatasetCatalog.data[NAME] = lambda: records
    second = draw_predictions(NAME, predictions[::-1], str(tmp_path / "b.png"), num_images=2)
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_more_images_than_there_are_and_no_predictions(content, tmp_path):
    rows = panels(draw_predictions(NAME, [], str(tmp_path / "a.png"), num_images=100))
    assert [panel is not None for row in rows for panel in row] == [True] * 10 + [False] * 2


def test_failure_keeps_the_older_picture(content, tmp_path, monkeypatch):
    target = tmp_path / "pictures" / "a.png"
    target.parent.mkdir()
    target.write_text("older")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(visualization.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        draw_predictions(NAME, [], str(target))
    assert os.listdir(target.parent) == ["a.png"]
    assert target.read_text() == "older"


BAD_PREDICTIONS = [
    ({"images": []}, "must be a list in COCO's result format, not dict"),
    (["x"], "prediction 0 is not in COCO's result format"),
    ([{"image_id": 1, "category_id": 3, "score": 1.0}], "prediction 0 is not in COCO's"),
    ([dict(image_id=1, category_id=3, bbox=[1, 2, 3], score=1)], "finite score, bbox of x, y, w"),
    ([dict(image_id=1, category_id=3, bbox=[1, 2, 3, 4], score="1")], "score"),
    ([dict(image_id=1, category_id=[3], bbox=[1, 2, 3, 4], score=1)], "not in COCO's result"),
    (
        [
            dict(
                **dict(image_id=1, category_id=3, bbox=[1, 2, 3, 4], score=1),
                segmentation={"size": [9, 9], "counts": "garbage!!"},
            )
        ],
        "prediction 0: the counts of its mask are not those of its size",
    ),
    ([dict(image_id=1, category_id=0, bbox=[1, 2, 3, 4], score=1)], "category_id 0; .* has 3, 7"),
    (
        [dict(image_id=99, category_id=3, bbox=[1, 2, 3, 4], score=1)],
        "none of the 1 .* image_id 99",
    ),
]


@pytest.mark.parametrize("predictions, message", BAD_PREDICTIONS)
def test_malformed_predictions(content, tmp_path, predictions, message):
    with pytest.raises(ValueError, match=message):
        draw_predictions(NAME, predictions, str(tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (dict(num_images=0), ("num_images is 0", "at least 1")),
        (dict(score_threshold=1.5), ("score_threshold is 1.5", "from 0 to 1")),
        (dict(output_path="a.jpg"), ("output_path is 'a.jpg'", ".png")),
        (dict(dataset_name="test_visualisation"), ("'test_visualisation'", NAME)),
        (dict(dataset_name="no_things"), ("no_things", "thing_classes")),
    ],
)
def test_bad_arguments(content, tmp_path, arguments, parts):
    DatasetCatalog.register("no_things", list)
    good = dict(dataset_name=NAME, predictions=[], output_path=str(tmp_path / "a.png"))
    with pytest.raises(ValueError) as error:
        draw_predictions(**{**good, **arguments})
    for part in parts:
        assert part in str(error.value)


def test_load_predictions(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('[{"score": 1.0}]')
    assert load_predictions(str(path)) == [{"score": 1.0}]
    path.write_text("[")
    with pytest.raises(ValueError, match="results.json is not a JSON file"):
        load_predictions(str(path))


def test_command(tmp_path):
    """With a dataset that the config of the run says where to find."""
    content = coco_content(num_images=2)
    for folder in ("annotations", "val"):
        (tmp_path / "digits" / folder).mkdir(parents=True)
    for image in content["images"]:
        image_path = tmp_path / "digits" / "val" / image["file_name"]
        cv2.imwrite(str(image_path), np.full((40, 60, 3), GRAY, np.uint8))
    annotations = tmp_path / "digits" / "annotations" / "instances_val.json"
    annotations.write_text(json.dumps(content))
    predictions = tmp_path / "run" / "inference" / "coco_instances_results.json"
    predictions.parent.mkdir(parents=True)
    predictions.write_text(json.dumps(truth_as_predictions(content)))
    files = ("annotations/instances_val.json", "val")
    places = [f"$DETECTRON2_DATASETS/digits/{path}" for path in files]
    cfg = CfgNode({"MODEL": {}, "DATASETS": {"COCO_FORMAT": [["digits_val", *places]]}})
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    output = str(tmp_path / "picture.png")
    command = [sys.executable, str(TOOL), "--dataset", "digits_val", "--output", output]
    result = subprocess.run(
        command + ["--predictions", str(predictions), "--num-images", "2"],
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == output
    assert [panel is not None for row in panels(output) for panel in row] == [True] * 4


def box(x, y, side, category=0, score=None, crowd=False):
    return _Object((x, y, x + side, y + side), category, None, score, crowd)


SHIFTED = 8 * 10 / (2 * 100 - 8 * 10)  # IoU of two squares of side 10, one of them 2 to the right


@pytest.mark.parametrize(
    "truth, predicted, expected",
    [
        ([], [], 1.0),
        ([box(0, 0, 10)], [], 0.0),
        ([], [box(0, 0, 10, score=0.9)], 0.0),
        ([box(0, 0, 10)], [box(0, 0, 10, score=0.9)], 1.0),
        ([box(0, 0, 10)], [box(2, 0, 10, score=0.9)], SHIFTED),
        ([box(0, 0, 10)], [box(5, 0, 10, score=0.9)], 0.0),  # IoU 1/3
        ([box(0, 0, 10)], [box(0, 0, 10, category=1, score=0.9)], 0.0),
        # found, missed and invented
        ([box(0, 0, 10), box(50, 0, 10)], [box(2, 0, 10, score=0.9)], SHIFTED / 1.5),
        ([box(0, 0, 10)], [box(2, 0, 10, score=0.9), box(50, 0, 10, score=0.8)], SHIFTED / 1.5),
        # the higher score takes the object, the better box is then a duplicate
        ([box(0, 0, 10)], [box(0, 0, 10, score=0.5), box(2, 0, 10, score=0.6)], SHIFTED / 1.5),
        # of two objects the nearer, though it comes second
        (
            [box(3, 0, 10), box(0, 0, 10)],
            [box(0, 0, 10, score=0.9), box(3, 0, 10, score=0.8)],
            1.0,
        ),
        # a crowd is no object, and what is on it no error
        ([box(0, 0, 40, crowd=True)], [box(5, 5, 10, score=0.9)], 1.0),
        (
            [box(0, 0, 40, crowd=True), box(60, 0, 10)],
            [box(5, 5, 10, score=0.9), box(60, 0, 10, score=0.9), box(90, 0, 5, score=0.6)],
            1 / 1.5,
        ),
    ],
)
def test_image_quality(truth, predicted, expected):
    assert image_quality(truth, predicted, (100, 100)) == pytest.approx(expected)


def test_image_quality_of_masks(content):
    """The same box, but half of the mask."""
    truth = [_from_annotation(a) for a in DatasetCatalog.get(NAME)[0]["annotations"]]
    half = np.zeros((40, 60), np.uint8)
    half[10:30, 20:33] = 1
    found = _Object(truth[0].box, truth[0].class_index, run_lengths_of(half), 0.9)
    assert image_quality(truth, [found], (40, 60)) == pytest.approx(13 / 20)


def run_lengths_of(mask):
    run_lengths = mask_util.encode(np.asfortranarray(mask))
    return {**run_lengths, "counts": run_lengths["counts"].decode()}


def titles(monkeypatch):
    """Records what is written above the panels."""
    written = []
    add_title = visualization._add_title

    def record(panel, title):
        written.append(title)
        return add_title(panel, title)

    monkeypatch.setattr(visualization, "_add_title", record)
    return written


def test_two_models_are_sorted_by_their_difference(content, tmp_path, monkeypatch):
    """On image 4 one finds the object and the other nothing; on 2 the other finds a part of it."""
    written = titles(monkeypatch)
    all_found = truth_as_predictions(content)
    first = [dict(p) for p in all_found]
    second = [dict(p) for p in all_found if p["image_id"] != 4]
    part = np.zeros((40, 60), np.uint8)
    part[10:30, 20:35] = 1
    second[1] = {**second[1], "segmentation": run_lengths_of(part)}
    path = draw_comparison(
        NAME, [first, second], ["one", "other"], str(tmp_path / "a.png"), num_images=3
    )
    assert written == [
        *("4.png: ground truth", "one: quality 1.00, score >= 0.50"),
        "other: quality 0.00, score >= 0.50",
        *("2.png: ground truth", "one: quality 1.00, score >= 0.50"),
        "other: quality 0.75, score >= 0.50",
        *("1.png: ground truth", "one: quality 1.00, score >= 0.50"),  # no difference: first id
        "other: quality 1.00, score >= 0.50",
    ]
    rows = panels(path)
    assert [len(row) for row in rows] == [3, 3, 3]
    assert (rows[0][0] != GRAY).any() and (rows[0][1] != GRAY).any()
    assert (rows[0][2] == GRAY).all(), "nothing was found"


def test_comparison_counts_what_is_drawn(content, tmp_path, monkeypatch):
    """Predictions below the threshold make no difference."""
    written = titles(monkeypatch)
    some, none = truth_as_predictions(content, 0.3), truth_as_predictions(content, 0.3)[:1]
    draw_comparison(NAME, [some, none], ["a", "b"], str(tmp_path / "a.png"), num_images=1)
    assert written[0] == "1.png: ground truth" and "quality 0.00" in written[1]


@pytest.mark.parametrize(
    "predictions, labels, part",
    [
        ([[]], ["a"], "there are 1 lists of predictions and 1 labels"),
        ([[], [], []], ["a", "b"], "3 lists of predictions and 2 labels"),
        ([[], ["x"]], ["a", "b"], "b: prediction 0 is not in COCO's result format"),
    ],
)
def test_bad_comparison(content, tmp_path, predictions, labels, part):
    with pytest.raises(ValueError, match=part):
        draw_comparison(NAME, predictions, labels, str(tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


def test_command_with_two_models(content, tmp_path, monkeypatch, capsys):
    written = titles(monkeypatch)
    for name in ("first", "second"):
        (tmp_path / name / "inference").mkdir(parents=True)
        file = tmp_path / name / "inference" / "coco_instances_results.json"
        file.write_text(json.dumps(truth_as_predictions(content)))
    files = [str(tmp_path / n / "inference" / file.name) for n in ("first", "second")]
    output = str(tmp_path / "a.png")
    arguments = ["--dataset", NAME, "--output", output, "--num-images", "1", "--predictions"]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *arguments, files[0], f"mine={files[1]}"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit_info.value.code == 0 and capsys.readouterr().out.strip() == output
    assert written[1].startswith("first: ") and written[2].startswith("mine: ")


@pytest.mark.parametrize(
    "written, dataset, part",
    [
        (None, NAME, "results.json"),
        ("{", NAME, "not a JSON file"),
        ("{}", NAME, "must be a list"),
        ("[]", "nothing_like_it", "no dataset 'nothing_like_it'"),
        ("[]", None, "names a dataset: give --dataset"),
    ],
)
def test_error_is_one_line(content, tmp_path, monkeypatch, capsys, written, dataset, part):
    predictions = tmp_path / "results.json"
    if written is not None:
        predictions.write_text(written)
    arguments = ["--predictions", str(predictions), "--output", "a.png"]
    if dataset is not None:
        arguments += ["--dataset", dataset]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert part in captured.err
