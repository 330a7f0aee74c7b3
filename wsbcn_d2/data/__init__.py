"""Datasets: importing this package registers ``digits_train`` and ``digits_val``."""

from .builtin import (
    annotation_facts,
    check_datasets,
    check_same_classes,
    default_digits_root,
    register_coco_format,
    register_digits,
)
from .digits import make_digits_dataset

__all__ = [
    "annotation_facts",
    "check_datasets",
    "check_same_classes",
    "default_digits_root",
    "make_digits_dataset",
    "register_coco_format",
    "register_digits",
]
