"""Training hooks for BCN: update rate, averaging over ranks, recalibration, guard."""

import logging
import math
from typing import Any, Callable, Iterable, List, Mapping, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import changed, require_wsbcn_config
from .statistics import (
    fixed_estimates,
    named_batch_channel_norms,
    recalibrate_estimates,
    seeded_batches,
    synchronize_estimates,
    unwrapped,
)

logger = logging.getLogger("detectron2.wsbcn_d2")

UPDATE_RATE_SCHEDULES = ("constant", "lr")


class UpdateRateSchedule(HookBase):
    """Sets the update rate of all BCN layers before every step, and logs it.

    The rate of a layer is the one of its norm option, ``r``, times a factor: 1 ("constant"), or
    the present learning rate over ``base_lr`` ("lr"), as long as that is below 1, so that
    estimates move slower when weights do. With ``warmup``, batch t (from 0) has at least the rate
    ``1 / (t + 1)``: until that falls below the rate above, the estimates are the plain average of
    what has been seen, and the (0, 1) that they start from has no part in it, but in a layer that
    nothing reaches in batch 0. (The first variance is still taken around a mean of 0, so it is the
    second moment of that batch.)

    The rate follows from the iteration and the learning rate, both of which checkpoints restore,
    so it has no state of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: str = "constant",
        base_lr: float,
        warmup: bool = False,
        batches_per_step: int = 1,
    ) -> None:
        """
        Args:
            model: its layers are looked up now; their present rates are the ``r`` above.
            schedule: "constant" or "lr".
            base_lr: learning rate at which the factor of "lr" is 1.
            warmup: start as a plain average. For training from random weights.
            batches_per_step: how many batches the trainer accumulates for a step; each counts in
                the warm-up.

        Raises:
            ValueError: if the schedule is unknown.
        """
        if schedule not in UPDATE_RATE_SCHEDULES:
            allowed = ", ".join(UPDATE_RATE_SCHEDULES)
            raise ValueError(f"unknown update rate schedule {schedule!r}; allowed are {allowed}")
        self._model = model
        self._layers = [layer for _, layer in named_batch_channel_norms(model)]
        self._rates = [layer.update_rate for layer in self._layers]
        self._schedule = schedule
        self._base_lr = base_lr
        self._warmup = warmup
        self._batches_per_step = batches_per_step
        self._batch = 0  # of the present step
        self._handle: Optional[RemovableHandle] = None

    def before_train(self) -> None:
        """Watches the batches within a step, if there are several that matter."""
        if self._warmup and self._batches_per_step > 1:
            self._handle = self._model.register_forward_pre_hook(self._before_batch)

    def before_step(self) -> None:
        """Sets the rates for this iteration."""
        self._batch = 0
        self._set_rates()
        if self._layers:
            rate = self._layers[0].update_rate
            get_event_storage().put_scalar("bcn_update_rate", rate, smoothing_hint=False)

    def after_train(self) -> None:
        """Gives the layers their own rates back."""
        if self._handle is not None:
            self._handle.remove()
        for layer, rate in zip(self._layers, self._rates):
            layer.update_rate = rate

    def _before_batch(self, model: nn.Module, inputs: Any) -> None:
        self._set_rates()
        self._batch += 1

    def _set_rates(self) -> None:
        factor = 1.0
        if self._schedule == "lr" and self._base_lr:
            # that of most parameters, which Detectron2 logs
            optimizer = self.trainer.optimizer
            group = hooks.LRScheduler.get_best_param_group_id(optimizer)
            factor = min(optimizer.param_groups[group]["lr"] / self._base_lr, 1.0)
        batch = self.trainer.iter * self._batches_per_step + self._batch
        floor = 1.0 / (batch + 1) if self._warmup else 0.0
        for layer, rate in zip(self._layers, self._rates):
            layer.update_rate = max(rate * factor, floor)


class SynchronizeEstimates(HookBase):
    """Averages the estimates over all ranks; see
    :func:`wsbcn_d2.engine.statistics.synchronize_estimates`."""

    def __init__(self, model: nn.Module, period: int = 1, also: Sequence[int] = ()) -> None:
        """
        Args:
            model: the model of this rank.
            period: number of iterations between two averages. Always done after the last one.
            also: more such periods, those of evaluating and saving, which have to find equal
                estimates on all ranks. 0 is none.
        """
        self._model = model
        self._periods = [p for p in (period, *also) if p > 0]

    def after_step(self) -> None:
        """Averages if it is time."""
        iteration = self.trainer.iter + 1
        is_final = iteration == self.trainer.max_iter
        if is_final or any(iteration % period == 0 for period in self._periods):
            synchronize_estimates(self._model)


class StopOnSkippedUpdates(HookBase):
    """Stops the training when a BCN layer has not seen a finite iteration for a while.

    A single overflow is normal under fp16, and costs one update. An iteration counts for a layer
    if any of its batches was skipped. The count is kept on the device and read, which makes the
    host wait, only when it may have reached the limit: every ``limit`` iterations if all is well.

    Detectron2 itself stops at the first loss that is infinite or NaN. Where a GradScaler skips such
    steps anyway, this hook lets them pass, up to ``limit`` in a row. It does not see what stops
    inside of the model: Detectron2's RPN does when its own predictions are not finite.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        """
        Args:
            model: the model of this rank.
            limit: number of consecutive iterations.

        Raises:
            ValueError: if ``limit`` is not positive.
        """
        if limit < 1:
            raise ValueError(f"limit must be positive, got {limit}")
        self._names, self._layers = [], []
        for name, layer in named_batch_channel_norms(unwrapped(model)):
            self._names.append(name)
            self._layers.append(layer)
        self._limit = limit
        self._start: Optional[Tensor] = None  # until training starts
        self._restore: Callable[[], None] = lambda: None

    def before_train(self) -> None:
        """Starts to count."""
        self._until_read = self._limit
        if not self._layers:
            return
        self._start = self._skipped = self._read()
        self._in_a_row = self._start.new_zeros(len(self._layers) + 1)  # the last is the loss
        self._loss_is_finite = torch.ones((), dtype=torch.bool, device=self._start.device)
        inner = getattr(self.trainer, "_trainer", self.trainer)
        if isinstance(inner, AMPTrainer) and inner.grad_scaler.is_enabled():
            self._let_losses_pass(inner)

    def after_step(self) -> None:
        """
        Raises:
            FloatingPointError: naming the first such layer.
        """
        if not self._layers:
            return
        before, self._skipped = self._skipped, self._read()
        bad = torch.cat([self._skipped > before, ~self._loss_is_finite.view(1)])
        self._in_a_row = (self._in_a_row + 1) * bad
        self._until_read -= 1
        if self._until_read:
            return
        in_a_row = self._in_a_row.tolist()
        for name, count in zip(self._names, in_a_row):
            if count >= self._limit:
                raise FloatingPointError(
                    f"The input of {name} has been infinite or NaN for the last {self._limit} "
                    f"iterations, up to iteration {self.trainer.iter}. It is the first such layer "
                    "of the model. The estimates of all layers are still those of finite batches. "
                    "A lower learning rate, a longer warm-up or gradient clipping may help."
                )
        if in_a_row[-1] >= self._limit:
            raise FloatingPointError(
                f"The loss has been infinite or NaN for the last {self._limit} iterations, up to "
                f"iteration {self.trainer.iter}, but the input of no BCN layer has been for as "
                "long: look at the losses and the predictors."
            )
        self._until_read = self._limit - max(in_a_row)

    def after_train(self) -> None:
        """Reports what has been skipped, whatever ended the training."""
        self._restore()
        if self._start is None:
            return
        counts = (self._read() - self._start).tolist()
        skipped = [(name, count) for name, count in zip(self._names, counts) if count]
        if skipped:
            name, count = skipped[0]
            logger.warning(
                f"{len(skipped)} of {len(counts)} BCN layers have skipped updates because of "
                f"infinite or NaN inputs; the first of them is {name}, with {count} batches."
            )

    def _let_losses_pass(self, trainer: AMPTrainer) -> None:
        write, own = trainer._write_metrics, vars(trainer).get("_write_metrics")

        def write_metrics(loss_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
            # Detectron2 looks at every gather_metric_period-th loss only.
            self._loss_is_finite = torch.isfinite(sum(loss_dict.values()).detach())
            try:
                write(loss_dict, *args, **kwargs)
            except FloatingPointError:
                logger.warning(
                    f"The loss is infinite or NaN, and the GradScaler skips this step. Only "
                    f"{self._limit} of them in a row stop the training."
                )

        def restore() -> None:
            if own is None:
                del trainer._write_metrics
            else:
                trainer._write_metrics = own
            self._restore = lambda: None

        trainer._write_metrics = write_metrics
        self._restore = restore

    def _read(self) -> Tensor:
        return torch.stack([layer.skipped_updates for layer in self._layers])


class RecalibrateEstimates(HookBase):
    """Replaces the estimates before evaluation; see
    :func:`wsbcn_d2.engine.statistics.recalibrate_estimates`.

    The counterpart of :class:`detectron2.engine.hooks.PreciseBN`: it runs every ``period``
    iterations and after the last, and has to come before the hooks that evaluate and save.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        build_loader: Callable[[], Iterable[Any]],
        num_batches: int,
    ) -> None:
        """
        Args:
            period: number of iterations between two runs; 0: after the last only.
            model: the model of this rank, in training mode.
            build_loader: makes a loader of training data, without worker processes; see
                :func:`wsbcn_d2.engine.statistics.seeded_batches`. Every run sees the same data.
            num_batches: number of batches of this rank.
        """
        self._period = period
        self._model = model
        self._build_loader = build_loader
        self._num_batches = num_batches

    def after_step(self) -> None:
        """Recalibrates if it is time."""
        iteration = self.trainer.iter + 1
        is_final = iteration == self.trainer.max_iter
        if is_final or (self._period > 0 and iteration % self._period == 0):
            logger.info(f"Recalibrating the estimates with {self._num_batches} batches ...")
            batches = seeded_batches(self._build_loader, self._num_batches, seed=comm.get_rank())
            recalibrate_estimates(self._model, batches, progress=comm.is_main_process())


