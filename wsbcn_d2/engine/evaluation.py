"""Evaluators chosen by the type of a dataset."""

import os
from typing import Callable, Dict, List, Optional

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

_Factory = Callable[[str, str], DatasetEvaluator]


def _coco(name: str, folder: str) -> DatasetEvaluator:
    return COCOEvaluator(name, output_dir=folder)


def _sem_seg(name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


def _lvis(name: str, folder: str) -> DatasetEvaluator:
    return LVISEvaluator(name, output_dir=folder)


# Keys are the `evaluator_type` of Detectron2's dataset metadata.
_EVALUATORS: Dict[str, List[_Factory]] = {
    "coco": [_coco],
    "coco_panoptic_seg": [_sem_seg, _coco, COCOPanopticEvaluator],
    "sem_seg": [_sem_seg],
    "lvis": [_lvis],
    "pascal_voc": [lambda name, folder: PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": [lambda name, folder: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, folder: CityscapesSemSegEvaluator(name)],
}


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The evaluator of a registered dataset, by the ``evaluator_type`` of its metadata.

    Args:
        dataset_name: name of a dataset registered with Detectron2.
        output_folder: where the predictions and results are written.

    Raises:
        ValueError: if there is no evaluator for the type.
    """
    evaluator_type: Optional[str] = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in _EVALUATORS:
        raise ValueError(
            f"no evaluator for dataset {dataset_name!r} with evaluator_type {evaluator_type!r}; "
            f"its metadata must name one of {', '.join(_EVALUATORS)}"
        )
    evaluators = [build(dataset_name, output_folder) for build in _EVALUATORS[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def inference_folder(output_dir: str) -> str:
    """Where the evaluation of a run in ``output_dir`` puts its files."""
    return os.path.join(output_dir, "inference")
