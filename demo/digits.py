"""Handwritten digits on photographs: an instance segmentation dataset that is made in seconds.

Everything it is made of comes with scikit-learn: real handwritten digits (``load_digits``, 1797
scans of 8 x 8 pixels in 10 classes) are enlarged, turned a little, coloured, and pasted without
overlap on random crops of two real photographs (``load_sample_images``). The result is in COCO
format, with run-length masks::

    root/
      annotations/instances_{train,val}.json
      {train,val}/000001.jpg, ...

No handwritten sample is used in both splits. The photographs are; their crops are random.

Masks are run-length encoded because most digits have holes, which COCO's polygons would fill: train
with ``INPUT.MASK_FORMAT: "bitmask"``, and with ``INPUT.RANDOM_FLIP: "none"``, as a mirrored digit
is no digit.
"""

import argparse
import colorsys
import inspect
import json
import logging
import numbers
import os
import sys
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

logger = logging.getLogger(__name__)

CLASSES: Tuple[str, ...] = tuple(str(digit) for digit in range(10))
SPLITS: Tuple[str, ...] = ("train", "val")

# Stored with every dataset: raise it whenever the same parameters begin to give other images.
_VERSION = 1
_MIN_IMAGE_SIZE = 64
_VAL_FRACTION = 0.25
_DIGITS_PER_IMAGE = (2, 6)
_PLACEMENT_ATTEMPTS = 20

# Of a digit's height to the image's: 24 to 80 pixels in an image of 192.
_RELATIVE_HEIGHT = (24 / 192, 80 / 192)
_ROTATION_DEGREES = 12.0
_WIDTH_STRETCH = (0.85, 1.2)
# Ink of load_digits goes from 0 to 16.
_FULL_INK = 16.0
_MASK_INK = 0.5 * _FULL_INK

_COLOR_CANDIDATES = 12
# CIE76 distance of a digit's colour to the photograph around it; 2.3 is just noticeable.
_MIN_COLOR_DISTANCE = 55.0

_MIN_CROP_SIDE = 96
_JPEG_QUALITY = 95


class _Material(NamedTuple):
    """What the images of one split are made of."""

    inks: np.ndarray  # (num_samples, 8, 8) float32, 0 to 16
    labels: np.ndarray  # (num_samples,), 0 to 9
    sample_ids: np.ndarray  # (num_samples,), indices into load_digits
    photos: List[Image.Image]


