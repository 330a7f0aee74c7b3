"""Average precision of resampled sets of images, exactly as pycocotools computes it.

pycocotools evaluates in two steps: detections are matched to the ground truth image by image
(``evaluate``), then the matches of all images are sorted by score and accumulated to curves of
precision over recall (``accumulate``). Only the second depends on which images there are. So the
bootstrap matches once, by pycocotools itself, and repeats the second step with every image counted
as often as it was drawn, for many draws at a time.
"""

import contextlib
import copy
import io
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco_format import NO_COCO_RESULT, is_coco_result, is_run_length_encoded

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
IOU_TYPES = {"bbox": "box", "segm": "mask"}  # the name of pycocotools, and that of papers

# Elements of the largest temporary array, (draws, detections of a class).
_MAX_ELEMENTS = 4_000_000


def resample_images(num_images: int, num_draws: int, seed: int = 0) -> np.ndarray:
    """Draws of the bootstrap: how often each image occurs in each.

    Runs that are evaluated with the same draws are compared image by image (paired).

    Args:
        num_images: size of the dataset, and of each draw (with replacement).
        num_draws: number of draws.
        seed: of the random generator.

    Returns:
        (num_draws, num_images), int64; each row sums to ``num_images``.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_draws)


class CocoEvaluation:
    """The detections of one run matched to the ground truth, for one type of IoU.

    Attributes:
        image_ids: of all images of the dataset, in the order of the weights of :meth:`evaluate`.
        class_names: in the order of category ids.
    """

    def __init__(
        self,
        ground_truth: COCO,
        predictions: Sequence[Dict[str, Any]],
        iou_type: str,
        max_detections: int = 100,
    ) -> None:
        """
        Args:
            ground_truth: the dataset, from :func:`wsbcn_d2.data.coco_format.load_coco` if it need
                not be complete.
            predictions: detections in COCO's result format. None at all is an AP of 0.
            iou_type: "bbox" or "segm". As in Detectron2, the size of a detection that decides
                whether it is small, medium or large is that of its mask for "segm".
            max_detections: how many detections of a class in an image count, those of the highest
                scores; COCO's number by default.

        Raises:
            ValueError: if a prediction is not in that format, or of an image or a class that the
                dataset lacks, or its mask is not run-length encoded or of another size than the
                image, or the dataset has no categories.
        """
        if not ground_truth.getCatIds():
            raise ValueError("the annotations have no categories")
        image_ids, category_ids = set(ground_truth.getImgIds()), set(ground_truth.getCatIds())
        for index, prediction in enumerate(predictions):
            if not is_coco_result(prediction):
                raise ValueError(f"prediction {index} {NO_COCO_RESULT}: {repr(prediction)[:200]}")
            if prediction["image_id"] not in image_ids:
                raise ValueError(
                    f"there are predictions for image_id {prediction['image_id']!r}, which is not "
                    "in the dataset"
                )
            if prediction["category_id"] not in category_ids:
                raise ValueError(
                    f"there are predictions of category_id {prediction['category_id']!r}, which is "
                    "not in the dataset"
                )
            if iou_type == "segm":
                _check_mask(index, prediction, ground_truth.imgs[prediction["image_id"]])
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by print
            judge = COCOeval(ground_truth, _detections(ground_truth, predictions, iou_type))
            judge.params.iouType = iou_type
            judge.params.maxDets = [max_detections]
            judge.evaluate()
        params = judge._paramsEval
        self._iou_thresholds = params.iouThrs
        self._recall_thresholds = params.recThrs
        self._areas = list(params.areaRngLbl)
        self.image_ids: List[Any] = list(params.imgIds)
        self.class_names: List[str] = [
            category["name"] for category in ground_truth.loadCats(params.catIds)
        ]
        matches = iter(judge.evalImgs)  # by class, area and image
        self._cells = [
            [_Cell.collect([next(matches) for _ in self.image_ids]) for _ in self._areas]
            for _ in params.catIds
        ]

    def evaluate(self, weights: Optional[np.ndarray] = None) -> Dict[str, np.ndarray]:
        """AP of sets of images.

        Args:
            weights: (draws, images), integers: how often each image occurs. The copies of an image
                follow one another, which matters where scores are equal. Default: each image once,
                which gives the numbers of pycocotools to the last digit.

        Returns:
            AP, AP50, AP75, APs, APm, APl, and "AP-<class>" for each class, in percent, as
            (draws,); NaN where the images have no such objects.
        """
        if weights is None:
            weights = np.ones((1, len(self.image_ids)), np.int64)
        chunks = [self._evaluate(chunk) for chunk in self._chunks(np.asarray(weights))]
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _chunks(self, weights: np.ndarray) -> Iterator[np.ndarray]:
        entries = max((cell.num_entries for cells in self._cells for cell in cells), default=1)
        curve = len(self._iou_thresholds) * len(self._recall_thresholds) * len(self._cells)
        size = max(1, _MAX_ELEMENTS // max(entries, curve, 1))
        for start in range(0, len(weights), size):
            yield weights[start : start + size]

    def _evaluate(self, weights: np.ndarray) -> Dict[str, np.ndarray]:
        metrics = {}
        for index, area in enumerate(self._areas):
            precision = np.stack(
                [
                    cells[index].precision(
                        weights, len(self._iou_thresholds), self._recall_thresholds
                    )
                    for cells in self._cells
                ],
                axis=-1,
            )  # (draws, IoU thresholds, recall thresholds, classes)
            if area == "all":
                metrics["AP"] = _mean(precision)
                for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
                    at = np.flatnonzero(np.isclose(self._iou_thresholds, threshold))
                    metrics[name] = _mean(precision[:, at])
                for k, name in enumerate(self.class_names):
                    metrics[f"AP-{name}"] = _mean(precision[..., k])
            else:
                metrics[f"AP{area[0]}"] = _mean(precision)
        return metrics


def _check_mask(index: int, prediction: Dict[str, Any], image: Dict[str, Any]) -> None:
    mask = prediction.get("segmentation")
    size = [image["height"], image["width"]]
    if not is_run_length_encoded(mask) or list(mask["size"]) != size:
        found = "none" if mask is None else repr(mask)[:100]
        raise ValueError(
            f"prediction {index}: the mask must be run-length encoded, as COCOEvaluator writes it, "
            f"with the size of image {prediction['image_id']!r}, {size}; found {found}"
        )


def _detections(ground_truth: COCO, predictions: Sequence[Dict[str, Any]], iou_type: str) -> COCO:
    if not predictions:  # which loadRes does not take
        empty = COCO()
        empty.dataset = {**ground_truth.dataset, "annotations": []}
        empty.createIndex()
        return empty
    predictions = copy.deepcopy(list(predictions))  # loadRes writes into them
    if iou_type == "segm":
        for prediction in predictions:
            prediction.pop("bbox", None)
    return ground_truth.loadRes(predictions)


def _mean(precision: np.ndarray) -> np.ndarray:
    """The mean, in percent, of what is defined (not -1), for each index of the first axis.

    In the order and by the summation of pycocotools, so that not even rounding differs.
    """
    defined = [draw[draw > -1] for draw in precision]
    return np.array([np.mean(values) * 100 if values.size else np.nan for values in defined])


@dataclass(frozen=True)
class _Cell:
    """The detections of one class in one range of areas, sorted by score.

    Attributes:
        num_objects: (images,), ground truth that counts.
        image: (entries,), index of the image.
        true, false: (IoU thresholds, entries); neither: ignored.
        tied: (entries,), number of the run of detections of equal score in one image, in order;
            None if there are no two. Of n copies of an image, each has the whole run.
    """

    num_objects: np.ndarray
    image: np.ndarray
    true: np.ndarray
    false: np.ndarray
    tied: Optional[np.ndarray]

    @property
    def num_entries(self) -> int:
        return len(self.image)

    @classmethod
    def collect(cls, matches: Sequence[Optional[Dict[str, Any]]]) -> "_Cell":
        """From the dictionaries of pycocotools, one for each image."""
        num_objects = np.array(
            [0 if match is None else np.count_nonzero(match["gtIgnore"] == 0) for match in matches]
        )
        present = [(i, match) for i, match in enumerate(matches) if match is not None]
        if not present:
            nothing = np.zeros((1, 0), bool)
            return cls(num_objects, np.zeros(0, int), nothing, nothing, None)
        scores = np.concatenate([match["dtScores"] for _, match in present])
        image = np.concatenate([np.full(len(match["dtScores"]), i) for i, match in present])
        order = np.argsort(-scores, kind="mergesort")  # stable, as in pycocotools
        matched = np.concatenate([match["dtMatches"] for _, match in present], axis=1)[:, order]
        ignored = np.concatenate([match["dtIgnore"] for _, match in present], axis=1)[:, order]
        scores, image = scores[order], image[order].astype(int)
        counted = ~ignored.astype(bool)
        true, false = (matched > 0) & counted, (matched == 0) & counted
        starts = np.ones(len(scores), bool)
        starts[1:] = (scores[1:] != scores[:-1]) | (image[1:] != image[:-1])
        tied = None if starts.all() else np.cumsum(starts) - 1
        return cls(num_objects, image, true, false, tied)

    def precision(
        self, weights: np.ndarray, num_thresholds: int, recall_thresholds: np.ndarray
    ) -> np.ndarray:
        """The largest precision at each recall or above.

        Args:
            weights: (draws, images).
            num_thresholds: of the IoU.
            recall_thresholds: (R,).

        Returns:
            (draws, IoU thresholds, R); -1 for draws without an object.
        """
        draws = len(weights)
        result = np.zeros((draws, num_thresholds, len(recall_thresholds)))
        objects = weights @ self.num_objects
        index, counts = self._entries(weights)
        for t, (true, false) in enumerate(zip(self.true[:, index], self.false[:, index])):
            # Precision rises and recall changes at true positives only.
            at = np.flatnonzero(true)
            if not at.size:
                continue
            tp = np.cumsum(counts[:, at], axis=1, dtype=float)
            fp = np.cumsum(counts * false, axis=1, dtype=float)[:, at]
            recall = tp / np.maximum(objects, 1)[:, None]
            precision = tp / (fp + tp + np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for draw in range(draws):
                first = np.searchsorted(recall[draw], recall_thresholds, side="left")
                reached = first < at.size
                result[draw, t, reached] = precision[draw, first[reached]]
        result[objects == 0] = -1
        return result

    def _entries(self, weights: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Indices of entries in the order of accumulation, and how often each counts, (draws, n).

        An entry usually counts as often as its image occurs. In a run of equal scores the order of
        true and false positives matters, and the second copy of the image comes after the whole run
        of the first: such runs are written out.
        """
        if self.tied is None:
            return np.arange(self.num_entries), weights[:, self.image]
        first = np.flatnonzero(np.diff(self.tied, prepend=-1))
        length = np.diff(first, append=self.num_entries)
        copies = np.where(length > 1, weights.max(initial=0), 1)
        run = np.repeat(np.arange(len(first)), copies)
        copy_number = np.concatenate([np.arange(n) for n in copies])
        within = np.concatenate([np.arange(n) for n in length[run]])
        index = np.repeat(first[run], length[run]) + within
        copy_number = np.repeat(copy_number, length[run])
        written_out = np.repeat(length[run] > 1, length[run])
        counts = weights[:, self.image[index]]
        return index, np.where(written_out, counts > copy_number, counts)
