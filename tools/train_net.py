#!/usr/bin/env python
"""Trains or evaluates a model from a config, with the command line of Detectron2's own script.

    tools/train_net.py --config-file CONFIG [--num-gpus N] [--resume] [--eval-only] [KEY VALUE ...]

On a machine without GPU the model runs on CPU, and --num-gpus N starts N processes.
"""

import argparse
import os
import sys
from collections import OrderedDict
from typing import Any, Dict, Optional

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from wsbcn_d2.data import register_coco_format
from wsbcn_d2.engine import ConfigError, Trainer, check_model, load_config
from wsbcn_d2.engine.checkpoint import CompleteCheckpointer
from wsbcn_d2.engine.setup import TO_EVALUATE, TO_TRAIN, check_processes


def test_with_augmentation(cfg: CfgNode, model: nn.Module) -> Dict[str, Any]:
    """Evaluates with test-time augmentation (R-CNN models only)."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
    evaluators = [Trainer.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
    results = Trainer.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
    return OrderedDict((key + "_TTA", value) for key, value in results.items())


def main(cfg: CfgNode, args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """Runs in every process."""
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(test_with_augmentation(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks(
            [hooks.EvalHook(0, lambda: test_with_augmentation(cfg, trainer.model))]
        )
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    try:
        config = load_config(
            arguments.config_file,
            arguments.opts,
            needs=TO_EVALUATE if arguments.eval_only else TO_TRAIN,
            resume=arguments.resume,
        )
        check_processes(
            arguments.num_gpus,
            arguments.num_machines,
            config.MODEL.DEVICE,
            0 if arguments.eval_only else config.SOLVER.IMS_PER_BATCH,
            config.SOLVER.REFERENCE_WORLD_SIZE,
        )
        check_model(config, resume=arguments.resume and not arguments.eval_only)
        config.freeze()
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(config, arguments),
        )
    except ConfigError as error:
        print(f"train_net.py: error: {error}", file=sys.stderr)
        sys.exit(2)