def default_root() -> str:
    """Returns the folder ``digits`` beside the builtin datasets of Detectron2, whose own rule it
    follows: in ``$DETECTRON2_DATASETS``, by default ``datasets``."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, "digits")


def annotation_file(root: str, split: str) -> str:
    """Returns where the COCO annotations of a split ("train" or "val") are in the dataset."""
    return os.path.join(root, "annotations", f"instances_{split}.json")


def image_folder(root: str, split: str) -> str:
    """Returns where the images of a split ("train" or "val") are in the dataset."""
    return os.path.join(root, split)


def make_digits_dataset(
    root: str,
    num_train: int = 400,
    num_val: int = 100,
    image_size: int = 192,
    seed: int = 0,
    progress: bool = True,
) -> str:
    """Makes the digits dataset at ``root``, unless it is there already.

    The same parameters always give the same dataset, and image i of a split does not depend on how
    many there are. The folder appears at ``root`` only when it is complete.

    Args:
        root: folder to make. It may be there if it is empty or holds this very dataset, which then
            is left as it is. "~" is expanded.
        num_train: number of training images, at least 1.
        num_val: number of validation images, at least 1.
        image_size: width and height of the images in pixels, at least 64. The digits grow with it.
        seed: of everything random, at least 0. Which samples are for validation does not depend
            on it.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        ``root``, with "~" expanded.

    Raises:
        ValueError: an argument is not an integer or too small.
        FileExistsError: ``root`` holds something else.
        ImportError: scikit-learn is not installed.
    """
    parameters = {
        "num_train": check_integer("num_train", num_train, minimum=1),
        "num_val": check_integer("num_val", num_val, minimum=1),
        "image_size": check_integer("image_size", image_size, minimum=_MIN_IMAGE_SIZE),
        "seed": check_integer("seed", seed, minimum=0),
        "version": _VERSION,
    }
    root = os.path.normpath(os.path.expanduser(root))
    if _is_made(root, parameters):
        logger.info("%s is already there", root)
        return root

    materials = load_materials()
    parent, name = os.path.split(os.path.abspath(root))
    os.makedirs(parent, exist_ok=True)
    # A folder next to root, so that it is on the same file system and the renaming is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as temporary:
        unfinished = os.path.join(temporary, name)
        for split_index, split in enumerate(SPLITS):
            _make_split(unfinished, split_index, materials[split], parameters, progress)
        try:
            os.rename(unfinished, root)
        except OSError:
            # Another process may have made the same dataset in the meantime.
            if not _is_made(root, parameters):
                raise
    logger.info("%s: made %d training and %d validation images", root, num_train, num_val)
    return root


def check_integer(name: str, value: Any, minimum: int) -> int:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
    return int(value)


def _is_made(root: str, parameters: Dict[str, int]) -> bool:
    """Tells whether the dataset is there (True) or can be made there (False), or raises."""
    if not os.path.lexists(root) or (os.path.isdir(root) and not os.listdir(root)):
        return False
    found = _read_parameters(root)
    if found == parameters:
        return True
    advice = "delete it, or choose another root"
    if found is None:
        raise FileExistsError(f"{root} is there and is not a complete digits dataset: {advice}")
    raise FileExistsError(
        f"{root} holds a digits dataset made with {_format(found)}, "
        f"not with {_format(parameters)}: {advice}"
    )


def _format(parameters: Dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _read_parameters(root: str) -> Optional[Dict[str, int]]:
    """Returns the parameters of the digits dataset at ``root``, None if none is complete there."""
    parameters = None
    for split in SPLITS:
        try:
            with open(annotation_file(root, split)) as file:
                content = json.load(file)
            parameters = content["info"]["parameters"]
            names = [image["file_name"] for image in content["images"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        folder = image_folder(root, split)
        if not all(os.path.isfile(os.path.join(folder, name)) for name in names):
            return None
    return parameters


def load_materials() -> Dict[str, _Material]:
    """Returns what each split is made of.

    The last quarter of every class is for validation. The samples are stored in the order in which
    they were collected, so this, unlike a shuffle, keeps most neighbours, which look alike,
    together.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError(
            "the digits dataset is made of images that come with scikit-learn, which is not "
            "installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    ids: Dict[str, List[int]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        of_class = np.flatnonzero(digits.target == label)
        num_train = len(of_class) - round(_VAL_FRACTION * len(of_class))
        ids["train"].extend(of_class[:num_train])
        ids["val"].extend(of_class[num_train:])
    return {
        split: _Material(
            inks=digits.images[ids[split]].astype(np.float32),
            labels=digits.target[ids[split]],
            sample_ids=np.asarray(ids[split]),
            photos=photos,
        )
        for split in SPLITS
    }


def _make_split(
    root: str, split_index: int, material: _Material, parameters: Dict[str, int], progress: bool
) -> None:
    split = SPLITS[split_index]
    size = parameters["image_size"]
    num_images = parameters[f"num_{split}"]
    folder = image_folder(root, split)
    os.makedirs(folder)
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    # None: no bar where stderr is not a terminal.
    disable = None if progress else True
    for image_id in tqdm(
        range(1, num_images + 1), desc=f"digits {split}", unit="image", disable=disable
    ):
        rng = np.random.default_rng([parameters["seed"], split_index, image_id])
        pixels, instances = _compose_image(material, size, rng)
        file_name = f"{image_id:06d}.jpg"
        # No chroma subsampling: the strokes of small digits are few pixels wide.
        Image.fromarray(pixels).save(
            os.path.join(folder, file_name), quality=_JPEG_QUALITY, subsampling=0
        )
        images.append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        for instance in instances:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **instance})
    content = {
        "info": {
            "description": "Handwritten digits (scikit-learn's load_digits, of the UCI repository) "
            "on photographs by Daniel Buechele (scikit-learn's load_sample_images, CC BY 2.0). "
            "An annotation's sample_id is its digit's index in load_digits.",
            "parameters": parameters,
        },
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "digit"}
            for label, name in enumerate(CLASSES)
        ],
    }
    path = annotation_file(root, split)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(content, file)


def _compose_image(
    material: _Material, size: int, rng: np.random.Generator
) -> Tuple[np.ndarray, List[Dict[str, Any]]]:
    """Returns an image (size, size, 3), uint8 RGB, and what is specific to its annotations."""
    photo = crop_photo(material.photos, size, rng)
    pixels = photo.astype(np.float32) / 255
    occupied = np.zeros((size, size), np.uint8)
    instances: List[Dict[str, Any]] = []
    low, high = _DIGITS_PER_IMAGE
    for index in rng.choice(len(material.inks), size=rng.integers(low, high + 1), replace=False):
        found = _render_and_place(material.inks[index], occupied, rng)
        if found is None:
            continue
        opacity, window = found
        color = choose_color(pixels[window], rng)
        pixels[window] += opacity[..., None] * (color - pixels[window])
        occupied[window] |= opacity > 0
        mask = np.zeros_like(occupied)
        mask[window] = opacity >= 0.5
        instances.append(
            {
                "category_id": int(material.labels[index]) + 1,
                "sample_id": int(material.sample_ids[index]),
                **_describe_mask(mask),
            }
        )
    return np.round(pixels * 255).astype(np.uint8), instances


