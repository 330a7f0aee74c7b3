"""What a run needs of its datasets: that they fit one another, and its model."""

import logging
import re
from typing import Any, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from pycocotools.cocoeval import Params

from ..config import ConfigError
from ..data import annotation_facts, check_datasets, check_images, check_same_classes
from ..data.coco_format import CocoFile

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

# Where models have their number of classes.
_CLASSES = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}
# What Detectron2 asks for even where nothing is flipped; known by its identity, which a tuple
# without elements has not.
_NO_FLIP_MAP: List[Any] = []
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


def check_data(cfg: CfgNode, parts: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Reads the annotations of a run, and compares them with one another and with its model.

    The flip map of keypoints, which Detectron2 takes from the metadata of the datasets, is put
    there: see ``DATASETS.KEYPOINT_FLIP_MAP``.

    Args:
        cfg: the config of the run.
        parts: what of ``DATASETS`` is used. The classes of the training data are compared with
            those of test data also where it is not used, if it is there.

    Raises:
        ConfigError: naming the file or key, what was found and what is allowed.
    """
    used = [name for part in parts for name in cfg.DATASETS[part]]
    trained_with = [] if "TRAIN" in parts else [*filter(_is_there, cfg.DATASETS.TRAIN)]
    try:
        check_datasets(used)
        check_images(used)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    try:
        check_same_classes([*trained_with, *used])
    except ValueError as error:
        hint = ". DATASETS.TRAIN is what the model was trained with" if trained_with else ""
        raise ConfigError(f"{error}{hint}") from error
    node = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
    if node is not None:
        check_classes(f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES, used)
    for part in parts:
        for name in cfg.DATASETS[part]:
            file = annotation_facts(name)
            if file is None:
                continue
            if cfg.MODEL.MASK_ON:
                masks = ("MODEL.MASK_ON", "INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT)
                check_masks(file, part == "TRAIN", *masks)
            if cfg.MODEL.KEYPOINT_ON:
                _check_keypoints(cfg, file, training=part == "TRAIN")
    if "TRAIN" in parts:
        head = cfg.MODEL.ROI_KEYPOINT_HEAD
        check_objects(
            "DATASETS.TRAIN",
            cfg.DATASETS.TRAIN,
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE",
            head.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        )
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoint_metadata(cfg, used, flips="TRAIN" in parts and _flips(cfg))
        if "TEST" in parts and cfg.DATASETS.TEST:
            _check_sigmas(cfg)


def _is_there(name: str) -> bool:
    """Whether the classes of a dataset can be known."""
    if name in MetadataCatalog.list() and MetadataCatalog.get(name).get("thing_classes"):
        return True
    try:
        check_datasets([name])
    except (OSError, ValueError):
        logger.info(f"{name} is not here: its classes are not compared with those of the test data")
        return False
    return True


def check_classes(key: str, expected: int, names: Sequence[str]) -> None:
    """Compares the number of classes of a model with that of datasets, as far as it is known.

    More classes than there are in the data are allowed, and warned of.

    Args:
        key: of the config, for the number.
        expected: its value.
        names: of the datasets.

    Raises:
        ConfigError: if the model has fewer: its loss would fail, far from the cause.
    """
    for name in names:
        file = annotation_facts(name)
        classes = file.classes if file else MetadataCatalog.get(name).get("thing_classes")
        if classes is None or len(classes) == expected:
            continue
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        message = f"{key} is {expected}, but {name!r} has {len(classes)} ({shown})"
        if len(classes) > expected:
            raise ConfigError(message)
        logger.warning(message)


def check_objects(
    key: str, names: Sequence[str], filter_empty: bool, least_key: str, min_keypoints: int
) -> None:
    """Looks for images to train with, of those that remain when Detectron2 has left out others.

    Args:
        key: of the config, by which the datasets are named.
        names: of the datasets. One that is not in a file in COCO's format is taken to have some.
        filter_empty: whether images without objects, or with crowds alone, are left out.
        least_key, min_keypoints: images with fewer labelled keypoints are left out, too; the key of
            that number, and its value.

    Raises:
        ConfigError: if none remains.
    """
    if not names:
        raise ConfigError(f"{key} is empty, and must name a dataset")
    files = [annotation_facts(name) for name in names]
    shown = ", ".join(map(repr, names))
    if filter_empty and not any(file is None or file.num_objects for file in files):
        raise ConfigError(
            f"{key}: {shown} have no annotations of objects to train with. Those of crowds, of "
            "images that are not listed and with polygons of less than three points are left out"
        )
    if not any(file is None or file.most_keypoints >= min_keypoints for file in files):
        most = max(file.most_keypoints for file in files if file)
        raise ConfigError(
            f"{least_key} is {min_keypoints}, but in {key}, {shown}, no image has as many labelled "
            f"keypoints, so that none is trained with; the most are {most}"
        )


def check_masks(
    file: CocoFile, training: bool, key: str, format_key: str, mask_format: str
) -> None:
    """Looks for the masks that a model needs.

    Args:
        file: the annotations.
        training: whether they are trained with; else evaluated.
        key: of the config, by which the model has masks.
        format_key, mask_format: the key of the format of masks in training, "polygon" or "bitmask",
            and its value.

    Raises:
        ConfigError: if one is missing, or of another format.
    """
    missing = file.without_mask if training else file.without_usable_mask
    if missing:
        raise ConfigError(
            f"{key} is True, but in {file.path!r} {missing} has no segmentation"
            f"{'' if training else ' with a polygon of three points or more'}; all must have one. "
            f"A model of boxes alone has {key} False"
        )
    if training and file.run_length_encoded and mask_format == "polygon":
        raise ConfigError(
            f"{format_key} is 'polygon', but in {file.path!r} {file.run_length_encoded} has a "
            "run-length encoded mask; 'bitmask' takes both"
        )


def _check_keypoints(cfg: CfgNode, file: CocoFile, training: bool) -> None:
    expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if not file.has_annotations:
        return
    for found in (file.num_keypoints, len(file.keypoint_names)):
        if found and found != expected:
            names = ", ".join(file.keypoint_names)
            raise ConfigError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {expected}, but {file.path!r} has "
                f"{file.num_keypoints} in its annotations, and {len(file.keypoint_names)} names of "
                f"them in its categories ({names or 'none'}); where there are names, all must agree"
            )
    where = file.other_keypoints or (file.without_keypoints if training else None)
    if where or not file.num_keypoints:
        raise ConfigError(
            f"MODEL.KEYPOINT_ON is True, but in {file.path!r} {where or 'every annotation'} lacks "
            f"{expected} keypoints; x, y and visibility of each are needed, 0 where not labelled"
        )


def _check_sigmas(cfg: CfgNode) -> None:
    expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    found = len(cfg.TEST.KEYPOINT_OKS_SIGMAS or Params("keypoints").kpt_oks_sigmas)
    if found != expected:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS: there must be {expected}, as many as "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, and there are {found}; none is COCO's 17. "
            "They are the standard deviations of annotators, relative to the object's size: COCO's "
            "are 0.025 (eyes) to 0.107 (hips)"
        )


def _flips(cfg: CfgNode) -> bool:
    return cfg.INPUT.RANDOM_FLIP == "horizontal"


def _check_keypoint_metadata(cfg: CfgNode, names: Sequence[str], flips: bool) -> None:
    """Compares the names of keypoints, and puts them and the flip map where Detectron2 looks."""
    known = {name: tuple(_keypoint_names(cfg, name)) for name in names}
    first = next(iter(known), "")
    for name in known:
        if known[name] != known[first]:
            raise ConfigError(
                f"the keypoints of {first!r} are {', '.join(known[first])}, and those of {name!r} "
                f"{', '.join(known[name])}; they must be the same in the same order"
            )
    registered = [MetadataCatalog.get(name).get("keypoint_flip_map") for name in names]
    pairs = _flip_map(cfg, known.get(first, ()), registered)
    if pairs is None and flips:
        raise ConfigError(
            f"DATASETS.KEYPOINT_FLIP_MAP is empty, and the names of the keypoints of {first!r} "
            f"({', '.join(known[first])}) do not say which are left and right: give pairs of "
            "names, as in (('left_eye', 'right_eye'),), for INPUT.RANDOM_FLIP 'horizontal', or "
            "one of a name with itself if none are swapped; or set RANDOM_FLIP 'none'"
        )
    for name in names:
        # Not by setattr, with which Detectron2 refuses another value than the last config's. Equal
        # for all, of which it assures itself.
        metadata = vars(MetadataCatalog.get(name))
        metadata["keypoint_names"] = list(known[name])
        metadata["keypoint_flip_map"] = _NO_FLIP_MAP if pairs is None else pairs


def _keypoint_names(cfg: CfgNode, name: str) -> Sequence[str]:
    """Those in the metadata, or in the file, or else numbers."""
    expected, file = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, annotation_facts(name)
    for names in (
        MetadataCatalog.get(name).get("keypoint_names"),
        file.keypoint_names if file else None,
    ):
        if names and len(names) == expected:
            return names
    return [str(i) for i in range(expected)]


def _flip_map(cfg: CfgNode, names: Sequence[str], registered: Sequence[Any]) -> Optional[List[Any]]:
    """Pairs of names that a horizontal flip exchanges; None if they are not known.

    Args:
        registered: what the metadata of the datasets say.
    """
    if cfg.DATASETS.KEYPOINT_FLIP_MAP:
        pairs = cfg.DATASETS.KEYPOINT_FLIP_MAP
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not set(pair) <= set(names):
                raise ConfigError(
                    f"DATASETS.KEYPOINT_FLIP_MAP: {pair!r} is not a pair of names of keypoints, "
                    f"which are {', '.join(names)}"
                )
        return [tuple(pair) for pair in pairs]
    for pairs in registered:
        if pairs is not None and pairs is not _NO_FLIP_MAP:
            return [tuple(pair) for pair in pairs]
    mirrored = {name: _mirrored(name) for name in names}
    pairs = [(a, b) for a, b in mirrored.items() if b in mirrored and a < b]
    sided = [name for name in names if mirrored[name] != name]
    return pairs if pairs and len(sided) == 2 * len(pairs) else None


def _mirrored(name: str) -> str:
    """The name with left for right: ``left_eye`` and ``right_eye``, ``eye-L`` and ``eye-R``."""
    parts = re.split(r"([^A-Za-z]+)", name)
    return "".join(
        _like(_SIDES[part.lower()], part) if part.lower() in _SIDES else part for part in parts
    )


def _like(word: str, model: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