class KeepEstimatesInPreciseBN(HookBase):
    """Has :class:`detectron2.engine.hooks.PreciseBN` leave the estimates of BCN as they are.

    That computes the statistics of BatchNorm layers by forward passes in training mode, in which
    BCN layers would move their estimates, on each rank by other images.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the model of this rank.
        """
        self._model = model
        self._changed: List[HookBase] = []

    def before_train(self) -> None:
        """Looks for such hooks of the trainer, wherever they stand."""
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.PreciseBN) and hook not in self._changed:
                hook.update_stats = fixed_estimates(self._model)(hook.update_stats)
                self._changed.append(hook)

    def after_train(self) -> None:
        """Gives them back what they did."""
        while self._changed:
            del self._changed.pop().update_stats


def build_hooks(cfg: CfgNode, trainer: DefaultTrainer) -> List[HookBase]:
    """The hooks that the config asks for, in the order in which they must run.

    :class:`wsbcn_d2.engine.Trainer` has them. Another trainer registers them before its own hooks
    that save and evaluate::

        def build_hooks(self):
            return build_hooks(self.cfg, self) + super().build_hooks()

    Args:
        cfg: a config with the keys of :func:`wsbcn_d2.add_wsbcn_config`.
        trainer: of which ``model`` and ``build_train_loader`` are used. For
            ``SOLVER.ACCUMULATE_STEPS`` it needs :func:`wsbcn_d2.engine.accumulate_gradients` too.

    Raises:
        KeyError: if the config lacks these keys.
    """
    require_wsbcn_config(cfg)
    model = trainer.model
    if next(named_batch_channel_norms(model), None) is None:
        return []
    ret: List[HookBase] = [
        UpdateRateSchedule(
            model,
            schedule=cfg.MODEL.WSBCN.UPDATE_RATE_SCHEDULE,
            base_lr=cfg.SOLVER.BASE_LR,
            warmup=cfg.MODEL.WSBCN.UPDATE_RATE_WARMUP,
            batches_per_step=cfg.SOLVER.ACCUMULATE_STEPS,
        ),
    ]
    if cfg.MODEL.WSBCN.SYNC_PERIOD > 0:
        also = (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD)
        ret.append(SynchronizeEstimates(model, cfg.MODEL.WSBCN.SYNC_PERIOD, also))
    if cfg.MODEL.WSBCN.MAX_SKIPPED_UPDATES > 0:
        ret.append(StopOnSkippedUpdates(model, cfg.MODEL.WSBCN.MAX_SKIPPED_UPDATES))
    if cfg.TEST.PRECISE_BN.ENABLED:
        ret.append(KeepEstimatesInPreciseBN(model))
    if cfg.TEST.PRECISE_BCN.ENABLED:
        loader_cfg = changed(cfg, "DATALOADER.NUM_WORKERS", 0)
        images_per_batch = cfg.SOLVER.IMS_PER_BATCH
        ret.append(
            RecalibrateEstimates(
                cfg.TEST.EVAL_PERIOD,
                model,
                lambda: trainer.build_train_loader(loader_cfg),
                math.ceil(cfg.TEST.PRECISE_BCN.NUM_IMAGES / images_per_batch),
            )
        )
    return ret
