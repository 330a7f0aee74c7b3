#!/usr/bin/env python
"""Trains or evaluates a model from a LazyConfig, with the command line of Detectron2's own script.

    tools/lazyconfig_train_net.py --config-file CONFIG.py [--num-gpus N] [--resume] [--eval-only]
                                  [KEY=VALUE ...]

The keys of wsbcn_d2/config.py below MODEL.WSBCN that are about training are those of
``train.wsbcn``, where the config has them: ``train.wsbcn.CHECKPOINT_ACTIVATIONS=all``.
"""

import argparse
import contextlib
import difflib
import functools
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from wsbcn_d2 import add_wsbcn_config, checkpoint_activations_
from wsbcn_d2.data import annotation_facts, check_datasets, check_images, check_same_classes
from wsbcn_d2.engine import AtomicCheckpointer, ConfigError, build_hooks
from wsbcn_d2.engine.checkpoint import CompleteCheckpointer
from wsbcn_d2.engine.data import check_classes, check_masks, check_objects
from wsbcn_d2.engine.evaluation import COCO_MAX_DETECTIONS, CocoFileEvaluator, detections_per_image
from wsbcn_d2.engine.setup import (
    available_device,
    check_folder,
    check_precision,
    check_processes,
    check_resume,
    check_values,
    check_weights,
    reason,
)
from wsbcn_d2.norm_options import NormOption

EXAMPLES = """examples:
  lazyconfig_train_net.py --config-file configs/LazyConfig/mask_rcnn_R_50_FPN_1x.py --num-gpus 8
  lazyconfig_train_net.py --config-file CONFIG.py 'train.norm=BCN(groups=16)+WS' optimizer.lr=0.01
  lazyconfig_train_net.py --config-file CONFIG.py --eval-only train.init_checkpoint=model.pth
"""

# That a config need not have: what Detectron2 and this program look for.
NEW_KEYS = ("+", "~", "train.seed", "train.cudnn_benchmark", "train.wsbcn")
# What a config needs for training, beside `train` and `model`.
TO_TRAIN = (
    *("dataloader", "optimizer", "lr_multiplier"),
    *(f"train.{key}" for key in "output_dir init_checkpoint max_iter amp ddp".split()),
    *(f"train.{key}" for key in "checkpointer eval_period log_period device".split()),
)
# Whose keys are the arguments of a call, as those of a node with a _target_ are.
ARGUMENTS = ("train.ddp", "train.checkpointer")
# Of MODEL.WSBCN; the others are for the backbones that YAML configs name.
WSBCN_KEYS = (
    "CHECKPOINT_ACTIVATIONS",
    "UPDATE_RATE_SCHEDULE",
    "UPDATE_RATE_WARMUP",
    "SYNC_PERIOD",
    "MAX_SKIPPED_UPDATES",
)
# The least that numbers may be.
LEAST = {
    "train.max_iter": 1,
    "train.log_period": 1,
    "train.checkpointer.period": 1,
    "train.eval_period": 0,
    "optimizer.lr": 0.0,
    "dataloader.train.num_workers": 0,
}


