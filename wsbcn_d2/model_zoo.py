"""The configs of this package by their name, wherever the package is installed."""

import os
from typing import Union

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from .config import add_wsbcn_config

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# In an installed package, and in a checkout.
_FOLDERS = (
    os.path.join(_PACKAGE, "configs"),
    os.path.join(os.path.dirname(_PACKAGE), "configs"),
)
