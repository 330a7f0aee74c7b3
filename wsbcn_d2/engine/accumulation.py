"""Gradient accumulation for Detectron2's trainers."""

import contextlib
import time
from typing import Any, ContextManager, Dict, List

import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class _Accumulation(SimpleTrainer):
    """Overrides :meth:`run_step` to take several batches for one step of the optimizer.

    The gradient is that of the mean of the batches' losses. With normalization layers that do not
    mix images it is the gradient of one batch with all the images, up to the order of summation, as
    far as that batch's losses are the mean of theirs. Those of Detectron2's R-CNNs are averages
    over samples: the RPN's over a fixed number for each image, so they are. The box head's are, if
    every image has as many sampled proposals (``ROI_HEADS.BATCH_SIZE_PER_IMAGE``; images with
    fewer proposals than that weigh more than in one batch). The mask head's are over foreground
    proposals, whose number differs: here every batch has the same weight, in one batch every
    proposal. RetinaNet and FCOS divide by a running average of the foreground, or by that of the
    batch.

    Data parallelism reduces the gradients once, with the last batch. An iteration, which learning
    rate schedules, hooks and logs count, is a step of the optimizer.
    """

    accumulate_steps: int

    def run_step(self) -> None:
        """One step of the optimizer."""
        assert self.model.training, "model was changed to eval mode"
        self.optimizer.zero_grad()
        losses: List[Dict[str, Tensor]] = []
        data_time = 0.0
        for i in range(self.accumulate_steps):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            last = i == self.accumulate_steps - 1
            with contextlib.nullcontext() if last else self._no_reduction():
                with self._autocast():
                    loss = self.model(data)
                loss = {"total_loss": loss} if isinstance(loss, Tensor) else loss
                self._backward(sum(loss.values()) / self.accumulate_steps)
            losses.append({name: value.detach() for name, value in loss.items()})
        self.after_backward()
        names = {name: None for loss in losses for name in loss}  # in order
        mean = {
            name: sum(loss[name] for loss in losses if name in loss) / self.accumulate_steps
            for name in names
        }
        self._write_metrics(mean, data_time)
        self._step()

    def _no_reduction(self) -> ContextManager[Any]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> ContextManager[Any]:
        return contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _step(self) -> None:
        self.optimizer.step()


class _AMPAccumulation(_Accumulation, AMPTrainer):
    def _autocast(self) -> ContextManager[Any]:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.precision)

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _step(self) -> None:
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def accumulate_gradients(trainer: DefaultTrainer, steps: int) -> None:
    """Makes a trainer take ``steps`` batches for every step of its optimizer.

    To be called once, before training starts. The batch size in effect is ``steps`` times
    ``SOLVER.IMS_PER_BATCH``; learning rate and schedule are the caller's business. Norm layers
    that estimate batch statistics see each batch for itself.

    Args:
        trainer: a :class:`detectron2.engine.DefaultTrainer` (with or without AMP), or any trainer
            that delegates its steps to a SimpleTrainer or AMPTrainer in ``trainer._trainer``.
        steps: number of batches; 1 leaves the trainer as it is.

    Raises:
        ValueError: if ``steps`` is not a positive integer.
        TypeError: if the trainer has a step of its own.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the number of steps must be a positive integer, got {steps!r}")
    if steps == 1:
        return
    inner = trainer._trainer
    classes = {SimpleTrainer: _Accumulation, AMPTrainer: _AMPAccumulation}
    if type(inner) not in classes:
        raise TypeError(
            f"cannot accumulate gradients in a {type(inner).__name__}; allowed are "
            "SimpleTrainer and AMPTrainer"
        )
    inner.__class__ = classes[type(inner)]
    inner.accumulate_steps = steps
