"""The datasets of this package and of a config, and a check that they can be read."""

import difflib
import os
from typing import Any, Iterable, List, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .digits import CLASSES, SPLITS, annotation_file, image_folder

# Metadata in which Detectron2's registrations keep paths.
_PATH_ATTRIBUTES = (
    "json_file",
    "image_root",
    "panoptic_json",
    "panoptic_root",
    "sem_seg_root",
    "image_dir",
    "gt_dir",
    "dirname",
)
_DIGITS = tuple(f"digits_{split}" for split in SPLITS)


def default_digits_root() -> str:
    """Returns where ``digits_train`` and ``digits_val`` are looked for.

    It is the folder ``digits`` beside the builtin datasets of Detectron2, whose own rule it
    follows: in ``$DETECTRON2_DATASETS``, by default ``datasets``.
    """
    return os.path.join(_datasets_root(), "digits")


def _datasets_root() -> str:
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_digits(root: Optional[str] = None) -> None:
    """Registers ``digits_train`` and ``digits_val``, which need not have been made yet.

    A name that is registered already is left as it is.

    Args:
        root: folder of the dataset. Default: :func:`default_digits_root`.
    """
    root = default_digits_root() if root is None else root
    for name, split in zip(_DIGITS, SPLITS):
        if name not in DatasetCatalog:
            metadata = {
                "thing_classes": list(CLASSES),
                "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(CLASSES))},
            }
            register_coco_instances(
                name, metadata, annotation_file(root, split), image_folder(root, split)
            )


def register_coco_format(datasets: Iterable[Any]) -> None:
    """Registers datasets in COCO's format.

    Args:
        datasets: as in the config key ``DATASETS.COCO_FORMAT``: for each a name, the annotation
            file and the folder of the images. One that is registered already is left as it is.

    Raises:
        ValueError: if it is something else, or a name stands for another dataset already.
    """
    for dataset in datasets:
        if (
            not isinstance(dataset, (list, tuple))
            or len(dataset) != 3
            or not all(isinstance(part, str) and part for part in dataset)
        ):
            raise ValueError(
                "DATASETS.COCO_FORMAT: each dataset must be a name, an annotation file and a "
                f"folder of images, as in ((NAME, FILE, FOLDER),), got {dataset!r}"
            )
        name, json_file, image_root = dataset
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, json_file, image_root)
            continue
        metadata = MetadataCatalog.get(name)
        found = metadata.get("json_file"), metadata.get("image_root")
        if [os.path.realpath(path or "") for path in found] != [
            os.path.realpath(path) for path in (json_file, image_root)
        ]:
            raise ValueError(
                f"DATASETS.COCO_FORMAT: {name!r} is the name of another dataset, whose files are "
                f"{found[0]!r} and {found[1]!r}"
            )


def check_datasets(names: Iterable[str]) -> None:
    """Checks that datasets are registered and that their files and folders exist.

    Detectron2 itself finds out only after the model is built. Remote locations ("https://...") are
    not checked.

    Args:
        names: names of datasets, as in ``DATASETS.TRAIN``.

    Raises:
        ValueError: a name is not registered.
        FileNotFoundError: a file or folder of a registered dataset does not exist.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(_describe_unknown(name, DatasetCatalog.list()))
        metadata = MetadataCatalog.get(name)
        for attribute in _PATH_ATTRIBUTES:
            path = metadata.get(attribute)
            if path and "://" not in str(path) and not os.path.exists(path):
                raise FileNotFoundError(_describe_missing(name, attribute, path))


def _describe_unknown(name: str, registered: List[str]) -> str:
    close = difflib.get_close_matches(name, registered, n=5)
    hint = f"similar names: {', '.join(close)}" if close else "none has a similar name"
    return (
        f"no dataset {name!r} is registered; {len(registered)} others are, {hint}. One of your own "
        "is listed in DATASETS.COCO_FORMAT of a YAML config (its name, annotation file and folder "
        "of images), or registered in a LazyConfig, or in the program that uses it"
    )


def _describe_missing(name: str, attribute: str, path: str) -> str:
    what = f"dataset {name!r}: its {attribute} {path!r} does not exist"
    if not os.path.abspath(path).startswith(os.path.abspath(_datasets_root()) + os.sep):
        return f"{what}: put it there, or name another path where the dataset is registered"
    if name in _DIGITS:
        remedy = "make the dataset with `python tools/prepare_digits.py`"
    else:
        remedy = "put the dataset there, or set DETECTRON2_DATASETS to the folder it is in"
    if "DETECTRON2_DATASETS" in os.environ:
        root = f"DETECTRON2_DATASETS is {os.environ['DETECTRON2_DATASETS']!r}"
    else:
        root = f"DETECTRON2_DATASETS is not set, so it is 'datasets' in {os.getcwd()}"
    return f"{what} ({root}): {remedy}"


register_digits()
