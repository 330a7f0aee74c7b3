"""Datasets: registration of those of a config, and checks."""

from .builtin import (
    annotation_facts,
    check_datasets,
    check_images,
    check_same_classes,
    register_coco_format,
)

__all__ = [
    "annotation_facts",
    "check_datasets",
    "check_images",
    "check_same_classes",
    "register_coco_format",
]
