"""What happens to the estimates of BCN layers outside of their own forward pass."""

import contextlib
import itertools
import random
from typing import Any, Callable, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..layers import BatchChannelNorm
from ..ops import moments, several_ranks


def named_batch_channel_norms(model: nn.Module) -> Iterator[Tuple[str, BatchChannelNorm]]:
    """Name and layer of every :class:`BatchChannelNorm`, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, BatchChannelNorm):
            yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel; others are returned as they are."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def synchronize_estimates(model: nn.Module) -> None:
    """Averages the estimates over all ranks, weighted by the values behind their updates.

    One update moves the estimates by ``r (s - old)``, where ``s`` are the statistics of the rank's
    batch around the old estimates. That is linear in s, and the statistics of all batches together
    are the average of those of the ranks, weighted by their element counts. So the average of the
    updated estimates is exactly what one process would have got from the batches of all ranks,
    provided that the ranks had equal estimates before. A rank without data for a layer since the
    last call (no RoIs, or a batch that was not finite) has weight zero; if all have none, the
    layer keeps its estimates.

    One collective for all layers, whatever their number; no synchronization with the host. Every
    rank must call. Without a process group (a single process) nothing is done.

    Args:
        model: a model, the same on all ranks.
    """
    if not several_ranks():
        return
    layers = [layer for _, layer in named_batch_channel_norms(model)]
    if not layers:
        return
    packed: List[Tensor] = []
    for layer in layers:
        # In float64: a large variance times their number may exceed float32. The new dimension
        # broadcasts over the channels of every level.
        seen = layer.seen_elements.double().unsqueeze(-1)
        packed += [layer.running_mean * seen, layer.running_var * seen, seen]
    flat = torch.cat([t.reshape(-1) for t in packed])
    dist.all_reduce(flat)
    sums = [s.view_as(t) for s, t in zip(flat.split([t.numel() for t in packed]), packed)]
    for layer, mean, var, seen in zip(layers, sums[0::3], sums[1::3], sums[2::3]):
        for estimate, weighted in ((layer.running_mean, mean), (layer.running_var, var)):
            average = (weighted / seen.clamp(min=1)).to(estimate.dtype)
            estimate.copy_(torch.where(seen > 0, average, estimate))
        layer.seen_elements.zero_()


@contextlib.contextmanager
def fixed_estimates(model: nn.Module) -> Iterator[None]:
    """In this context the BCN layers of a model normalize with the estimates they have, whatever
    its mode, and leave them alone."""
    layers = [layer for _, layer in named_batch_channel_norms(model)]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes):
            layer.training = mode


@torch.no_grad()
def recalibrate_estimates(
    model: nn.Module, batches: Sequence[Any], *, rounds: int = 2, progress: bool = False
) -> None:
    """Replaces the estimates by the statistics of given data under the present weights.

    During training weights change while the estimates follow with a delay, and they remember only
    the last few images. Here they become the mean and variance over all given images, weighted by
    element counts: the counterpart of PreciseBN for BCN.

    The input of a layer depends on the estimates of the layers before it. A round runs all data
    through the model with fixed estimates, collects the statistics of all layers, and then
    replaces the estimates; so after round k the first k layers are exact in any case. The first
    round only has to bring the estimates near (BCN's channel normalization takes away most of what
    an error in the estimates of a layer does to the next), and the layers of the second see
    recalibrated layers before them.

    Layers that are frozen keep their estimates, and so do those that no finite data reaches. The
    mode of the model is the caller's business, and nothing but the estimates is changed, neither
    the buffers of other layers (BatchNorm) nor the state of random generators. The random numbers
    that the forward pass draws are seeded, so that the result is reproducible.

    Args:
        model: called with each batch, for example a Detectron2 model in training mode.
        batches: the inputs. Over several ranks, each gives its own share, which may be empty, and
            all get the same estimates.
        rounds: number of passes over the data.
        progress: show a progress bar.

    Raises:
        ValueError: if there is no data, in a single process, or ``rounds`` is not positive.
    """
    if rounds < 1 or (len(batches) == 0 and not several_ranks()):
        raise ValueError(f"rounds ({rounds}) and batches ({len(batches)}) must not be zero")
    # Without DistributedDataParallel: the ranks may have unequal numbers of batches.
    model = unwrapped(model)
    layers = [layer for _, layer in named_batch_channel_norms(model) if not layer.frozen]
    gpus = gpus_of(model)
    for number in range(rounds):
        collectors = [_Collector(layer) for layer in layers]
        description = f"recalibrating estimates, round {number + 1} of {rounds}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(EventStorage())  # discards what the model logs
            stack.enter_context(restored_state(model))
            stack.enter_context(restored_random_state(gpus))
            stack.enter_context(fixed_estimates(model))
            for collector in collectors:
                stack.enter_context(collector)
            for i, batch in enumerate(tqdm(batches, description, disable=not progress)):
                seed_everything(i, gpus)
                model(batch)
        for collector in collectors:
            collector.replace_estimates()


def seeded_batches(
    build_loader: Callable[[], Iterable[Any]], num_batches: int, seed: int = 0
) -> List[Any]:
    """The first batches of a training loader, the same at every call.

    Args:
        build_loader: makes the loader. It is called, and the batches are drawn, under fixed seeds
            of Python's, NumPy's and PyTorch's generators, which are then put back; a Detectron2
            loader without worker processes takes all its randomness from them.
        num_batches: number of batches.
        seed: of the generators. Ranks with different seeds see different augmentations.
    """
    with restored_random_state():
        seed_everything(seed)
        return list(itertools.islice(build_loader(), num_batches))


def gpus_of(model: nn.Module) -> List[int]:
    """The indices of the GPUs that a model is on."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sorted({t.device.index for t in tensors if t.is_cuda})


