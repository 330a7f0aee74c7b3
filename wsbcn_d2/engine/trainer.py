"""Detectron2's DefaultTrainer with what BCN needs, on any number of processes and any device."""

import logging
import weakref
from typing import Any, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config import ConfigError, changed
from ..modeling import checkpoint_activations_
from ..summary import summarize
from .accumulation import accumulate_gradients
from .checkpoint import AtomicCheckpointer
from .data import check_data
from .evaluation import build_evaluator, inference_folder
from .hooks import build_hooks
from .setup import reason

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is


class Trainer(DefaultTrainer):
    """A :class:`detectron2.engine.DefaultTrainer` for the configs of this package.

    It differs from it in that

    - it takes care of the estimates of BCN layers: see :func:`wsbcn_d2.engine.build_hooks`;
    - ``SOLVER.ACCUMULATE_STEPS`` accumulates gradients;
    - ``MODEL.WSBCN.CHECKPOINT_ACTIVATIONS`` saves memory, with every backbone and head;
    - a checkpoint is complete or not there, whenever the process is killed;
    - :meth:`build_evaluator` chooses by the type of the dataset;
    - data that does not fit the model, or test data that does not fit the training data, is an
      error that says so, before the model is built: see :func:`.data.check_data`;
    - a checkpoint of another model is an error where a run is resumed;
    - ``SOLVER.STEPS`` may have ``SOLVER.MAX_ITER`` and more, which have no effect;
    - the output folder is made if it is not there;
    - several processes can train without GPUs.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a config with the keys of :func:`wsbcn_d2.add_wsbcn_config`.

        Raises:
            ConfigError: if there is no data, or it does not fit together or to the model.
        """
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # as DefaultTrainer does for scripts without default_setup
        # What a loader of a subclass reads need not be what the config names.
        build_loader, ours = type(self).build_train_loader, Trainer.build_train_loader
        own_loader = getattr(build_loader, "__func__", build_loader) is not ours.__func__
        # Once for all processes; but Detectron2 wants the names of keypoints in each.
        if not own_loader and (comm.is_main_process() or cfg.MODEL.KEYPOINT_ON):
            check_data(cfg)
        PathManager.mkdirs(cfg.OUTPUT_DIR)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        try:
            data_loader = self.build_train_loader(cfg)
        except AssertionError as error:  # of Detectron2, where nothing is left to train with
            raise ConfigError(f"the training data cannot be loaded: {reason(error)}") from error
        model = self.build_model(cfg)
        if cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS:
            checkpoint_activations_(model, cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS)
        optimizer = self.build_optimizer(cfg, model)
        # DefaultTrainer lets this call choose device_ids, and its choice assumes GPUs.
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        device_ids = [comm.get_local_rank()] if on_gpu else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        accumulate_gradients(self, cfg.SOLVER.ACCUMULATE_STEPS)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[HookBase]:
        """DefaultTrainer's hooks, after those of this package: what is saved and evaluated has
        estimates that are averaged and, if asked for, recalibrated."""
        return build_hooks(self.cfg, self) + super().build_hooks()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """DefaultTrainer's; the log says what is normalized and standardized how."""
        model = super().build_model(cfg)
        logger.info(f"{type(model).__name__}: {summarize(model) or 'no BCN, CN or WS'}")
        return model

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """DefaultTrainer's, which asks for the flip map of the training data's keypoints, although
        nothing is flipped here."""
        return super().build_test_loader(changed(cfg, "MODEL.KEYPOINT_ON", False), dataset_name)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """DefaultTrainer's, which refuses a step at the end."""
        steps = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
        return super().build_lr_scheduler(changed(cfg, "SOLVER.STEPS", steps), optimizer)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        """
        Args:
            cfg: the config of the run.
            dataset_name: name of a registered dataset.
            output_folder: default: ``inference`` in the output folder of the run.
        """
        return build_evaluator(
            dataset_name,
            output_folder or inference_folder(cfg.OUTPUT_DIR),
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
