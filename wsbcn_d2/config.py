"""Config keys of this package."""

from typing import Any, Dict, Mapping

from detectron2.config import CfgNode as CN


class ConfigError(ValueError):
    """A config that cannot be run, with a message for the person who wrote it."""


def add_wsbcn_config(cfg: CN) -> None:
    """Adds the keys of this package to a Detectron2 config, in place.

    Normalization and weight standardization need none of them: they are chosen by Detectron2's own
    ``NORM`` keys.
    """
    cfg.MODEL.WSBCN = CN()
    # Which parts keep only their inputs in training, and are computed again in the backward pass:
    # "" (none), "backbone" (its residual blocks) or "all" (FPN and heads, too). Less memory, more
    # time, the same result, whatever the norm; docs/memory.md has how much. Trainers other than
    # that of this package heed it in the wsbcn backbones only, and call
    # wsbcn_d2.checkpoint_activations_(model, "all") for the rest.
    cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS = ""
    # Whether the residual blocks of the wsbcn backbones begin as the identity: the last
    # normalization of each, and so its branch, is multiplied by 0. For training from random
    # weights; pretrained weights replace it. Norms must have a trainable weight.
    cfg.MODEL.WSBCN.ZERO_INIT_RESIDUAL = False
    # How the update rate of the estimates, which is that of the norm option (0.1 unless it says
    # otherwise, as "BCN(update_rate=0.01)" does), changes in training: "constant", or "lr": in
    # proportion to the learning rate.
    cfg.MODEL.WSBCN.UPDATE_RATE_SCHEDULE = "constant"
    # Whether the estimates start as a plain average of the first batches. For training from random
    # weights; a pretrained model's estimates would be forgotten with the first batch.
    cfg.MODEL.WSBCN.UPDATE_RATE_WARMUP = False
    # With several processes, the estimates are averaged over them every so many iterations.
    # 0: never; every process then normalizes with its own, and those of the first are saved.
    cfg.MODEL.WSBCN.SYNC_PERIOD = 1
    # Training stops if a layer has been fed with infinity or NaN for so many iterations. 0: never.
    cfg.MODEL.WSBCN.MAX_SKIPPED_UPDATES = 100
    # Recalibration: the estimates are computed anew from this many training images (over all
    # processes) before every evaluation and at the end, as TEST.PRECISE_BN does for BatchNorm. They
    # are kept in memory meanwhile, an image of COCO in 3 MB.
    cfg.TEST.PRECISE_BCN = CN({"ENABLED": False, "NUM_IMAGES": 200})
    # Datasets in COCO's format to register, so that they can be named in DATASETS.TRAIN and TEST:
    # each a name, the annotation file, and the folder of the images. $DETECTRON2_DATASETS in a path
    # is the folder of Detectron2's builtin datasets: "datasets" if the variable is not set.
    cfg.DATASETS.COCO_FORMAT = ()
    # Pairs of names of keypoints that a horizontal flip exchanges: (("left_eye", "right_eye"),).
    # (): those in the metadata of the datasets, or by names that say left and right.
    cfg.DATASETS.KEYPOINT_FLIP_MAP = ()
    # Number of batches of SOLVER.IMS_PER_BATCH images whose gradients make one step. Learning rate,
    # schedule and iterations count steps.
    cfg.SOLVER.ACCUMULATE_STEPS = 1


def changed(cfg: CN, *opts: Any) -> CN:
    """A copy of a config with other values; ``opts`` are keys and values in turn."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(opts))
    return cfg


def require_wsbcn_config(cfg: CN) -> None:
    """Raises KeyError if the config lacks the keys of :func:`add_wsbcn_config`."""
    if "WSBCN" not in cfg.MODEL:
        raise KeyError(
            "MODEL.WSBCN is missing: call wsbcn_d2.add_wsbcn_config(cfg) after get_cfg()"
        )


def flatten_config(cfg: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    """The leaves of a config, by keys like ``MODEL.FPN.NORM``, behind ``prefix``."""
    flat: Dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, dict):  # as CfgNode is
            flat.update(flatten_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