def crop_photo(photos: Sequence[Image.Image], size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random square of a random photograph, (size, size, 3), uint8 RGB."""
    photo = photos[rng.integers(len(photos))]
    side = rng.integers(_MIN_CROP_SIDE, min(photo.size) + 1)
    left = rng.integers(photo.width - side + 1)
    top = rng.integers(photo.height - side + 1)
    crop = photo.resize((size, size), Image.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _render_and_place(
    ink: np.ndarray, occupied: np.ndarray, rng: np.random.Generator
) -> Optional[Tuple[np.ndarray, Tuple[slice, slice]]]:
    """Draws a digit at a random size and finds a random place for it where nothing is.

    Args:
        ink: a sample, (8, 8), float32, 0 to 16.
        occupied: (size, size), uint8, 1 where a digit is already.

    Returns:
        The digit's opacity (h, w), float32, 0 to 1, and the window of the image for it, or None if
        there was no place in several attempts.
    """
    size = occupied.shape[0]
    low, high = np.log(_RELATIVE_HEIGHT)
    for _ in range(_PLACEMENT_ATTEMPTS):
        opacity = render(ink, size * np.exp(rng.uniform(low, high)), rng)
        h, w = opacity.shape
        # How much of every window of h x w is occupied, by summed areas.
        areas = cv2.integral(occupied)
        taken = areas[h:, w:] - areas[:-h, w:] - areas[h:, :-w] + areas[:-h, :-w]
        free = np.flatnonzero(taken == 0)
        if len(free):
            top, left = divmod(int(rng.choice(free)), taken.shape[1])
            return opacity, (slice(top, top + h), slice(left, left + w))
    return None


def render(ink: np.ndarray, height: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the opacity (h, w), float32, 0 to 1, of a digit about ``height`` pixels high."""
    scale = height / ink.shape[0]
    angle = np.radians(rng.uniform(-_ROTATION_DEGREES, _ROTATION_DEGREES))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * rotation @ np.diag([rng.uniform(*_WIDTH_STRETCH), 1.0])
    canvas = int(np.ceil(1.6 * height))  # holds the turned and stretched sample
    offset = (canvas - 1) / 2 - matrix @ np.full(2, (ink.shape[0] - 1) / 2)
    enlarged = cv2.warpAffine(
        ink, np.column_stack([matrix, offset]), (canvas, canvas), flags=cv2.INTER_CUBIC
    )
    # An edge goes from no ink to full ink within about one pixel of the sample: this makes it one
    # pixel of the image wide, with half of the opacity where the mask ends.
    opacity = np.clip((enlarged - _MASK_INK) * scale / _FULL_INK + 0.5, 0.0, 1.0)
    return opacity[_tight_window(opacity > 0)]


def _tight_window(mask: np.ndarray) -> Tuple[slice, slice]:
    """Returns the smallest window that holds all of a mask, which must not be empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def choose_color(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a random colour, (3,), float32 RGB, 0 to 1, that stands out from the background.

    Args:
        background: what the digit is pasted on, (h, w, 3), float32 RGB, 0 to 1.
    """
    around = cv2.cvtColor(background, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    candidates = np.array(
        [
            colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1.0), rng.uniform(0.2, 1.0))
            for _ in range(_COLOR_CANDIDATES)
        ],
        np.float32,
    )
    in_lab = cv2.cvtColor(candidates[None], cv2.COLOR_RGB2LAB)[0]
    distances = [np.median(np.linalg.norm(around - color, axis=1)) for color in in_lab]
    good = np.flatnonzero(np.array(distances) >= _MIN_COLOR_DISTANCE)
    return candidates[good[0] if len(good) else int(np.argmax(distances))]


def _describe_mask(mask: np.ndarray) -> Dict[str, Any]:
    """Returns the COCO fields of an instance with this mask, (H, W), uint8."""
    rows, columns = _tight_window(mask)
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {
            "size": [int(length) for length in encoded["size"]],
            "counts": encoded["counts"].decode("ascii"),
        },
    }


def main() -> int:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make_digits_dataset).parameters.items()
    }
    parser = argparse.ArgumentParser(
        prog="python -m demo.digits",
        description="Makes the digits dataset, an instance segmentation dataset in COCO format, in "
        "seconds. It needs scikit-learn, from which its images come, and no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--root",
        default=default_root(),
        help="folder to make; configs look for it in $DETECTRON2_DATASETS/digits, or in "
        "datasets/digits if that variable is not set",
    )
    for option, help_text in [
        ("--num-train", "number of training images"),
        ("--num-val", "number of validation images"),
        ("--image-size", "width and height of the images in pixels"),
        ("--seed", "seed of everything random"),
    ]:
        default = defaults[option[2:].replace("-", "_")]
        parser.add_argument(option, type=int, default=default, help=help_text)
    args = parser.parse_args()
    # The logger says what was made, or that it was there.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        make_digits_dataset(**vars(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
