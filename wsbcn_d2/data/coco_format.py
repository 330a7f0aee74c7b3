"""Files in COCO's format: what is wrong in them is said in one line, before they are used.

Detectron2 and pycocotools take it that a file is as COCO's are. What is not fails far from its
cause, after the training even, or gives other numbers without a word: an annotation with the id 0
is an object that pycocotools never finds.
"""

import contextlib
import functools
import io
import json
import logging
import math
import os
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple

import pycocotools.mask as mask_util
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

logger = logging.getLogger("detectron2.wsbcn_d2.data")

NO_COCO_RESULT = (
    "is not in COCO's result format (image_id, category_id, finite score, bbox of x, y, width and "
    "height)"
)

_NUMBERS = frozenset((int, float))
# Detectron2 allows files with this in their names to have ids twice, as COCO's minival of 2014 has.
_DUPLICATES_ALLOWED = "minival"
# By how much of an image's side a box may reach out of it without a word.
_SLACK = 0.02


@dataclass
class CocoFile:
    """What a run has to know of a file, without its content.

    Those that name annotations are None where there are no such.

    Attributes:
        path: of the file.
        classes: names of the categories in the order of their ids, which is that of the classes
            of a model.
        has_annotations: False for test images whose annotations are not public.
        num_objects: number of objects to train with: in an image, no crowds, and not with polygons
            of less than three points alone, without which Detectron2 trains.
        most_keypoints: the largest number of labelled keypoints in an image.
        without_mask: the first object that has none, which training needs.
        without_usable_mask: the first object or crowd whose mask cannot be evaluated: none, or no
            polygon of three points.
        run_length_encoded: the first object whose mask is no polygon.
        num_keypoints: of the first annotation that has any; 0 if none has.
        without_keypoints: the first object that has none.
        other_keypoints: the first annotation with another number of them.
        keypoint_names: of the first category that has any.
        odd_ids: the first annotation whose id is no positive integer.
        images: file name, height and width of each.
    """

    path: str
    classes: Tuple[str, ...] = ()
    has_annotations: bool = False
    num_objects: int = 0
    most_keypoints: int = 0
    without_mask: Optional[str] = None
    without_usable_mask: Optional[str] = None
    run_length_encoded: Optional[str] = None
    num_keypoints: int = 0
    without_keypoints: Optional[str] = None
    other_keypoints: Optional[str] = None
    keypoint_names: Tuple[str, ...] = ()
    odd_ids: Optional[str] = None
    images: Tuple[Tuple[str, int, int], ...] = field(default=(), repr=False)


