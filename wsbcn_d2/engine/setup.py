"""From a command line to a checked config."""

import difflib
import os
import re
import traceback
from pathlib import Path
from typing import Any, Iterable, List, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, build_model
from torch import nn

from ..config import ConfigError, add_wsbcn_config, changed, flatten_config
from ..data import register_coco_format
from ..modeling import BACKBONES, CHECKPOINTED, checkpoint_activations_
from ..norm_options import NormOption
from .checkpoint import AtomicCheckpointer, check_output
from .data import check_data
from .evaluation import check_evaluator
from .hooks import UPDATE_RATE_SCHEDULES

# What programs need of a config; see load_config.
TO_TRAIN = ("TRAIN", "TEST", "OUTPUT_DIR")
TO_EVALUATE = ("TEST", "WEIGHTS", "OUTPUT_DIR")

_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# What keys may say, where a program would notice late, or not name the key.
_WORDS = {
    "MODEL.WSBCN.UPDATE_RATE_SCHEDULE": UPDATE_RATE_SCHEDULES,
    "MODEL.WSBCN.CHECKPOINT_ACTIVATIONS": CHECKPOINTED,
    "SOLVER.LR_SCHEDULER_NAME": (
        *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    # Detectron2's loader knows more, for which its config lacks the keys.
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
}
# The least that numbers may be.
_LEAST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.ACCUMULATE_STEPS": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.REPEAT_THRESHOLD": 0,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 1,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 1,
    "TEST.PRECISE_BCN.NUM_IMAGES": 1,
    "MODEL.WSBCN.SYNC_PERIOD": 0,
    "MODEL.WSBCN.MAX_SKIPPED_UPDATES": 0,
}


def load_config(
    config_file: str,
    opts: Iterable[Any] = (),
    *,
    needs: Sequence[str] = TO_TRAIN,
    resume: bool = False,
) -> CfgNode:
    """Reads a config and checks whatever can be checked before a model is built.

    Registers the datasets of ``DATASETS.COCO_FORMAT``. Without a GPU, ``MODEL.DEVICE: "cuda"``
    (Detectron2's default) becomes ``"cpu"``.

    Args:
        config_file: path of a YAML config.
        opts: alternating keys and values that override it.
        needs: what must be there: the data of "TRAIN" and "TEST", "WEIGHTS", and an "OUTPUT_DIR"
            that can be written to.
        resume: whether the run continues from a checkpoint in its output folder, if there is one.

    Raises:
        ConfigError: naming the key or file, what was found and what is allowed.
        ValueError: if ``needs`` has another word.
    """
    unknown = set(needs) - {*TO_TRAIN, *TO_EVALUATE}
    if unknown:
        allowed = ", ".join(sorted({*TO_TRAIN, *TO_EVALUATE}))
        raise ValueError(f"needs: {', '.join(sorted(unknown))}; allowed are {allowed}")
    if not config_file:
        raise ConfigError("--config-file must name a YAML config, as those in configs")
    if config_file.endswith(".py"):
        raise ConfigError(
            f"{config_file} is a LazyConfig; these are for tools/lazyconfig_train_net.py"
        )
    _refuse_lazy_run(config_file)
    opts = list(opts)
    for option in opts:
        if str(option).startswith("--"):
            raise ConfigError(f"{option} must stand before the keys and values, {opts[0]} ...")
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    defaults = flatten_config(cfg)
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(opts)
    except KeyError as error:  # in the file: in the overrides it is an AssertionError
        raise ConfigError(
            f"{config_file}: {_unknown_key(cfg, str(error.args[0]))}. Configs of PointRend, "
            "DeepLab and Panoptic-DeepLab, whose keys these may be, are for the train_net.py of "
            "those projects, as docs/in_your_project.md shows"
        ) from error
    except (AssertionError, OSError, ValueError) as error:
        message = _unknown_key(cfg, str(error))
        if "MODEL.WSBCN.CHECKPOINT_ACTIVATIONS" in message:  # as of a bool, which it was once
            message += f"; allowed are {', '.join(map(repr, CHECKPOINTED))}"
        raise ConfigError(message) from error
    except (AttributeError, RecursionError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{config_file} is not a YAML config of keys and values: {error}"
            + " (is it its own _BASE_?)" * isinstance(error, RecursionError)
        ) from error
    for key, value in flatten_config(cfg).items():  # YACS lets it take the place of any value
        if value is None and defaults.get(key) is not None:
            raise ConfigError(f"{key} is empty, and must have a value, as {defaults[key]!r}")
    _check_norm_options(cfg)
    check_values(cfg)
    if resume:
        _check_groups(cfg)
    try:
        register_coco_format(cfg.DATASETS.COCO_FORMAT)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "OUTPUT_DIR" in needs:
        check_folder("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_weights(
        "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, needed="WEIGHTS" in needs, resume=resume
    )
    if "TEST" in needs:
        _check_evaluation(cfg, alone="TRAIN" not in needs)
    check_data(cfg, [part for part in ("TRAIN", "TEST") if part in needs])
    if "TEST" in needs:
        for name in cfg.DATASETS.TEST:
            try:
                check_evaluator(name)
            except ValueError as error:
                raise ConfigError(f"DATASETS.TEST: {error}") from error
    cfg.MODEL.DEVICE = available_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
    if "TRAIN" in needs:
        check_precision("SOLVER.AMP.ENABLED", cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE)
    return cfg


