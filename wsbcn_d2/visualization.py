"""Pictures of predictions beside the ground truth."""

import json
import math
import os
from collections import defaultdict
from numbers import Real
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, Visualizer
from matplotlib import rc_context
from PIL import Image

from .data import check_datasets
from .data.coco_format import NO_COCO_RESULT, is_coco_result, is_run_length_encoded
from .engine.checkpoint import atomic_write, check_output

# All in pixels of the picture.
_PANEL_SIDE = 480  # the longer side of an image
_GAP = 8
_TITLE_HEIGHT = 26
_LABEL_HEIGHT = 15

_POINTS_PER_PIXEL = 72 / 100  # of matplotlib's text, at its default resolution
_MASK_OPACITY = 0.5
_WHITE = 255
_MATCHING_IOU = 0.5  # of the panoptic quality


class _Object(NamedTuple):
    """What is drawn of a ground truth annotation or a prediction."""

    box: Tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image
    class_index: int  # contiguous, from 0
    segmentation: Any  # polygons or run lengths as in COCO, None if there is only a box
    score: Optional[float]  # None for ground truth
    is_crowd: bool = False


def load_predictions(path: str) -> List[Dict[str, Any]]:
    """Reads ``coco_instances_results.json``, which Detectron2's ``COCOEvaluator`` writes.

    Args:
        path: the file, in ``OUTPUT_DIR/inference`` after an evaluation.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON.
    """
    with open(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error


def draw_predictions(
    dataset_name: str,
    predictions: Sequence[Dict[str, Any]],
    output_path: str,
    num_images: int = 6,
    score_threshold: float = 0.5,
) -> str:
    """Draws predictions beside the ground truth for the first images of a dataset.

    Args:
        dataset_name: a registered dataset, e.g. "coco_2017_val".
        predictions: detections in COCO's result format, of any number of images; what
            :func:`load_predictions` returns. Without "segmentation" only boxes are drawn.
        output_path: PNG to write. Its folder is made if needed. An older file is replaced when the
            new one is complete.
        num_images: how many images to draw at most, those with the smallest ids, at least 1.
        score_threshold: the lowest score that is drawn, 0 to 1.

    Returns:
        ``output_path``.

    Raises:
        ValueError: an argument is out of range, the dataset is not registered, the predictions
            are malformed or of another dataset, or an image has another shape than its annotations.
        FileNotFoundError: files of the dataset are missing.
    """
    _check_arguments(output_path, num_images, score_threshold)
    records, metadata = _load_dataset(dataset_name)
    by_image = _objects_by_image(predictions, dataset_name, records, metadata, score_threshold)
    pairs = []
    for record in records[:num_images]:
        image = _read_image(record)
        name = os.path.basename(record["file_name"])
        left = _draw_objects(image, _annotated(record), metadata)
        right = _draw_objects(image, by_image[record["image_id"]], metadata)
        pairs.append(
            (
                _add_title(left, f"{name}: ground truth"),
                _add_title(right, f"predictions, score >= {score_threshold:.2f}"),
            )
        )
    _save_png(_arrange(pairs, per_row=2), output_path)
    return output_path


def draw_comparison(
    dataset_name: str,
    predictions: Sequence[Sequence[Dict[str, Any]]],
    labels: Sequence[str],
    output_path: str,
    num_images: int = 6,
    score_threshold: float = 0.5,
) -> str:
    """Draws the predictions of two models beside the ground truth, where they differ most.

    Images are sorted by the absolute difference of the two models' :func:`image_quality`; of equal
    ones, that with the smaller id is first.

    Args:
        dataset_name: a registered dataset.
        predictions: of the first and of the second model, each as for :func:`draw_predictions`.
        labels: what the two are called in the picture.
        output_path: PNG to write, as for :func:`draw_predictions`.
        num_images: how many images to draw at most, at least 1.
        score_threshold: the lowest score that is drawn, and that counts, 0 to 1.

    Returns:
        ``output_path``.

    Raises:
        ValueError, FileNotFoundError: as :func:`draw_predictions`; or there are not two models.
    """
    if len(predictions) != 2 or len(labels) != 2:
        raise ValueError(
            f"there are {len(predictions)} lists of predictions and {len(labels)} labels; two of "
            "each are compared"
        )
    _check_arguments(output_path, num_images, score_threshold)
    records, metadata = _load_dataset(dataset_name)
    models = []
    for label, of_model in zip(labels, predictions):
        try:
            models.append(
                _objects_by_image(of_model, dataset_name, records, metadata, score_threshold)
            )
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    compared = []
    for record in records:
        truth = _annotated(record)
        shape = (record["height"], record["width"])
        found = [by_image[record["image_id"]] for by_image in models]
        qualities = [image_quality(truth, objects, shape) for objects in found]
        compared.append((record, truth, found, qualities))
    compared.sort(key=lambda entry: -abs(entry[3][0] - entry[3][1]))  # stable
    rows = []
    for record, truth, found, qualities in compared[:num_images]:
        image = _read_image(record)
        name = os.path.basename(record["file_name"])
        panels = [_add_title(_draw_objects(image, truth, metadata), f"{name}: ground truth")]
        for label, objects, quality in zip(labels, found, qualities):
            title = f"{label}: quality {quality:.2f}, score >= {score_threshold:.2f}"
            panels.append(_add_title(_draw_objects(image, objects, metadata), title))
        rows.append(panels)
    _save_png(_arrange(rows, per_row=1), output_path)
    return output_path


def image_quality(
    truth: Sequence[_Object], predicted: Sequence[_Object], image_shape: Tuple[int, int]
) -> float:
    """How well predictions describe an image: the panoptic quality of its objects.

        sum of the IoU of matches / (matches + (unmatched truth + unmatched predictions) / 2)

    (Kirillov et al., arXiv 1801.00868, Eq. 1, over all classes together.) Predictions are matched
    in the order of their scores, each to the object of its class with the largest IoU above 0.5
    that is still free. The IoU is that of masks if all have them, or else of boxes. Crowds count
    neither as objects nor, where more than half of a prediction is on one, as errors.

    Args:
        truth, predicted: objects of one image.
        image_shape: its height and width in pixels.

    Returns:
        0 to 1; 1 if there is nothing and nothing was predicted.
    """
    truth = sorted(truth, key=lambda item: item.is_crowd)
    predicted = sorted(predicted, key=lambda item: -item.score)
    crowds = sum(item.is_crowd for item in truth)
    objects, counted, matched, total = len(truth) - crowds, 0, 0, 0.0
    free = [True] * objects
    overlaps = _overlaps(predicted, truth, image_shape)
    for row, item in enumerate(predicted):
        same = [truth[column].class_index == item.class_index for column in range(len(truth))]
        candidates = [
            column
            for column in range(objects)
            if same[column] and free[column] and overlaps[row, column] > _MATCHING_IOU
        ]
        if candidates:
            best = max(candidates, key=lambda column: overlaps[row, column])
            free[best] = False
            matched += 1
            total += float(overlaps[row, best])
        elif any(same[c] and overlaps[row, c] > _MATCHING_IOU for c in range(objects, len(truth))):
            continue
        counted += 1
    if not objects and not counted:
        return 1.0
    return total / (matched + (objects - matched) / 2 + (counted - matched) / 2)


def _overlaps(
    predicted: Sequence[_Object], truth: Sequence[_Object], image_shape: Tuple[int, int]
) -> np.ndarray:
    """(predicted, truth); on a crowd, the share of the prediction that is on it."""
    if not predicted or not truth:
        return np.zeros((len(predicted), len(truth)))
    everything = [*predicted, *truth]
    if all(item.segmentation for item in everything):
        shapes = [_run_lengths(item.segmentation, *image_shape) for item in everything]
    else:
        shapes = [BoxMode.convert(i.box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) for i in everything]
        shapes = [np.array(shape, dtype=float) for shape in shapes]
    first, second = shapes[: len(predicted)], shapes[len(predicted) :]
    if isinstance(first[0], np.ndarray):
        first, second = np.stack(first), np.stack(second)
    return np.asarray(mask_util.iou(first, second, [int(item.is_crowd) for item in truth]))


def _run_lengths(segmentation: Any, height: int, width: int) -> Dict[str, Any]:
    mask = GenericMask(segmentation, height, width).mask
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def _check_arguments(output_path: str, num_images: int, score_threshold: float) -> None:
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images is {num_images!r}; it must be an integer of at least 1")
    if not isinstance(score_threshold, Real) or not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold is {score_threshold!r}; it must be from 0 to 1")
    if not output_path.endswith(".png"):
        raise ValueError(f"output_path is {output_path!r}; it must end in .png")
    check_output(output_path)


def _load_dataset(dataset_name: str) -> Tuple[List[Dict[str, Any]], Metadata]:
    """The records of a dataset, by their ids, and its metadata."""
    check_datasets([dataset_name])
    records = sorted(DatasetCatalog.get(dataset_name), key=lambda record: record["image_id"])
    return records, MetadataCatalog.get(dataset_name)


def _read_image(record: Dict[str, Any]) -> np.ndarray:
    """Returns the image (H, W, 3), uint8 RGB, as the annotations see it: of their size.

    That is the image as it is meant to be looked at, which Detectron2's models see; or as it is
    stored, where a tool has ignored that a photograph is turned; or either of them enlarged or
    reduced.
    """
    path, size = record["file_name"], (record["height"], record["width"])
    turned = read_image(path, format="RGB")
    if turned.shape[:2] == size:
        return turned
    with Image.open(path) as file:
        stored = np.asarray(file.convert("RGB"))
    if stored.shape[:2] == size:
        return stored
    for image in (turned, stored):
        # The sides were rounded to pixels.
        if abs(image.shape[0] * size[1] - image.shape[1] * size[0]) <= max(*size, *image.shape):
            return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    raise ValueError(
        f"{path!r} has {turned.shape[1]} x {turned.shape[0]} pixels, and its annotations are of "
        f"{size[1]} x {size[0]}; they must have the same shape"
    )


def _objects_by_image(
    predictions: Sequence[Dict[str, Any]],
    dataset_name: str,
    records: Sequence[Dict[str, Any]],
    metadata: Metadata,
    score_threshold: float,
) -> Dict[Any, List[_Object]]:
    """Checks predictions and returns those of at least the threshold, by image id."""
    class_indices = _class_indices(metadata)
    image_ids = {record["image_id"] for record in records}
    _check_predictions(predictions, dataset_name, image_ids, class_indices)
    by_image: Dict[Any, List[_Object]] = defaultdict(list)
    for prediction in predictions:
        if prediction["score"] >= score_threshold:
            predicted = _from_prediction(prediction, class_indices)
            by_image[prediction["image_id"]].append(predicted)
    return by_image


def _annotated(record: Dict[str, Any]) -> List[_Object]:
    return [_from_annotation(annotation) for annotation in record.get("annotations", [])]


def _class_indices(metadata: Metadata) -> Dict[int, int]:
    """Returns the contiguous class index of every category id in files of results."""
    names = metadata.get("thing_classes")
    if not names:
        raise ValueError(
            f"{metadata.name!r} is not a dataset of instances: it has no thing_classes"
        )
    # Without a mapping, Detectron2 writes its contiguous indices as category ids.
    identity = {index: index for index in range(len(names))}
    return metadata.get("thing_dataset_id_to_contiguous_id", identity)


def _check_predictions(
    predictions: Sequence[Dict[str, Any]],
    dataset_name: str,
    image_ids: Set[Any],
    class_indices: Dict[int, int],
) -> None:
    if not isinstance(predictions, (list, tuple)):
        raise ValueError(
            f"predictions must be a list in COCO's result format, not {type(predictions).__name__}"
        )
    for index, prediction in enumerate(predictions):
        if not is_coco_result(prediction):
            raise ValueError(f"prediction {index} {NO_COCO_RESULT}: {repr(prediction)[:200]}")
        mask = prediction.get("segmentation")
        if isinstance(mask, dict) and not is_run_length_encoded(mask):
            raise ValueError(
                f"prediction {index}: the counts of its mask are not those of its size: "
                f"{repr(mask)[:200]}"
            )
        if prediction["category_id"] not in class_indices:
            raise ValueError(
                f"prediction {index} has category_id {prediction['category_id']!r}; "
                f"{dataset_name!r} has {', '.join(map(str, class_indices))}"
            )
    if predictions and not any(prediction["image_id"] in image_ids for prediction in predictions):
        raise ValueError(
            f"none of the {len(predictions)} predictions is of an image of {dataset_name!r}; "
            f"the first is of image_id {predictions[0]['image_id']!r}"
        )


def _from_annotation(annotation: Dict[str, Any]) -> _Object:
    """Converts an annotation of Detectron2's dataset format."""
    return _Object(
        box=BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS),
        class_index=annotation["category_id"],
        segmentation=annotation.get("segmentation"),
        score=None,
        is_crowd=bool(annotation.get("iscrowd", 0)),
    )