def test(cfg: DictConfig, model: nn.Module) -> Optional[Dict[str, Any]]:
    """Evaluates the model, if the config has an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), build_evaluator(cfg.dataloader.evaluator, model)
    )
    print_csv_format(results)
    return results


def build_evaluator(node: DictConfig, model: nn.Module) -> DatasetEvaluator:
    """The evaluator of the config; for files in COCO's format, with what they need, and for all
    detections that the model returns unless the config says how many."""
    target = node["_target_"]
    if (locate(target) if isinstance(target, str) else target) is not COCOEvaluator:
        return instantiate(node)
    arguments = {key: node[key] for key in node if key != "_target_"}
    limit = COCO_MAX_DETECTIONS  # which leaves it to the config's own number
    if "max_dets_per_image" not in arguments:
        limit = detections_per_image(model)
    return CocoFileEvaluator(**arguments, max_detections=limit)


def yaml_config(cfg: DictConfig) -> CfgNode:
    """What :func:`wsbcn_d2.engine.build_hooks` has to know, and MODEL.WSBCN.

    Raises:
        ConfigError: if a key of ``train.wsbcn`` is none, or has a value that is not allowed.
    """
    keys = get_cfg()
    add_wsbcn_config(keys)
    given = cfg.train.get("wsbcn", {})
    if not isinstance(given, DictConfig) and given != {}:
        raise ConfigError(
            f"train.wsbcn: {given!r} has no keys; allowed are {', '.join(WSBCN_KEYS)}, as in "
            "train.wsbcn.CHECKPOINT_ACTIVATIONS=all"
        )
    for key, value in given.items():
        if key not in WSBCN_KEYS:
            raise ConfigError(f"there is no train.wsbcn.{key}; allowed are {', '.join(WSBCN_KEYS)}")
        try:
            keys.merge_from_list([f"MODEL.WSBCN.{key}", value])
        except ValueError as error:
            raise ConfigError(f"train.wsbcn.{key}: {error}") from error
    check_values(keys)
    keys.SOLVER.BASE_LR = cfg.optimizer.lr
    keys.SOLVER.CHECKPOINT_PERIOD = cfg.train.checkpointer.period
    keys.TEST.EVAL_PERIOD = cfg.train.eval_period
    return keys


def train(cfg: DictConfig, resume: bool) -> None:
    """Trains the model; see ``configs/common/train.py`` of Detectron2 for the keys of ``train``."""
    keys = yaml_config(cfg)
    try:
        loader = instantiate(cfg.dataloader.train)
    except AssertionError as error:  # of Detectron2, where nothing is left to train with
        raise ConfigError(f"the training data cannot be loaded: {reason(error)}") from error
    model = instantiate(cfg.model).to(cfg.train.device)
    if keys.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS:
        checkpoint_activations_(model, keys.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    on_gpu = torch.device(cfg.train.device).type == "cuda"
    device_ids = [comm.get_local_rank()] if on_gpu else None
    model = create_ddp_model(model, device_ids=device_ids, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = AtomicCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(build_hooks(keys, trainer))
    trainer.register_hooks(
        [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
    )
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)])
    trainer.register_hooks([hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, model))])
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


@functools.lru_cache(maxsize=None)
def load(config_file: str, overrides: Tuple[str, ...]) -> DictConfig:
    """Reads a config; without a GPU, the device "cuda" becomes "cpu".

    Once in a process, as a config may register its datasets, which can be done only once.

    Raises:
        ConfigError: if there is none, or an override is none.
    """
    if not config_file:
        raise ConfigError("--config-file must name a LazyConfig, as those in configs/LazyConfig")
    if not config_file.endswith(".py"):
        raise ConfigError(
            f"{config_file} is not a LazyConfig (.py); YAML configs are for tools/train_net.py"
        )
    try:
        cfg = LazyConfig.load(config_file)
    except (KeyError, OSError, ValueError) as error:
        raise ConfigError(f"{config_file}: {error}") from error
    if "train" not in cfg or "model" not in cfg:
        raise ConfigError(f"{config_file} has no `train` or no `model`: {', '.join(cfg)}")
    quoted = [_quoted(override) for override in overrides]
    try:
        _check_keys(cfg, quoted)
        cfg = LazyConfig.apply_overrides(cfg, quoted)
    except ConfigError:
        raise
    except (HydraException, KeyError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"{' '.join(quoted)}: {' '.join(str(error).split())}. An override is KEY=VALUE, and "
            "a value with other signs than letters, digits and + needs quotes of its own"
        ) from error
    cfg.train.device = available_device("train.device", cfg.train.get("device", ""))
    return cfg


def _quoted(override: str) -> str:
    """An override whose value is a norm option with arguments, which Hydra takes for a function
    if it has no quotes."""
    key, equals, value = override.partition("=")
    if "(" in value:
        with contextlib.suppress(ValueError):
            NormOption.parse(value)
            return f'{key}{equals}"{value}"'
    return override


def _check_keys(cfg: DictConfig, overrides: List[str]) -> None:
    """Refuses new keys where nothing would notice them: not among the arguments of a call."""
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith(NEW_KEYS) or not _is_new(cfg, key):
            continue
        close = difflib.get_close_matches(key, _keys(cfg), n=3)
        raise ConfigError(
            f"the config has no key {key}"
            + (f"; close to it are {', '.join(close)}" if close else "")
            + f". +{override} adds it"
        )


def _is_new(cfg: DictConfig, key: str) -> bool:
    node, path = cfg, ""
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        if node._get_node(part) is None:
            return "_target_" not in node and path not in ARGUMENTS
        node, path = node._get_node(part), f"{path}.{part}".lstrip(".")
    return False


def _keys(node: DictConfig, prefix: str = "") -> List[str]:
    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(node, key) and isinstance(node._get_node(key), DictConfig):
            keys += _keys(node._get_node(key), f"{prefix}{key}.")
    return keys


def check(cfg: DictConfig, eval_only: bool, resume: bool) -> None:
    """Looks for weights and data, and then builds the model, before anything else is done.

    Raises:
        ConfigError: if files are missing, keys are wrong, or the model cannot be built.
    """
    needed = ["dataloader"] if eval_only else TO_TRAIN
    lacking = [key for key in needed if OmegaConf.select(cfg, key) is None]
    if lacking:
        raise ConfigError(f"the config has no {', '.join(lacking)}")
    for key, least in ({} if eval_only else LEAST).items():
        value = OmegaConf.select(cfg, key, default=least)
        if not isinstance(value, (int, type(least))) or value < least:
            kind = "an integer" if isinstance(least, int) else "a number"
            raise ConfigError(f"{key}: must be {kind} of at least {least}, got {value!r}")
    key, output = "train.init_checkpoint", cfg.train.output_dir
    check_folder("train.output_dir", output)
    check_weights(key, cfg.train.init_checkpoint, output, needed=eval_only, resume=resume)
    what = "" if eval_only else yaml_config(cfg).MODEL.WSBCN.CHECKPOINT_ACTIVATIONS
    if not eval_only:
        check_precision("train.amp.enabled", cfg.train.amp.enabled, cfg.train.device)
    check_data(cfg, ("test",) if eval_only else ("train", "test"))
    try:
        model = instantiate(cfg.model)
        checkpoint_activations_(model, what)
    except (AssertionError, ImportError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"the model of the config cannot be built: {reason(error)}") from error
    check_resume(model, output, resume and not eval_only)


def check_data(cfg: DictConfig, parts: Sequence[str]) -> None:
    """Compares the datasets with one another, and looks for what is needed of them.

    Raises:
        ConfigError: if there are none, or they are not what they should be.
    """
    if parts == ("test",) and "evaluator" not in cfg.dataloader:
        raise ConfigError("the config has no dataloader.evaluator, so there is nothing to evaluate")
    used = []
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper") or {}
    for part in parts:
        node = OmegaConf.select(cfg, f"dataloader.{part}.dataset")
        if node is None or "names" not in node:  # a dataset of another kind, or no evaluation
            continue
        key = f"dataloader.{part}.dataset."
        names = [node.names] if isinstance(node.names, str) else list(node.names or ())
        if not names:
            raise ConfigError(f"{key}names is empty, and must name a dataset")
        try:
            check_datasets(names)
            check_images(names)
        except (OSError, ValueError) as error:
            raise ConfigError(f"dataloader.{part}: {error}") from error
        used += names
        if part == "train":
            filters = node.get("filter_empty", True), key + "min_keypoints"
            check_objects(key + "names", names, *filters, node.get("min_keypoints", 0))
        if mapper.get("use_instance_mask"):
            for file in filter(None, map(annotation_facts, names)):
                key = "dataloader.train.mapper."
                formats = (key + "instance_mask_format", mapper.get("instance_mask_format", ""))
                check_masks(file, part == "train", key + "use_instance_mask", *formats)
    try:
        check_same_classes(used)
    except ValueError as error:
        raise ConfigError(f"dataloader: {error}") from error
    for key in ("model.num_classes", "model.roi_heads.num_classes"):
        expected = OmegaConf.select(cfg, key)
        if isinstance(expected, int):
            check_classes(key, expected, used)


def main(args: argparse.Namespace) -> None:
    """Runs in every process."""
    cfg = load(args.config_file, tuple(args.opts))
    default_setup(cfg, args)
    if args.eval_only:
        model = instantiate(cfg.model).to(cfg.train.device)
        checkpointer = CompleteCheckpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        test(cfg, model)
    else:
        train(cfg, args.resume)


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=EXAMPLES).parse_args()
    try:
        config = load(arguments.config_file, tuple(arguments.opts))
        images = OmegaConf.select(config, "dataloader.train.total_batch_size")
        check_processes(
            arguments.num_gpus,
            arguments.num_machines,
            config.train.device,
            0 if arguments.eval_only or not isinstance(images, int) else images,
        )
        check(config, arguments.eval_only, arguments.resume)
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except ConfigError as error:
        print(f"lazyconfig_train_net.py: error: {error}", file=sys.stderr)
        sys.exit(2)