def available_device(key: str, device: str) -> str:
    """The device of a config, or the CPU instead of a GPU where there is none.

    Raises:
        ConfigError: if it is none.
    """
    try:
        is_gpu = torch.device(device).type == "cuda"
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{key}: {device!r} is not a device, as cuda, cuda:0 or cpu") from error
    return "cpu" if is_gpu and not torch.cuda.is_available() else device


def check_precision(key: str, enabled: bool, device: str) -> None:
    """Raises ConfigError if mixed precision is to run where Detectron2's loop cannot."""
    if enabled and torch.device(device).type != "cuda":
        raise ConfigError(f"{key}: True needs a GPU, and the device is {device!r}")


def check_processes(
    num_gpus: int, num_machines: int, device: str, images: int = 0, reference: int = 0
) -> None:
    """Looks at what a program is to start, before it does.

    Args:
        num_gpus, num_machines: of the command line.
        device: that of the model.
        images: ``SOLVER.IMS_PER_BATCH``; 0: not known.
        reference: ``SOLVER.REFERENCE_WORLD_SIZE``.

    Raises:
        ConfigError: if there are fewer GPUs, the images cannot be shared equally, or something else
            starts the processes.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "torchrun has started this program several times, and each would be a whole run: start "
            "it with python, and --num-gpus N"
        )
    if torch.device(device).type == "cuda" and num_gpus > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"--num-gpus: {num_gpus}, but this machine has {found}")
    processes = reference or max(num_gpus * num_machines, 1)  # --num-gpus 0 is one, too
    if images % processes:
        raise ConfigError(
            f"{images} images per step cannot be shared equally by {processes} processes"
            f"{' (SOLVER.REFERENCE_WORLD_SIZE)' if reference else ''}"
        )


def reason(error: Exception) -> str:
    """What an error says; and, where that is as little as a name, its type and the line of code."""
    if " " in str(error):
        return str(error)
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__} {error}".rstrip() + f" in `{line}`"


def built_model(cfg: CfgNode) -> nn.Module:
    """The model of a config.

    Raises:
        ConfigError: if it cannot be built.
    """
    try:
        return build_model(cfg)
    except (
        ArithmeticError,
        AssertionError,
        ImportError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        keys = [
            key
            for key, value in flatten_config(cfg.MODEL, "MODEL.").items()
            if key.endswith(".NORM") and value and repr(value) in str(error)
        ]
        where = f" ({', '.join(keys)})" if keys else ""
        message = f"the model of the config cannot be built: {reason(error)}{where}"
        raise ConfigError(message) from error


def check_model(cfg: CfgNode, *, resume: bool = False) -> None:
    """Builds the model of a config, on CPU, to see whether that is possible.

    Before anything else is done, so that an error leaves nothing behind.

    Args:
        resume: whether it is to be trained on from the last checkpoint of its output folder, if
            there is one, which is then loaded.

    Raises:
        ConfigError: with the message of the error.
    """
    model = built_model(changed(cfg, "MODEL.DEVICE", "cpu"))
    try:
        checkpoint_activations_(model, cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_resume(model, cfg.OUTPUT_DIR, resume)


def check_resume(model: nn.Module, output_dir: str, resume: bool) -> None:
    """Loads the checkpoint with which a training is to be resumed, before that overwrites a file.

    Raises:
        ConfigError: if it is of another model.
    """
    checkpointer = AtomicCheckpointer(model, output_dir, resumes=True)
    if resume and checkpointer.has_checkpoint():
        checkpointer.load(checkpointer.get_checkpoint_file(), [])


def _check_groups(cfg: CfgNode) -> None:
    """Compares the groups of norms with those of the run that is resumed: a checkpoint would load
    with any."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    try:
        with open(path) as file:
            before = flatten_config(yaml.safe_load(file).get("MODEL", {}), "MODEL.")
    except (AttributeError, OSError, yaml.YAMLError):  # there is none, or it is another program's
        return
    for key, value in flatten_config(cfg.MODEL, "MODEL.").items():
        old = before.get(key)
        if not (key.endswith(".NORM") and value and old and isinstance(old, str)):
            continue
        try:
            groups = (NormOption.parse(old).groups, NormOption.parse(value).groups)
        except ValueError:
            continue
        if None not in groups and groups[0] != groups[1]:
            raise ConfigError(
                f"--resume: {key} is {value!r}, but the run in {cfg.OUTPUT_DIR!r} has {old!r}; the "
                "groups must be the same"
            )


