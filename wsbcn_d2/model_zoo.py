"""The configs of this repository by name, also where the package has been installed from a wheel.

    from wsbcn_d2 import model_zoo
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_bcn_ws_2x_1img.yaml")
"""

import difflib
from pathlib import Path
from typing import Union

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from .config import add_wsbcn_config

_PACKAGE = Path(__file__).resolve().parent
# Within an installed package, where setup.py puts them, or beside the package in a checkout.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def get_config_file(config_path: str) -> str:
    """
    Args:
        config_path: name of a config relative to ``configs/``, for example
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_bcn_ws_2x_1img.yaml".

    Returns:
        The absolute path of the file.

    Raises:
        FileNotFoundError: if there is none of this name. The message has similar ones.
    """
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"this installation of wsbcn_d2 has no configs: there is neither {_FOLDERS[0]} nor "
            f"{_FOLDERS[1]}"
        )
    path = folder / config_path
    if not path.is_file():
        names = [
            file.relative_to(folder).as_posix()
            for file in folder.rglob("*.*")
            if file.suffix in (".yaml", ".py")
        ]
        close = difflib.get_close_matches(config_path, names, n=3)
        raise FileNotFoundError(
            f"there is no config {config_path!r} in {folder}"
            + (f"; close to it are {', '.join(close)}" if close else "")
        )
    return str(path)


def get_config(config_path: str) -> Union[CfgNode, DictConfig]:
    """
    Args:
        config_path: see :func:`get_config_file`. The YAML configs of PointRend, DeepLab and
            Panoptic-DeepLab have keys that these projects add; to read one, merge
            ``get_config_file(...)`` into a config with those keys.

    Returns:
        The config: a CfgNode with the keys of :func:`wsbcn_d2.add_wsbcn_config` for a YAML file, a
        DictConfig for a LazyConfig (``.py``).

    Raises:
        FileNotFoundError: see :func:`get_config_file`.
        KeyError: if it has keys of a project.
    """
    path = get_config_file(config_path)
    if path.endswith(".py"):
        return LazyConfig.load(path)
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    try:
        cfg.merge_from_file(path)
    except KeyError as error:
        raise KeyError(
            f"{config_path} has a key that a project adds ({error.args[0]}): merge "
            "get_config_file(...) into a config with the keys of the project"
        ) from error
    return cfg
