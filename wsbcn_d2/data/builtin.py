"""The datasets of a config, and whether they can be read and fit together."""

import contextlib
import difflib
import os
from typing import Any, Iterable, List, Optional, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from .coco_format import CocoFile, coco_file

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
_FILES = ("json_file", "panoptic_json")  # the others are folders
# Of datasets whose json_file is in COCO's format. LVIS has one of its own.
_COCO_EVALUATORS = ("coco", "coco_panoptic_seg")
_MAX_SHOWN_CLASSES = 100
# Of how many images of a dataset the size is looked at.
_LOOKED_AT = 16
# EXIF's tag, and the values of it by which width and height change places.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_ROOT = "$DETECTRON2_DATASETS"


def _datasets_root() -> str:
    """Where Detectron2 itself looks for its datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_coco_format(datasets: Iterable[Any]) -> None:
    """Registers datasets in COCO's format.

    Args:
        datasets: as in the config key ``DATASETS.COCO_FORMAT``: for each a name, the annotation
            file and the folder of the images, where ``$DETECTRON2_DATASETS`` stands for the folder
            of Detectron2's builtin datasets. One that is registered already is left as it is.

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
        name = dataset[0]
        json_file, image_root = (path.replace(_ROOT, _datasets_root()) for path in dataset[1:])
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
    """Checks that datasets are registered, that their files and folders exist, and that those in
    COCO's format are in it.

    Detectron2 itself finds out only after the model is built. Remote locations ("https://...") are
    not checked.

    Args:
        names: names of datasets, as in ``DATASETS.TRAIN``.

    Raises:
        ValueError: a name is not registered, or a file is not what it should be.
        OSError: a file or folder of a registered dataset does not exist or cannot be read.
    """
    for name in names:
        if not isinstance(name, str) or name not in DatasetCatalog:
            raise ValueError(_describe_unknown(name, DatasetCatalog.list()))
        metadata = MetadataCatalog.get(name)
        for attribute in _PATH_ATTRIBUTES:
            path = metadata.get(attribute)
            if not path or "://" in str(path):
                continue
            if not os.path.exists(path):
                raise FileNotFoundError(_describe_missing(name, attribute, path))
            of_coco = metadata.get("evaluator_type") in _COCO_EVALUATORS
            if of_coco and os.path.isdir(path) == (attribute in _FILES):
                found, allowed = ("folder", "file") if attribute in _FILES else ("file", "folder")
                raise ValueError(
                    f"dataset {name!r}: its {attribute} {path!r} is a {found}, and must be a "
                    f"{allowed}. DATASETS.COCO_FORMAT has a name, the annotation file and the "
                    "folder of images, in this order"
                )
        file = annotation_facts(name)
        registered = metadata.get("thing_classes")
        if file is not None and registered and list(registered) != list(file.classes):
            raise ValueError(
                f"dataset {name!r}: its thing_classes are {_show(registered)}, and the categories "
                f"in {file.path!r}, in the order of their ids, {_show(file.classes)}. They must be "
                "the same; Detectron2 takes them from the file where none are set"
            )