def seed_everything(seed: int, gpus: Sequence[int] = ()) -> None:
    """Seeds the generators of Python, NumPy, PyTorch on the CPU, and PyTorch on some GPUs."""
    np.random.seed(seed)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for gpu in gpus:
        torch.cuda.default_generators[gpu].manual_seed(seed)


@contextlib.contextmanager
def restored_random_state(gpus: Sequence[int] = ()) -> Iterator[None]:
    """Puts back the state of the generators that :func:`seed_everything` seeds."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def restored_state(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward pass in training mode leaves behind in a model: buffers (of
    BatchNorm), and numbers kept as attributes (RetinaNet's average of foreground anchors)."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    numbers = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, (int, float))})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, values in numbers:
            vars(module).update(values)


class _Collector:
    """Collects the statistics of the inputs of a layer, while it is entered."""

    def __init__(self, layer: BatchChannelNorm) -> None:
        self.layer = layer
        shape = (layer.num_levels, layer.num_channels)
        # about the present estimate, in float64: sums over many images neither cancel nor round
        self.center = layer.running_mean.double().view(shape)
        self.count = self.center.new_zeros(shape[0], 1)
        self.sum = torch.zeros_like(self.center)
        self.square_sum = torch.zeros_like(self.center)

    def __enter__(self) -> "_Collector":
        self.handle = self.layer.register_forward_pre_hook(self._collect)
        return self

    def __exit__(self, *args: Any) -> None:
        self.handle.remove()

    def _collect(self, layer: nn.Module, inputs: Tuple[Tensor, ...]) -> None:
        x, level = inputs[0], self.layer.level
        pixels = x.shape[2] * x.shape[3]
        mean, var = moments(x)
        deviation = mean.double() - self.center[level]
        total = pixels * deviation.sum(dim=0)
        square_total = pixels * (var + deviation.square()).sum(dim=0)
        # a batch that is not finite has no part, as in training
        finite = torch.isfinite(total).all() & torch.isfinite(square_total).all()
        self.count[level] += finite * (x.shape[0] * pixels)
        self.sum[level] += torch.where(finite, total, 0.0)
        self.square_sum[level] += torch.where(finite, square_total, 0.0)

    def replace_estimates(self) -> None:
        if several_ranks():
            for total in (self.count, self.sum, self.square_sum):
                dist.all_reduce(total)
        seen = self.count > 0
        count = self.count.clamp(min=1)
        deviation = self.sum / count
        mean = self.center + deviation
        var = (self.square_sum / count - deviation.square()).clamp(min=0)
        for estimate, new in ((self.layer.running_mean, mean), (self.layer.running_var, var)):
            new = new.to(estimate.dtype).view_as(estimate)
            estimate.copy_(torch.where(seen.view(*estimate.shape[:-1], 1), new, estimate))
