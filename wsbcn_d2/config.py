"""Config keys of this package."""

from detectron2.config import CfgNode as CN


def add_wsbcn_config(cfg: CN) -> None:
    """Adds the keys of this package to a Detectron2 config, in place.

    Normalization and weight standardization need none of them: they are chosen by Detectron2's own
    ``NORM`` keys.
    """
    cfg.MODEL.WSBCN = CN()
    # Whether the trainable blocks of the wsbcn backbones keep only their inputs in training and
    # are computed again in the backward pass: less memory, more time, the same result.
    cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS = False
