"""The configs of this repository by name, also where the package has been installed from a wheel.

    from wsbcn_d2 import model_zoo
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_bcn_ws_2x_1img.yaml")
"""

import difflib
import importlib
from pathlib import Path
from typing import Union

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from .config import ConfigError, add_wsbcn_config

_PACKAGE = Path(__file__).resolve().parent
# Within an installed package, where setup.py puts them, or beside the package in a checkout.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

# Projects of Detectron2 whose configs have keys of their own, and what adds these.
_PROJECTS = {
    "point_rend": "add_pointrend_config",
    "deeplab": "add_deeplab_config",
    "panoptic_deeplab": "add_panoptic_deeplab_config",
}


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
        config_path: see :func:`get_config_file`.

    Returns:
        The config: a CfgNode with the keys of :func:`wsbcn_d2.add_wsbcn_config` for a YAML file,
        and with those of PointRend, DeepLab or Panoptic-DeepLab if it is for one of them, which is
        then imported; a DictConfig for a LazyConfig (``.py``).

    Raises:
        FileNotFoundError: see :func:`get_config_file`.
        ConfigError: if it is for a project that cannot be imported.
    """
    path = get_config_file(config_path)
    if path.endswith(".py"):
        return LazyConfig.load(path)
    unknown, missing = "", []
    for project in (None, *_PROJECTS):
        cfg = get_cfg()
        add_wsbcn_config(cfg)
        try:
            if project is not None:
                module = importlib.import_module(f"detectron2.projects.{project}")
                getattr(module, _PROJECTS[project])(cfg)
            cfg.merge_from_file(path)
            return cfg
        except KeyError as error:  # a key that is unknown
            unknown = unknown or str(error.args[0])
        except ImportError as error:
            missing.append(f"detectron2.projects.{project} cannot be imported: {error}")
    why = "; ".join(missing or [unknown])
    raise ConfigError(f"{config_path} has keys of a project of Detectron2, and {why}")
