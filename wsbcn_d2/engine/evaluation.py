"""Evaluators chosen by the type of a dataset."""

import importlib.util
import os
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

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
from pycocotools.cocoeval import COCOeval
from torch import nn

from ..data.coco_format import coco_file, complete

# How many detections of a class in an image count.
COCO_MAX_DETECTIONS = 100
AP_AT_100 = f"AP@{COCO_MAX_DETECTIONS}"  # COCO's AP, where more count
_COCO_MAX_DETECTIONS_OF_KEYPOINTS = 20
_LVIS_MAX_DETECTIONS = 300
_UNLIMITED = 10**6


class CocoFileEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator for files as people have them.

    - a file that is not in COCO's format is an error that says so;
    - annotations may lack ``iscrowd``, ``area`` and ``num_keypoints``, and their ids may start at
      0: see :func:`wsbcn_d2.data.coco_format.complete`;
    - with more than 100 detections per image, which COCO would cut off, all count, and ``AP@100``
      is COCO's AP. That of keypoints always counts 20, and says so where there are more objects;
    - detections of classes that the dataset does not have are left out;
    - a file whose list of annotations is empty is as one without: nothing is evaluated;
    - it need not have been read as a dataset before.
    """

    def __init__(self, dataset_name: str, max_detections: int = -1, **kwargs: Any) -> None:
        """
        Args:
            dataset_name: name of a registered dataset.
            max_detections: ``TEST.DETECTIONS_PER_IMAGE``; negative: unlimited.
            kwargs: those of COCOEvaluator.

        Raises:
            ValueError: if the annotations are not in COCO's format.
        """
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file:  # else Detectron2 writes one
            coco_file(json_file)
        super().__init__(dataset_name, **kwargs)
        self._prepare()
        self._more = max_detections < 0 or max_detections > COCO_MAX_DETECTIONS
        if self._more:
            limit = max_detections if max_detections > 0 else _UNLIMITED
            self._max_dets_per_image = [1, COCO_MAX_DETECTIONS, limit]

    def _prepare(self) -> None:
        complete(self._coco_api, coco_file(self._metadata.json_file))
        self._do_evaluation = bool(self._coco_api.anns)
        # Detectron2 notes it when it reads the dataset; without, it takes classes for categories.
        if not self._metadata.get("thing_dataset_id_to_contiguous_id"):
            ids = {id_: i for i, id_ in enumerate(sorted(self._coco_api.getCatIds()))}
            self._metadata.thing_dataset_id_to_contiguous_id = ids

    def process(self, inputs: Any, outputs: Any) -> None:
        known = len(self._metadata.get("thing_classes", ()))
        if known:
            outputs = [
                {**o, "instances": o["instances"][o["instances"].pred_classes < known]}
                if "instances" in o
                else o
                for o in outputs
            ]
        super().process(inputs, outputs)

    def _derive_coco_results(
        self, coco_eval: Optional[COCOeval], iou_type: str, class_names: Optional[List[str]] = None
    ) -> Dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "keypoints":
            self._say_what_counts()
        if self._more and coco_eval is not None and iou_type != "keypoints":
            # (IoU, recall, class, area, limit); -1 where there are no objects
            precision = coco_eval.eval["precision"][..., 0, 1]
            precision = precision[precision > -1]
            at_100 = float(precision.mean()) * 100 if precision.size else float("nan")
            self._logger.info(f"{AP_AT_100} for {iou_type}: {at_100:.3f}")
            results[AP_AT_100] = at_100
        return results

    def _say_what_counts(self) -> None:
        annotations = self._coco_api.anns.values()
        objects = Counter(a["image_id"] for a in annotations if a.get("num_keypoints"))
        most = max(objects.values(), default=0)
        if most > _COCO_MAX_DETECTIONS_OF_KEYPOINTS:
            self._logger.warning(
                f"There are up to {most} objects with keypoints in an image, and COCO's AP of "
                f"keypoints counts the {_COCO_MAX_DETECTIONS_OF_KEYPOINTS} detections of an image "
                "with the highest scores only, whatever TEST.DETECTIONS_PER_IMAGE is"
            )


def detections_per_image(model: nn.Module) -> int:
    """How many detections of an image a model of Detectron2 returns at most; negative: all."""
    names = ("test_topk_per_image", "max_detections_per_image")
    found = [getattr(m, name) for m in model.modules() for name in names if hasattr(m, name)]
    return min(found) if any(n < 0 for n in found) else max(found, default=COCO_MAX_DETECTIONS)


class _Settings(NamedTuple):
    folder: str
    max_detections: int
    oks_sigmas: Sequence[float]


def _coco(name: str, settings: _Settings) -> DatasetEvaluator:
    return CocoFileEvaluator(
        name,
        settings.max_detections,
        output_dir=settings.folder,
        kpt_oks_sigmas=settings.oks_sigmas,
    )


def _sem_seg(name: str, settings: _Settings) -> DatasetEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=settings.folder)


def _panoptic(name: str, settings: _Settings) -> DatasetEvaluator:
    return COCOPanopticEvaluator(name, settings.folder)


def _lvis(name: str, settings: _Settings) -> DatasetEvaluator:
    limit = settings.max_detections
    if limit >= 0:
        limit = max(limit, _LVIS_MAX_DETECTIONS)
    return LVISEvaluator(name, output_dir=settings.folder, max_dets_per_image=limit)


# Keys are the `evaluator_type` of Detectron2's dataset metadata.
_EVALUATORS: Dict[str, List[Callable[[str, _Settings], DatasetEvaluator]]] = {
    "coco": [_coco],
    "coco_panoptic_seg": [_sem_seg, _coco, _panoptic],
    "sem_seg": [_sem_seg],
    "lvis": [_lvis],
    "pascal_voc": [lambda name, _: PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": [lambda name, _: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, _: CityscapesSemSegEvaluator(name)],
}


# What some of them import when they see the first image.
_PACKAGES = {
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
}


def check_evaluator(dataset_name: str) -> None:
    """Raises ValueError if a registered dataset has no evaluator, or that lacks a package."""
    package = _PACKAGES.get(_evaluator_type(dataset_name), "torch")
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"the evaluator of {dataset_name!r} needs the package {package}")


def _evaluator_type(dataset_name: str) -> str:
    evaluator_type: Optional[str] = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in _EVALUATORS:
        raise ValueError(
            f"no evaluator for dataset {dataset_name!r} with evaluator_type {evaluator_type!r}; "
            f"its metadata must name one of {', '.join(_EVALUATORS)}"
        )
    return evaluator_type


def build_evaluator(
    dataset_name: str,
    output_folder: str,
    *,
    max_detections: int = COCO_MAX_DETECTIONS,
    oks_sigmas: Sequence[float] = (),
) -> DatasetEvaluator:
    """The evaluator of a registered dataset, by the ``evaluator_type`` of its metadata.

    Args:
        dataset_name: name of a dataset registered with Detectron2.
        output_folder: where the predictions and results are written.
        max_detections: how many detections of an image count, ``TEST.DETECTIONS_PER_IMAGE``;
            negative: all. Not fewer than the metric itself has: 100 in COCO's, 300 in LVIS's.
        oks_sigmas: for keypoints, ``TEST.KEYPOINT_OKS_SIGMAS``; none: those of COCO's 17.

    Raises:
        ValueError: if there is no evaluator for the type, or the annotations are not in COCO's
            format.
    """
    evaluator_type = _evaluator_type(dataset_name)
    settings = _Settings(output_folder, max_detections, oks_sigmas)
    evaluators = [build(dataset_name, settings) for build in _EVALUATORS[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def inference_folder(output_dir: str) -> str:
    """Where the evaluation of a run in ``output_dir`` puts its files."""
    return os.path.join(output_dir, "inference")
