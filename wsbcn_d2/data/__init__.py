"""Datasets: importing this package registers ``digits_train`` and ``digits_val``."""

from .builtin import check_datasets, default_digits_root, register_coco_format, register_digits
from .digits import make_digits_dataset

__all__ = [
    "check_datasets",
    "default_digits_root",
    "make_digits_dataset",
    "register_coco_format",
    "register_digits",
]
