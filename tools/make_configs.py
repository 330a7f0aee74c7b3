#!/usr/bin/env python
"""Writes the configs that are combinations: model x backbone x norm x schedule x images per GPU.

A model is described once, in a ``Base-*.yaml`` file; a backbone with its norm, its weights and
their input format once, in ``configs/_base_/backbones``; a schedule once, in the table below. The
files that this writes name the former two and state the learning rate and iterations of the third.
To change one, change what it is made of, and run this again. Files for which there is no
combination are left alone.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from wsbcn_d2.engine.checkpoint import atomic_write

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

NUM_GPUS = 8
NORMS = ("gn", "gn_ws", "bcn", "bcn_ws")
BACKBONES = ("R_50", "R_101", "X_50_32x4d", "X_101_32x4d")


@dataclass(frozen=True)
class Schedule:
    """A schedule for batches of 16 images; other batches follow the linear rule.

    Attributes:
        learning_rate: its base value.
        iterations: those of the decays by 10, and the last one. A single one: no such decays.
    """

    learning_rate: float
    iterations: Tuple[int, ...]

    def solver(self, images: int) -> str:
        """The section SOLVER of a config.

        Args:
            images: per batch. The learning rate is proportional to it, and as many images are
                seen between two decays.
        """
        *steps, end = (iteration * 16 // images for iteration in self.iterations)
        lines = [f"IMS_PER_BATCH: {images}", f"BASE_LR: {self.learning_rate * images / 16}"]
        if steps:
            lines.append(f"STEPS: ({', '.join(map(str, steps))}{',' * (len(steps) == 1)})")
        lines.append(f"MAX_ITER: {end}")
        return "SOLVER:\n" + "".join(f"  {line}\n" for line in lines)


# Those of R-CNN models on COCO.
#   1x, 3x, 9x  Detectron2's (MODEL_ZOO.md; 9x: configs/Misc/scratch_mask_rcnn_R_50_FPN_9x_gn.yaml)
#   2x          the authors' (see configs/COCO-InstanceSegmentation/Base-Mask-RCNN-R50-FPN.yaml)
#   20-23-24e   that of the paper, as mmdetection has it (configs/gn+ws): 24 epochs of 7,330
#               iterations, decays after the 20th and the 23rd
COCO: Dict[str, Schedule] = {
    "1x": Schedule(0.02, (60000, 80000, 90000)),
    "2x": Schedule(0.02, (150000, 170000, 180000)),
    "20-23-24e": Schedule(0.02, (20 * 7330, 23 * 7330, 24 * 7330)),
}
SCRATCH: Dict[str, Schedule] = {
    "3x": Schedule(0.02, (210000, 250000, 270000)),
    "9x": Schedule(0.02, (750000, 790000, 810000)),
}
ONE_X = {"1x": COCO["1x"]}
RETINANET = {"1x": Schedule(0.01, COCO["1x"].iterations)}
LVIS = {"1x": Schedule(0.02, (120000, 160000, 180000))}
# Epochs of other datasets: of 2,975 images (Cityscapes) and 16,551 (Pascal VOC).
VOC = {"17e": Schedule(0.02, (12000, 16000, 18000))}
CITYSCAPES_INSTANCE = {"65e": Schedule(0.02, (9000, 12000))}
CITYSCAPES_SEMANTIC = {"699e": Schedule(0.005, (80000, 110000, 130000))}
DEEPLAB = {"484e": Schedule(0.01, (90000,))}
PANOPTIC_DEEPLAB = {"968e": Schedule(0.0005, (180000,))}


@dataclass(frozen=True)
class Family:
    """The configs of one model.

    Attributes:
        name: of the files below ``configs``, up to the norm.
        bases: what the files inherit from, the last one having the last word. ``{backbone}`` and
            ``{norm}`` stand for those of the file.
        schedules: by the name that they have in file names.
        backbones: those with files in ``configs/_base_/backbones``.
    """

    name: str
    bases: Tuple[str, ...]
    schedules: Dict[str, Schedule]
    backbones: Tuple[str, ...] = ("R_50",)


_BACKBONE = "../_base_/backbones/{backbone}_{norm}.yaml"


def _family(
    folder: str, name: str, base: str, schedules: Dict[str, Schedule], *backbones: str
) -> Family:
    return Family(f"{folder}/{name}", (base, _BACKBONE), schedules, backbones or ("R_50",))


FAMILIES: List[Family] = [
    Family(
        "COCO-InstanceSegmentation/mask_rcnn_{backbone}_FPN",
        ("Base-Mask-RCNN-R50-FPN-{norm}.yaml",),
        COCO,
    ),
    _family(
        "COCO-InstanceSegmentation",
        "mask_rcnn_{backbone}_FPN",
        "Base-Mask-RCNN-FPN.yaml",
        COCO,
        *BACKBONES[1:],
    ),
    _family("COCO-InstanceSegmentation", "mask_rcnn_R_50_C4", "Base-Mask-RCNN-C4.yaml", ONE_X),
    Family(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5",
        (_BACKBONE, "Base-Mask-RCNN-DC5.yaml"),  # whose box head has no place for the norm
        ONE_X,
    ),
    _family(
        "COCO-Detection",
        "faster_rcnn_{backbone}_FPN",
        "Base-Faster-RCNN-FPN.yaml",
        COCO,
        *BACKBONES,
    ),
    _family("COCO-Detection", "retinanet_R_50_FPN", "Base-RetinaNet-FPN.yaml", RETINANET),
    _family("COCO-Keypoints", "keypoint_rcnn_R_50_FPN", "Base-Keypoint-RCNN-FPN.yaml", ONE_X),
    _family("COCO-PanopticSegmentation", "panoptic_fpn_R_50", "Base-Panoptic-FPN.yaml", ONE_X),
    _family("LVISv1-InstanceSegmentation", "mask_rcnn_R_50_FPN", "Base-Mask-RCNN-FPN.yaml", LVIS),
    _family("PascalVOC-Detection", "faster_rcnn_R_50_FPN", "Base-Faster-RCNN-FPN.yaml", VOC),
    _family("PascalVOC-Detection", "faster_rcnn_R_50_C4", "Base-Faster-RCNN-C4.yaml", VOC),
    _family("Cityscapes", "mask_rcnn_R_50_FPN", "Base-Mask-RCNN-FPN.yaml", CITYSCAPES_INSTANCE),
    _family("Cityscapes", "semantic_R_50_FPN", "Base-Semantic-FPN.yaml", CITYSCAPES_SEMANTIC),
    _family("Cityscapes", "deeplab_v3_plus_R_103", "Base-DeepLabV3-Plus.yaml", DEEPLAB, "R_103"),
    _family(
        "Cityscapes",
        "panoptic_deeplab_R_52",
        "Base-Panoptic-DeepLab.yaml",
        PANOPTIC_DEEPLAB,
        "R_52",
    ),
    _family("Misc", "cascade_mask_rcnn_R_50_FPN", "Base-Cascade-Mask-RCNN-FPN.yaml", ONE_X),
    *(
        _family(
            "Misc",
            f"mask_rcnn_R_50_FPN_{kind}_c3-c5",
            f"Base-Mask-RCNN-FPN-{kind}_c3-c5.yaml",
            ONE_X,
        )
        for kind in ("dconv", "mdconv")
    ),
    Family(
        "Misc/scratch_mask_rcnn_R_50_FPN",
        (
            "../COCO-InstanceSegmentation/Base-Mask-RCNN-FPN.yaml",
            _BACKBONE,
            "../_base_/scratch.yaml",
        ),
        SCRATCH,
    ),
    _family("Misc", "pointrend_rcnn_R_50_FPN", "Base-PointRend-RCNN-FPN.yaml", ONE_X),
]


def combinations() -> Dict[Path, str]:
    """The text of every such config, by its path."""
    files: Dict[Path, str] = {}
    for family in FAMILIES:
        for backbone, norm, (schedule_name, schedule), images in itertools.product(
            family.backbones, NORMS, family.schedules.items(), (1, 2)
        ):
            name = f"{family.name}_{{norm}}_{schedule_name}_{images}img.yaml"
            parts = [f'"{base}"' for base in family.bases]
            base = parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"
            text = f"_BASE_: {base}\n" + schedule.solver(NUM_GPUS * images)
            fields = {"{backbone}": backbone, "{norm}": norm}
            for field, value in fields.items():
                name, text = name.replace(field, value), text.replace(field, value)
            files[CONFIGS / name] = text
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, name the files that are missing or differ, exit with 1 if there are",
    )
    args = parser.parse_args()
    files = combinations()
    stale = [p for p, text in files.items() if not p.is_file() or p.read_text() != text]
    for path in stale:
        print(path.relative_to(CONFIGS.parent))
        if not args.check:
            with atomic_write(str(path), "w") as file:
                file.write(files[path])
    print(f"{len(files)} configs, {len(stale)} {'stale' if args.check else 'written'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
