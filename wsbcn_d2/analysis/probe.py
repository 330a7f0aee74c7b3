"""How smooth the loss of a model is along the direction of its gradient.

The argument for weight standardization is that it reduces the Lipschitz constants of the loss and
of its gradients (arXiv 1903.10520v2, Section 2). The measurement is that of Santurkar et al., "How
does batch normalization help optimization?" (arXiv 1805.11604, Section 3 and Figure 4), made for
batch normalization: from the present weights θ, steps are taken against the gradient g,

    θ - η g        for several step sizes η,

and the loss, and the gradient there, compared with those at θ, all for the same images:

- variation of the loss:      loss(θ - η g) - loss(θ)
- gradient predictiveness:    ‖∇loss(θ - η g) - g‖
- effective β-smoothness:     the largest ‖∇loss(θ - η g) - g‖ / ‖η g‖ over η
"""

import copy
from dataclasses import dataclass
from typing import Any, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from ..engine.statistics import (
    gpus_of,
    restored_random_state,
    restored_state,
    seed_everything,
    unwrapped,
)

# Multiples of a learning rate, around the range of the cited paper.
STEPS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass
class Probe:
    """What :func:`probe_loss` found; an entry for each batch.

    Attributes:
        step_sizes: η, (S,).
        weight_norm: ‖θ‖ of the trainable parameters.
        loss: (B,) at θ.
        gradient_norm: (B,).
        loss_change: (B, S), loss(θ - η g) - loss(θ); infinite or NaN where the model broke.
        gradient_change: (B, S), ‖∇loss(θ - η g) - g‖.
    """

    step_sizes: np.ndarray
    weight_norm: float
    loss: np.ndarray
    gradient_norm: np.ndarray
    loss_change: np.ndarray
    gradient_change: np.ndarray

    @property
    def smoothness(self) -> np.ndarray:
        """(B,), the effective β: the largest change of the gradient over the distance moved."""
        distance = self.step_sizes * self.gradient_norm[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.max(self.gradient_change / distance, axis=1)


def probe_loss(
    model: nn.Module,
    batches: Sequence[Any],
    learning_rate: float,
    *,
    steps: Sequence[float] = STEPS,
    progress: bool = False,
) -> Probe:
    """Moves a copy of a model along the gradient of each batch and looks at loss and gradient.

    Everything is as in a training step: training mode, and BCN moves its estimates before it
    normalizes. But every pass starts from the same estimates and random numbers, and the heads of
    an R-CNN see the proposals that were sampled at θ: other weights propose other boxes, and the
    loss would jump with every box that is sampled instead of another. The model is left as it was.

    Args:
        model: returns a dict of losses, or a loss, for a batch in training mode.
        batches: each is probed by itself.
        learning_rate: a step of 1 is this times the gradient, as of SGD without momentum.
        steps: multiples of it.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is out of range, or no parameter is trainable.
    """
    if len(batches) == 0 or len(steps) == 0:
        raise ValueError(f"batches ({len(batches)}) and steps ({len(steps)}) must not be none")
    if not learning_rate > 0 or not all(step > 0 for step in steps):
        raise ValueError(f"learning_rate ({learning_rate}) and steps ({steps}) must be positive")
    model = copy.deepcopy(unwrapped(model)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no trainable parameters to move along")
    start = [p.detach().clone() for p in parameters]
    sizes = np.array([step * learning_rate for step in steps])
    losses, norms, loss_changes, gradient_changes = [], [], [], []
    with EventStorage(), restored_random_state(gpus_of(model)):
        with tqdm(
            total=len(batches) * (len(sizes) + 1), desc="probing the loss", disable=not progress
        ) as bar:
            for i, batch in enumerate(batches):
                _keep_sampled_proposals(model)
                loss, gradient = _loss_and_gradient(model, parameters, batch, i)
                bar.update()
                losses.append(loss)
                norms.append(_norm(gradient))
                loss_changes.append([])
                gradient_changes.append([])
                for size in sizes:
                    _move(parameters, start, gradient, -size)
                    moved_loss, moved = _loss_and_gradient(model, parameters, batch, i)
                    loss_changes[-1].append(moved_loss - loss)
                    gradient_changes[-1].append(_norm([a - b for a, b in zip(moved, gradient)]))
                    bar.update()
                _move(parameters, start, gradient, 0.0)
    return Probe(
        sizes,
        _norm(start),
        np.array(losses),
        np.array(norms),
        np.array(loss_changes),
        np.array(gradient_changes),
    )


def _keep_sampled_proposals(model: nn.Module) -> None:
    """From the next call on, Detectron2's ROI heads train on the proposals that it samples."""
    heads = getattr(model, "roi_heads", None)
    sample = getattr(type(heads), "label_and_sample_proposals", None)
    if sample is None:
        return
    kept: List[Any] = []

    def label_and_sample_proposals(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(sample(heads, *args, **kwargs))
        return copy.deepcopy(kept[0])  # heads may write into them

    heads.label_and_sample_proposals = label_and_sample_proposals


def _loss_and_gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], batch: Any, seed: int
) -> Tuple[float, List[Tensor]]:
    seed_everything(seed, gpus_of(model))
    with restored_state(model):
        losses = model(batch)
        loss = losses if isinstance(losses, Tensor) else sum(losses.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        value = loss.item()
    return value, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]


@torch.no_grad()
def _move(
    parameters: Sequence[nn.Parameter],
    start: Sequence[Tensor],
    direction: Sequence[Tensor],
    size: float,
) -> None:
    for parameter, origin, d in zip(parameters, start, direction):
        parameter.copy_(torch.add(origin, d, alpha=size) if size else origin)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