def coco_file(path: str) -> CocoFile:
    """Reads and checks a file. One that has been read before is not read again unless it changed.

    Args:
        path: a local file, or an address that Detectron2 knows.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not in COCO's format.
    """
    local = PathManager.get_local_path(path)
    status = os.stat(local)
    return _read_and_check(local, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _read_and_check(path: str, modified: int, size: int) -> CocoFile:
    return check_content(_load(path), path)


def load_coco(path: str) -> COCO:
    """Reads and checks a file, for evaluation; see :func:`complete`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not in COCO's format.
    """
    coco = COCO()
    coco.dataset = _load(path)
    complete(coco, check_content(coco.dataset, path))
    return coco


def complete(coco: COCO, file: CocoFile) -> None:
    """Adds what annotations may lack and evaluation needs, in place, and builds the index.

    - ``iscrowd`` is 0, and ``area`` that of the mask, or of the box if there is none;
    - keypoints, where others have them, are not labelled, and ``num_keypoints`` counts those that
      are;
    - ids are numbers from 1, if there are others than positive integers.

    Args:
        coco: whose ``dataset`` is the content of the file.
        file: what :func:`coco_file` has found in it.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco.dataset["images"]}
    for number, annotation in enumerate(coco.dataset.get("annotations", ()), 1):
        annotation.setdefault("iscrowd", 0)
        if annotation.get("area") is None:
            annotation["area"] = _area(annotation, sizes.get(annotation["image_id"]))
        if file.odd_ids:
            annotation["id"] = number
        if file.num_keypoints:
            points = annotation["keypoints"] = (
                annotation.get("keypoints") or [0] * 3 * file.num_keypoints
            )
            annotation.setdefault("num_keypoints", sum(v > 0 for v in points[2::3]))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by print
        coco.createIndex()


def _area(annotation: Dict[str, Any], size: Optional[Tuple[int, int]]) -> float:
    segmentation = annotation.get("segmentation")
    if size is None or not _has_mask(segmentation):
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(_usable(segmentation), *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *size)
    return float(mask_util.area(segmentation))


def _load(path: str) -> Any:
    with open(path) as file:
        try:
            return json.load(file)
        except ValueError as error:  # also of text that is no Unicode
            raise ValueError(f"{path!r} is not a JSON file: {error}") from error


def check_content(content: Any, path: str) -> CocoFile:
    """Checks the content of a file in one pass, and says what cannot be evaluated as it is.

    Raises:
        ValueError: naming the file, the key, what was found and what is allowed.
    """
    if not isinstance(content, dict):
        raise ValueError(
            f"{path!r} is not in COCO's format: it is a {type(content).__name__}, and must be an "
            "object with the lists images, categories and annotations"
        )
    for key in ("images", "categories", "annotations"):
        if key == "annotations" and key not in content:
            continue  # of test images
        if not isinstance(content.get(key), list):
            found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
            keys = ", ".join(map(repr, list(content)[:5])) or "none"
            raise ValueError(
                f"{path!r} is not in COCO's format: the list {key!r} {found}; its keys are {keys}"
            )
    file = CocoFile(path)
    sizes = _check_images(content["images"], path)
    file.images = tuple((i["file_name"], i["height"], i["width"]) for i in content["images"])
    category_ids = _check_categories(content["categories"], file)
    if "annotations" in content:
        file.has_annotations = True
        _check_annotations(content["annotations"], sizes, category_ids, file)
    if file.odd_ids:
        logger.warning(
            f"{path}: the ids of annotations must be positive integers, but {file.odd_ids}. "
            "pycocotools takes an object with the id 0 for one that no detection has found; so "
            "the annotations are numbered anew where they are evaluated"
        )
    return file


def _wrong(path: str, place: str, key: str, entry: Dict[str, Any], allowed: str) -> NoReturn:
    found = f"{key} is {repr(entry[key])[:120]}" if key in entry else f"{key} is missing"
    raise ValueError(f"{path!r}: {place}: {found}; it must be {allowed}")


def _check_objects(entries: Sequence[Any], kind: str, path: str) -> None:
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{path!r}: {kind}[{index}] is {repr(entry)[:120]}; it must be an object"
            )


def _check_unique(ids: List[Any], kind: str, path: str) -> None:
    if len(set(ids)) < len(ids):
        seen = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise ValueError(f"{path!r}: the id {twice!r} occurs twice in {kind}; ids must be unique")


def _check_images(images: List[Any], path: str) -> Dict[Any, Tuple[int, int]]:
    """Returns height and width by image id."""
    if not images:
        raise ValueError(f"{path!r} has no images")
    _check_objects(images, "images", path)
    kind = type(images[0].get("id"))
    for index, image in enumerate(images):
        place = f"images[{index}]"
        if type(image.get("id")) is not kind or kind not in (int, str):
            _wrong(path, place, "id", image, "an integer, or a text in all images")
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            _wrong(path, place, "file_name", image, "a text")
        for key in ("height", "width"):
            if type(image.get(key)) is not int or image[key] < 1:
                _wrong(path, place, key, image, "a positive integer")
    _check_unique([image["id"] for image in images], "images", path)
    return {image["id"]: (image["height"], image["width"]) for image in images}


def _check_categories(categories: List[Any], file: CocoFile) -> Dict[int, str]:
    """Returns names by id."""
    path = file.path
    if not categories:
        raise ValueError(f"{path!r}: the list 'categories' is empty; it must name the classes")
    _check_objects(categories, "categories", path)
    for index, category in enumerate(categories):
        place = f"categories[{index}]"
        if type(category.get("id")) is not int:
            _wrong(path, place, "id", category, "an integer")
        if not isinstance(category.get("name"), str) or not category["name"]:
            _wrong(path, place, "name", category, "a text")
        names = category.get("keypoints") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            _wrong(path, place, "keypoints", category, "a list of names")
        file.keypoint_names = file.keypoint_names or tuple(names)
    _check_unique([category["id"] for category in categories], "categories", path)
    by_id = dict(sorted((category["id"], category["name"]) for category in categories))
    file.classes = tuple(by_id.values())
    if len(set(file.classes)) < len(categories):
        twice = next(name for name in file.classes if file.classes.count(name) > 1)
        logger.warning(f"{path}: two categories are called {twice!r}; only one AP-{twice} is shown")
    return by_id


def _check_annotations(
    annotations: List[Any],
    sizes: Dict[Any, Tuple[int, int]],
    category_ids: Dict[int, str],
    file: CocoFile,
) -> None:
    path = file.path
    _check_objects(annotations, "annotations", path)
    num_placed = num_outside = 0
    outside, largest = "", 0.0
    labelled: Dict[Any, int] = {}  # keypoints, by image
    for index, annotation in enumerate(annotations):
        place = f"annotations[{index}] (id {annotation.get('id')!r})"
        get = annotation.get
        if type(get("id")) not in (int, str):
            _wrong(path, place, "id", annotation, "an integer")
        if type(get("image_id")) not in (int, str):
            _wrong(path, place, "image_id", annotation, "the id of an image")
        if type(get("category_id")) is not int or get("category_id") not in category_ids:
            ids = ", ".join(map(str, list(category_ids)[:10]))
            more = ", ..." if len(category_ids) > 10 else ""
            _wrong(path, place, "category_id", annotation, f"one of the categories: {ids}{more}")
        box = get("bbox")
        if (
            type(box) is not list
            or len(box) != 4
            or not _NUMBERS.issuperset(map(type, box))
            or not math.isfinite(sum(box))
            or box[2] < 0
            or box[3] < 0
        ):
            allowed = "4 numbers, x, y, width and height in pixels, the last two not negative"
            _wrong(path, place, "bbox", annotation, allowed)
        if get("iscrowd", 0) not in (0, 1):
            _wrong(path, place, "iscrowd", annotation, "0 or 1, or left out, which is 0")
        if get("ignore", 0) != 0:
            _wrong(path, place, "ignore", annotation, "0 or left out; Detectron2 knows iscrowd")
        area = get("area")
        if area is not None and (type(area) not in _NUMBERS or not area >= 0):
            _wrong(path, place, "area", annotation, "a number, not negative, or left out")
        segmentation, size = get("segmentation"), sizes.get(annotation["image_id"])
        if segmentation:
            _check_segmentation(segmentation, size, path, place, annotation)
        points = get("keypoints")
        if points and (
            type(points) is not list
            or len(points) % 3
            or not _NUMBERS.issuperset(map(type, points))
        ):
            allowed = "a list of x, y and visibility (0: not labelled) of every keypoint in turn"
            _wrong(path, place, "keypoints", annotation, allowed)
        num_points = len(points or ()) // 3
        file.num_keypoints = file.num_keypoints or num_points

        num_placed += size is not None
        largest = max(largest, box[0] + box[2], box[1] + box[3])
        if size is not None and _is_outside(box, size):
            num_outside += 1
            outside = outside or f"{place} has {box} in an image of {size[1]} x {size[0]} pixels"
        if file.odd_ids is None and (type(annotation["id"]) is not int or annotation["id"] < 1):
            file.odd_ids = f"annotations[{index}] has {annotation['id']!r}"
        if not _has_mask(segmentation):
            file.without_usable_mask = file.without_usable_mask or place
        if num_points not in (0, file.num_keypoints):
            file.other_keypoints = file.other_keypoints or place
        is_left_out = bool(segmentation) and not _has_mask(segmentation)
        if points and size is not None and not is_left_out:
            image_id = annotation["image_id"]
            labelled[image_id] = labelled.get(image_id, 0) + sum(v > 0 for v in points[2::3])
        if get("iscrowd"):
            continue
        file.num_objects += size is not None and not is_left_out
        if not segmentation:
            file.without_mask = file.without_mask or place
        elif type(segmentation) is dict:
            file.run_length_encoded = file.run_length_encoded or place
        if not num_points:
            file.without_keypoints = file.without_keypoints or place
    file.most_keypoints = max(labelled.values(), default=0)
    if _DUPLICATES_ALLOWED not in path:
        _check_unique([annotation["id"] for annotation in annotations], "annotations", path)
    if annotations and not num_placed:
        raise ValueError(
            f"{path!r}: no annotation is of one of the images: the first has the image_id "
            f"{annotations[0]['image_id']!r}, and the first image the id {next(iter(sizes))!r}"
        )
    if annotations and 0 < largest <= 1:
        raise ValueError(
            f"{path!r}: no bbox reaches beyond the first pixel of its image: they must be x, y, "
            "width and height in pixels, and not in fractions of the image"
        )
    if num_placed < len(annotations):
        logger.warning(
            f"{path}: {len(annotations) - num_placed} of {len(annotations)} annotations are of "
            "images that it does not list, and are left out"
        )
    if num_outside:
        logger.warning(
            f"{path}: {num_outside} of {len(annotations)} boxes reach out of their images; the "
            f"first, {outside}. A bbox is x, y, width and height, not two corners"
        )


def _is_outside(box: List[float], size: Tuple[int, int]) -> bool:
    """Whether a box reaches out of its image by more than a small part of it, and of a pixel."""
    (x, y, width, height), (rows, columns) = box, size
    dx, dy = 1 + _SLACK * columns, 1 + _SLACK * rows
    return x < -dx or y < -dy or x + width > columns + dx or y + height > rows + dy


def _check_segmentation(
    segmentation: Any,
    size: Optional[Tuple[int, int]],
    path: str,
    place: str,
    annotation: Dict[str, Any],
) -> None:
    if type(segmentation) is list:
        for polygon in segmentation:
            if (
                type(polygon) is not list
                or not _NUMBERS.issuperset(map(type, polygon))
                or not math.isfinite(sum(polygon))
            ):
                allowed = "a list of polygons, [[x, y, x, y, ...], ...], or run-length encoded"
                _wrong(path, place, "segmentation", annotation, allowed)
        return
    encoded = type(segmentation) is dict and type(segmentation.get("counts")) in (str, list)
    found = segmentation.get("size") if encoded else None
    if (
        type(found) is not list
        or not _NUMBERS.issuperset(map(type, found))
        or found != list(size or found)
    ):
        allowed = "polygons, or {'counts': ..., 'size': [height, width]} with the image's size"
        if size is not None:
            allowed += f", {list(size)}"
        _wrong(path, place, "segmentation", annotation, allowed)
    if not is_run_length_encoded(segmentation):
        allowed = f"run lengths: counts whose sum is that of the pixels, {math.prod(found)}"
        _wrong(path, place, "segmentation", annotation, allowed)


def is_run_length_encoded(segmentation: Any) -> bool:
    """Whether a mask is of COCO's run-length encoding, as text or as numbers, and of its size.

    pycocotools does not say: of counts for too few pixels it makes a mask whose other pixels are
    arbitrary.
    """
    size, counts = (
        (segmentation.get("size"), segmentation.get("counts"))
        if isinstance(segmentation, dict)
        else (None, None)
    )
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        counts = _decoded(counts)
    return (
        isinstance(size, (list, tuple))
        and type(counts) is list
        and len(size) == 2
        and _NUMBERS.issuperset(map(type, size))
        and {int}.issuperset(map(type, counts))
        and min((*size, *counts)) >= 0
        and sum(counts) == math.prod(size)
    )


def is_coco_result(prediction: Any) -> bool:
    """Whether a detection is in COCO's format of results, apart from its mask."""
    if not isinstance(prediction, dict):
        return False
    bbox, score = prediction.get("bbox"), prediction.get("score")
    return (
        isinstance(prediction.get("image_id"), (Real, str))
        and isinstance(prediction.get("category_id"), (Real, str))
        and isinstance(bbox, (list, tuple))
        and len(bbox) == 4
        and all(isinstance(number, Real) and math.isfinite(number) for number in (*bbox, score))
        and min(bbox[2:]) >= 0
    )


def _decoded(counts: str) -> Optional[List[int]]:
    """The numbers that pycocotools writes as text: 5 bits in a character, the lowest first, each
    from the fourth on minus the last but one. None if the text is not of that kind."""
    numbers: List[int] = []
    number = bits = 0
    for code in map(ord, counts):
        value = code - ord("0")
        if not 0 <= value < 64:
            return None
        number |= (value & 31) << bits
        bits += 5
        if value & 32:  # more of the number follows
            continue
        if value & 16:  # its sign
            number -= 1 << bits
        numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
        number = bits = 0
    return None if bits else numbers


def _has_mask(segmentation: Any) -> bool:
    return bool(_usable(segmentation) if type(segmentation) is list else segmentation)


def _usable(polygons: List[List[float]]) -> List[List[float]]:
    """Those that Detectron2 takes: of at least three points."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