def _refuse_lazy_run(config_file: str) -> None:
    """The config.yaml in the folder of a LazyConfig's run is none of Detectron2's YAML configs."""
    if not os.path.isfile(config_file):
        return
    try:
        text = Path(config_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config_file} cannot be read: {error}") from error
    if "_target_:" in text:
        raise ConfigError(
            f"{config_file} is of a run of a LazyConfig, and a YAML config is needed here. In "
            "Python, the model is instantiate(LazyConfig.load(CONFIG).model), and with the "
            "weights in it the functions of the tools take it: wsbcn_d2.fold, "
            "wsbcn_d2.engine.recalibrate_estimates, wsbcn_d2.analysis.analyze_model"
        )


def _unknown_key(cfg: CfgNode, message: str) -> str:
    """Adds the keys that may have been meant to a message of yacs about an unknown key."""
    match = re.search(r"Non-existent (?:config )?key: (\S+)", message)
    if match is None:
        return message
    keys = list(flatten_config(cfg))
    close = difflib.get_close_matches(match[1], keys, n=3)
    return f"there is no config key {match[1]}" + (
        f"; close to it are {', '.join(close)}" if close else ""
    )


def _check_norm_options(cfg: CfgNode) -> None:
    for key, value in flatten_config(cfg.MODEL, "MODEL.").items():
        if key.endswith(".NORM") and isinstance(value, str) and value:
            try:
                NormOption.parse(value)
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error