def check_images(names: Iterable[str]) -> None:
    """Looks for the images of datasets in COCO's format, each in a listing of its folder, and at
    the sizes of some, which must be those in the annotations.

    Args:
        names: of datasets that :func:`check_datasets` has found in order.

    Raises:
        FileNotFoundError: if some are not there.
        ValueError: if one of another size is among those looked at, or one that cannot be read.
    """
    for name in names:
        file = annotation_facts(name)
        root = os.fspath(MetadataCatalog.get(name).get("image_root") or "")
        if file is None or not root or "://" in root:
            continue
        images = [(os.path.join(root, path), path, size) for path, *size in file.images]
        folders = filter(os.path.isdir, {os.path.dirname(full_path) for full_path, _, _ in images})
        listed = {os.path.join(folder, name) for folder in folders for name in os.listdir(folder)}
        # What is not listed may still be there under a name with other capitals, or an address.
        missing = [
            path
            for full_path, path, _ in images
            if not (full_path in listed or "://" in full_path or os.path.exists(full_path))
        ]
        if missing:
            raise FileNotFoundError(
                f"dataset {name!r}: {len(missing)} of {len(images)} images of {file.path!r} are "
                f"not in {root!r}; the first is {missing[0]!r}"
            )
        for full_path, _, (height, width) in images[:: len(images) // _LOOKED_AT + 1]:
            if "://" in full_path:
                continue
            found = _size_of(full_path)
            if found != (width, height):
                raise ValueError(
                    f"dataset {name!r}: {full_path!r} has {found[0]} x {found[1]} pixels (as it is "
                    f"meant to be looked at, if it is a photograph), and in {file.path!r} its "
                    f"width and height are {width} and {height}; they must be the same"
                )


def _size_of(path: str) -> Tuple[int, int]:
    """Width and height of an image as Detectron2 reads it."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = False
            with contextlib.suppress(Exception):  # of damaged EXIF, as Detectron2 does
                turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read as an image: {error}") from error
    return (height, width) if turned else (width, height)


def annotation_facts(name: str) -> Optional[CocoFile]:
    """What :func:`.coco_format.coco_file` finds in the annotations of a registered dataset.

    Returns:
        None if they are not in a local file in COCO's format.
    """
    metadata = MetadataCatalog.get(name)
    path = os.fspath(metadata.get("json_file") or "")
    if not path or "://" in path or metadata.get("evaluator_type") not in _COCO_EVALUATORS:
        return None
    return coco_file(path)


def check_same_classes(names: Sequence[str]) -> None:
    """Compares the classes of datasets, of instances and of semantic segmentation.

    A model knows its classes by numbers, which are places in the list of categories, in the order
    of their ids. So datasets for which the same number means something else do not go together.

    Args:
        names: of datasets that :func:`check_datasets` has found in order. One whose classes are not
            known before it is read by a program of its own is not compared.

    Raises:
        ValueError: with both lists, if they differ in their names or order.
    """
    for key in ("thing_classes", "stuff_classes"):
        known = {}
        for name in names:
            classes = MetadataCatalog.get(name).get(key)
            if not classes and key == "thing_classes":
                file = annotation_facts(name)
                classes = file.classes if file else None
            if classes:
                known[name] = list(classes)
        first = next(iter(known), "")
        for name in known:
            if known[name] != known[first]:
                raise ValueError(_describe_difference(key, first, known[first], name, known[name]))


def _describe_difference(key: str, a: str, of_a: List[str], b: str, of_b: List[str]) -> str:
    lacking = [_show([n for n in x if n not in y]) for x, y in ((of_b, of_a), (of_a, of_b))]
    how = ", ".join(f"{d!r} lacks {names}" for d, names in zip((a, b), lacking) if names)
    return (
        f"the {key} of {a!r} are {_show(of_a)}, and those of {b!r} {_show(of_b)}: "
        f"{how or 'they are in another order'}. The datasets of a run must have the same ones in "
        "the same order, which is that of the ids of the categories"
    )


def _show(classes: Sequence[str]) -> str:
    hidden = len(classes) - _MAX_SHOWN_CLASSES
    shown = [repr(name) if name != name.strip() else name for name in classes]
    return ", ".join(shown[:_MAX_SHOWN_CLASSES]) + (f" and {hidden} more" if hidden > 0 else "")


def _describe_unknown(name: object, registered: List[str]) -> str:
    close = difflib.get_close_matches(str(name), registered, n=5)
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
    if "DETECTRON2_DATASETS" in os.environ:
        root = f"DETECTRON2_DATASETS is {os.environ['DETECTRON2_DATASETS']!r}"
    else:
        root = f"DETECTRON2_DATASETS is not set, so it is 'datasets' in {os.getcwd()}"
    return (
        f"{what} ({root}): put the dataset there, or set DETECTRON2_DATASETS to the folder it is in"
    )