def _from_prediction(prediction: Dict[str, Any], class_indices: Dict[int, int]) -> _Object:
    """Converts an entry of COCO's result format."""
    return _Object(
        box=BoxMode.convert(prediction["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
        class_index=class_indices[prediction["category_id"]],
        segmentation=prediction.get("segmentation"),
        score=prediction["score"],
    )


@rc_context({"text.parse_math": False})  # a "$" in the name of a class is a sign like others
def _draw_objects(image: np.ndarray, objects: Sequence[_Object], metadata: Metadata) -> np.ndarray:
    """Returns the image (H, W, 3), uint8 RGB, enlarged or reduced to a panel, with objects on it.

    A class has the same colour in every panel.
    """
    height, width = image.shape[:2]
    scale = _PANEL_SIDE / max(height, width)
    visualizer = Visualizer(image, metadata, scale=scale)
    colors = colormap(rgb=True, maximum=1)
    label_height = _LABEL_HEIGHT / scale
    # Small objects last, so that large ones do not cover them.
    for item in sorted(objects, key=_box_area, reverse=True):
        x0, y0, _, _ = item.box
        color = colors[item.class_index % len(colors)]
        if item.segmentation:
            mask = GenericMask(item.segmentation, height, width).mask
            visualizer.draw_binary_mask(
                mask.astype(np.uint8), color, alpha=_MASK_OPACITY, area_threshold=0
            )
        visualizer.draw_box(item.box, alpha=1.0, edge_color=color)
        label = metadata.thing_classes[item.class_index]
        if item.score is not None:
            label += f" {item.score:.0%}"
        # Above the box, but inside the image; a character is about 0.6 times as wide as high.
        label_width = 0.6 * len(label) * label_height
        visualizer.draw_text(
            label,
            (max(0.0, min(x0, width - label_width)), max(0.0, y0 - 1.2 * label_height)),
            font_size=label_height * _POINTS_PER_PIXEL,
            color="white",
            horizontal_alignment="left",
        )
    return visualizer.get_output().get_image()


def _box_area(item: _Object) -> float:
    x0, y0, x1, y1 = item.box
    return (x1 - x0) * (y1 - y0)


def _add_title(panel: np.ndarray, title: str) -> np.ndarray:
    """Returns the panel (H, W, 3) with a line of text above it."""
    strip = np.full((_TITLE_HEIGHT, panel.shape[1], 3), _WHITE, np.uint8)
    cv2.putText(
        strip,
        title,
        (2, _TITLE_HEIGHT - 8),
        cv2.FONT_HERSHEY_SIMPLEX,
        0.5,
        (0, 0, 0),
        1,
        cv2.LINE_AA,
    )
    return np.vstack([strip, panel])


def _arrange(groups: Sequence[Sequence[np.ndarray]], per_row: int) -> np.ndarray:
    """Returns all panels, each (H, W, 3), in one picture, ``per_row`` groups beside each other."""
    columns = len(groups[0]) * min(per_row, len(groups))
    panels = [panel for group in groups for panel in group]
    cell_height = max(panel.shape[0] for panel in panels) + _GAP
    cell_width = max(panel.shape[1] for panel in panels) + _GAP
    num_rows = math.ceil(len(panels) / columns)
    shape = (num_rows * cell_height + _GAP, columns * cell_width + _GAP, 3)
    picture = np.full(shape, _WHITE, np.uint8)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        top, left = row * cell_height + _GAP, column * cell_width + _GAP
        picture[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    return picture


def _save_png(picture: np.ndarray, path: str) -> None:
    """Writes a picture (H, W, 3), uint8 RGB, so that there is never a half-written file at path."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    with atomic_write(path) as file:
        file.write(encoded.tobytes())