def check_values(cfg: CfgNode) -> None:
    """Checks the values that no other part of a program checks in time.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    values = flatten_config(cfg)
    for key, allowed in _WORDS.items():
        if values[key] not in allowed:
            raise ConfigError(
                f"{key}: {values[key]!r} is not one of {', '.join(map(repr, allowed))}"
            )
    names = [backbone.__name__ for backbone in BACKBONES]
    if cfg.MODEL.WSBCN.ZERO_INIT_RESIDUAL and cfg.MODEL.BACKBONE.NAME not in names:
        raise ConfigError(
            f"MODEL.WSBCN.ZERO_INIT_RESIDUAL: {cfg.MODEL.BACKBONE.NAME} cannot do it; "
            f"MODEL.BACKBONE.NAME must be one of {', '.join(names)}"
        )
    head = cfg.MODEL.ROI_BOX_HEAD
    if head.NAME == "FastRCNNConvFCHead" and head.NORM and not head.NUM_CONV:
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.NORM: {head.NORM!r} has no effect, because NUM_CONV is 0: fully "
            "connected layers have no norm. Set NUM_CONV (models with GN have NUM_CONV 4 and "
            "NUM_FC 1), or NORM ''"
        )
    number, name = cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.META_ARCHITECTURE
    if number == 0 or (number < 0 and name == "RetinaNet"):  # which leaves out the last ones
        raise ConfigError(
            f"TEST.DETECTIONS_PER_IMAGE: must be positive, or, for an R-CNN, -1 for all; got "
            f"{number} for a {name}"
        )
    steps = list(cfg.SOLVER.STEPS)
    if any(not isinstance(s, int) or s < 1 for s in steps) or steps != sorted(set(steps)):
        raise ConfigError(
            f"SOLVER.STEPS: must be iterations in ascending order, got {tuple(steps)}"
        )
    for key, least in _LEAST.items():
        if values[key] < least:
            raise ConfigError(f"{key}: must be at least {least}, got {values[key]}")


def _check_evaluation(cfg: CfgNode, alone: bool) -> None:
    """
    Args:
        alone: whether nothing else is to be done.
    """
    if alone and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty, and must name a dataset to evaluate on")
    if not cfg.TEST.AUG.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else GeneralizedRCNN
    if not issubclass(kind, GeneralizedRCNN) or issubclass(kind, PanopticFPN):
        raise ConfigError(
            f"TEST.AUG.ENABLED: a {name} cannot be evaluated with test-time augmentation, only "
            "R-CNNs can (MODEL.META_ARCHITECTURE GeneralizedRCNN)"
        )
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ConfigError(
                f"TEST.AUG.ENABLED: models with MODEL.{key} cannot be evaluated with test-time "
                "augmentation"
            )


def check_folder(key: str, folder: str) -> None:
    """Finds out whether a program can write to its folder.

    Args:
        key: of the config, for the message.
        folder: its value.

    Raises:
        ConfigError: if it cannot, or there is none.
    """
    if not folder:
        raise ConfigError(f"{key} is empty, and must name a folder")
    if "://" in folder:
        return
    try:
        check_output(os.path.join(folder, "log.txt"))
    except OSError as error:
        raise ConfigError(f"{key}: {error}") from error


def _checkpoints_of(output_dir: str) -> List[str]:
    """The names of those that a training has written to its folder."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    return sorted(name for name in names if re.fullmatch(r"model_(\d+|final)\.pth", name))


def check_weights(key: str, path: str, output_dir: str, *, needed: bool, resume: bool) -> None:
    """Looks for the weights that a program is to begin with.

    Args:
        key: of the config, for the message.
        path: its value, a file or an address; empty for random weights.
        output_dir: the folder of the run.
        needed: whether random weights are of no use.
        resume: whether a checkpoint in ``output_dir`` comes first.

    Raises:
        ConfigError: if there are none.
    """
    path = (path or "").partition("?")[0]
    last = os.path.join(output_dir, "last_checkpoint")
    if resume and os.path.isfile(last):
        with open(last, errors="replace") as file:
            name = file.read().strip()
        if not name or not os.path.isfile(os.path.join(output_dir, name)):
            found = _checkpoints_of(output_dir)
            raise ConfigError(
                f"--resume: {last!r} names {name!r}, which is not there. Write the name of a "
                f"checkpoint of that folder into it ({', '.join(found) or 'there is none'}), or "
                "remove it to begin anew"
            )
        return
    left = resume and _checkpoints_of(output_dir)
    if left:
        raise ConfigError(
            f"--resume: {output_dir!r} has {', '.join(left)}, and no last_checkpoint that says "
            "which to go on with: write one of the names into it, or move them away to begin anew"
        )
    if needed and not path:
        raise ConfigError(
            f"{key} is empty, and must name the checkpoint (to evaluate, --resume takes that of "
            f"the output folder, {output_dir!r})"
        )
    if path and "://" not in path and not os.path.isfile(path):
        raise ConfigError(
            f"{key}: there is no file {path!r}; give an existing file, a URL that Detectron2 knows "
            '(detectron2://, https://), or "" to start from random weights'
        )
