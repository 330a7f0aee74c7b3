"""What the normalization layers of a trained model do to the channels: ReLU, estimates, filters.

A channel that ReLU sets to zero for every input is eliminated: no gradient reaches its filter, and
the model is one of a smaller width (an elimination singularity). Batch normalization keeps every
channel away from that, because it gives each the same statistics over the data. Channel
normalization (LN, GN, CN) fixes the statistics of groups of channels only, so that single channels
may drift until ReLU kills them. (arXiv 1903.10520v2, Section 3, which places a model by the
statistics of its channels after normalization, before the affine transformation: the farther they
are from those of BN, the nearer it is to elimination singularities.) Measured here, over K images:

- ``normalized_mean``, ``normalized_std`` of each channel, before the affine transformation. BN has
  (0, 1) for every channel, exactly if its statistics are those of the images. The distance of a
  layer is the mean over channels of ``|mean|`` and of ``|std - 1|``.
- what ReLU does to the channel in fact: its mean and standard deviation before, the share of
  positions that pass, and whether none does (dead).
"""

import contextlib
import copy
import itertools
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..engine.statistics import (
    gpus_of,
    named_batch_channel_norms,
    recalibrate_estimates,
    restored_random_state,
    restored_state,
    seed_everything,
    unwrapped,
)
from ..layers import BatchChannelNorm, WeightStandardized
from ..summary import is_norm

# Of the positions of all images. A channel that ReLU lets through less often is nearly dead.
NEARLY_DEAD = 0.01

_RELUS = ("relu", "relu_")
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_SOURCE = "_normalized_by"  # attribute of the output of a norm layer while a model is watched


@dataclass
class LayerStatistics:
    """What a normalization layer gave, over all images and calls.

    All tensors are (C,), float64, on the CPU.

    Attributes:
        name: of the layer in the model.
        kind: name of its class.
        normalized_mean, normalized_std: before its affine transformation; of BCN, before that of
            its channel normalization, the last.
        relu_mean, relu_std: of the input of the ReLU that follows, with the affine transformation
            and the shortcut of a residual block. None if no ReLU follows, as for active.
        active: share of the positions that ReLU lets through; 0 of a dead channel.
    """

    name: str
    kind: str
    normalized_mean: Tensor
    normalized_std: Tensor
    relu_mean: Optional[Tensor] = None
    relu_std: Optional[Tensor] = None
    active: Optional[Tensor] = None


@dataclass
class Drift:
    """How far the estimates of a layer are from the statistics of given data.

    Attributes:
        mean: (C,) distance of the means, in standard deviations by the estimate.
        log_std: (C,) logarithm of the ratio of the standard deviation of the data to the estimate.
    """

    mean: Tensor
    log_std: Tensor


@dataclass
class FilterStatistics:
    """Mean and standard deviation of each filter of a convolution, (C_out,), before
    standardization."""

    mean: Tensor
    std: Tensor
    standardized: bool


@torch.no_grad()
def analyze_layers(
    model: nn.Module, batches: Sequence[Any], *, progress: bool = False
) -> List[LayerStatistics]:
    """Runs data through a model in training mode, but with normalization as in evaluation.

    Normalization layers are those whose class has "Norm" in its name and whose input is of shape
    (N, C, H, W), whoever wrote them. Which ReLU follows which is observed, not guessed: directly
    or after the addition of a shortcut. The model is left as it was.

    Args:
        model: called with each batch, for example a Detectron2 model.
        batches: the inputs, for example of :func:`wsbcn_d2.engine.statistics.seeded_batches`.
        progress: show a progress bar.

    Returns:
        The layers that were reached, in the order of their first calls.

    Raises:
        ValueError: if there is no data, or there is no such layer.
    """
    if len(batches) == 0:
        raise ValueError("there are no batches to analyze the model with")
    calls, gpus = itertools.count(), gpus_of(model)
    watches = [_Watch(name, layer, calls) for name, layer in _named_norms(model)]
    if not watches:
        raise ValueError(f"{type(model).__name__} has no normalization layers")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_in_evaluation(model, [watch.layer for watch in watches]))
        for watch in watches:
            stack.enter_context(watch)
        for i, batch in enumerate(tqdm(batches, "statistics of channels", disable=not progress)):
            seed_everything(i, gpus)
            with _WatchReLU():
                model(batch)
    reached = [watch for watch in watches if watch.normalized.count]
    return [watch.statistics() for watch in sorted(reached, key=lambda watch: watch.position)]


@torch.no_grad()
def estimate_drift(
    model: nn.Module, batches: Sequence[Any], *, progress: bool = False
) -> Dict[str, Drift]:
    """Compares running estimates with what they should be for given data.

    Those of BCN with recalibrated ones (:func:`wsbcn_d2.engine.recalibrate_estimates`, on a copy
    of the model). Those of BatchNorm and FrozenBN with the statistics of what reaches the layer in
    evaluation. The model is left as it was.

    Args:
        model: called with each batch, in training mode but with estimates fixed.
        batches: the inputs.
        progress: show progress bars.

    Returns:
        By the name of the layer; levels of a layer follow one another in the channels.
    """
    model = unwrapped(model)
    drift: Dict[str, Drift] = {}
    norms = [layer for _, layer in _named_norms(model)]
    stock = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "running_mean", None), Tensor)
        and isinstance(getattr(layer, "running_var", None), Tensor)
        and not isinstance(layer, (BatchChannelNorm, nn.BatchNorm1d, nn.BatchNorm3d))
    }
    if stock:
        inputs, gpus = {name: _Moments() for name in stock}, gpus_of(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_as_in_evaluation(model, norms))
            for name, layer in stock.items():
                handle = layer.register_forward_pre_hook(
                    lambda module, args, moments=inputs[name]: moments.add(args[0])
                )
                stack.callback(handle.remove)
            for i, batch in enumerate(tqdm(batches, "inputs of BatchNorm", disable=not progress)):
                seed_everything(i, gpus)
                model(batch)
        for name, layer in stock.items():
            if inputs[name].count:
                mean, std = inputs[name].mean_and_std()
                drift[name] = _drift(layer, mean, std.square())
    if next(named_batch_channel_norms(model), None) is not None:
        recalibrated = copy.deepcopy(model).train()
        recalibrate_estimates(recalibrated, batches, progress=progress)
        for (name, old), (_, new) in zip(
            named_batch_channel_norms(model), named_batch_channel_norms(recalibrated)
        ):
            drift[name] = _drift(old, new.running_mean, new.running_var)
    return drift


@torch.no_grad()
def filter_statistics(model: nn.Module) -> Dict[str, FilterStatistics]:
    """Mean and standard deviation of every filter of every convolution, by its name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            std, mean = torch.std_mean(module.weight.double().flatten(1), dim=1, correction=0)
            standardized = isinstance(module, WeightStandardized)
            found[name] = FilterStatistics(mean.cpu(), std.cpu(), standardized)
    return found


def _named_norms(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """The outermost modules that are normalization layers by name."""
    inside: List[str] = []
    for name, module in model.named_modules():
        if is_norm(module) and not any(name.startswith(p) for p in inside):
            inside.append(name + ".")
            yield name, module


@contextlib.contextmanager
def _as_in_evaluation(model: nn.Module, norms: Sequence[nn.Module]) -> Iterator[None]:
    """Training mode, so that heads see the proposals of training, but for the norm layers."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for norm in norms:
        norm.eval()
    try:
        with EventStorage(), restored_state(model), restored_random_state(gpus_of(model)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Moments:
    """Mean and standard deviation of each channel over any number of (N, C, H, W)."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Any = 0.0
        self.square_sum: Any = 0.0

    def add(self, x: Tensor) -> None:
        count = x.numel() // max(x.shape[1], 1)
        if not count:
            return
        var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()
        self.count += count
        self.sum = self.sum + count * mean
        self.square_sum = self.square_sum + count * (var + mean.square())

    def mean_and_std(self) -> Tuple[Tensor, Tensor]:
        mean = self.sum / self.count
        var = (self.square_sum / self.count - mean.square()).clamp(min=0)
        return mean.cpu(), var.sqrt().cpu()


class _Watch:
    """Collects the statistics of one layer, while it is entered."""

    def __init__(self, name: str, layer: nn.Module, calls: "Iterator[int]") -> None:
        self.name, self.layer, self.calls = name, layer, calls
        self.position = -1  # of its first call among those of all layers
        self.normalized, self.before_relu = _Moments(), _Moments()
        self.passed: Any = 0
        # The same layer without its last affine transformation, run beside it.
        self.plain = _without_affine(layer)

    def __enter__(self) -> "_Watch":
        self.handle = self.layer.register_forward_hook(self._on_output)
        return self

    def __exit__(self, *args: Any) -> None:
        self.handle.remove()

    def _on_output(self, layer: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            if self.position < 0:
                self.position = next(self.calls)
            self.normalized.add(self.plain(*inputs))
            setattr(output, _SOURCE, self)

    def on_relu(self, x: Tensor) -> None:
        """``x`` is about to go through ReLU."""
        self.before_relu.add(x)
        self.passed = self.passed + (x > 0).sum(dim=(0, 2, 3))

    def statistics(self) -> LayerStatistics:
        kind = type(self.layer).__name__
        result = LayerStatistics(self.name, kind, *self.normalized.mean_and_std())
        if self.before_relu.count:
            result.relu_mean, result.relu_std = self.before_relu.mean_and_std()
            result.active = self.passed.double().cpu() / self.before_relu.count
        return result


class _WatchReLU(TorchFunctionMode):
    """Reports to a :class:`_Watch` when the output of its layer, perhaps with a shortcut added,
    goes through ReLU, whichever way that is written."""

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        operands = [a for a in args[:2] if isinstance(a, Tensor)]
        sources = [getattr(a, _SOURCE) for a in operands if hasattr(a, _SOURCE)]
        if name in _RELUS and sources:
            sources[0].on_relu(args[0])
        result = func(*args, **(kwargs or {}))
        if name in _ADDITIONS and sources and isinstance(result, Tensor):
            setattr(result, _SOURCE, sources[0])
        elif name in _RELUS and isinstance(result, Tensor) and hasattr(result, _SOURCE):
            delattr(result, _SOURCE)  # in place: it is no longer what the layer gave
        return result


def _without_affine(layer: nn.Module) -> nn.Module:
    plain = copy.deepcopy(layer).eval()
    prefix = "group_" if isinstance(plain, BatchChannelNorm) else ""
    for name, neutral in (("weight", 1.0), ("bias", 0.0)):
        affine = getattr(plain, prefix + name, None)
        if isinstance(affine, Tensor):
            affine.detach().fill_(neutral)
    return plain


def _drift(layer: nn.Module, mean: Tensor, var: Tensor) -> Drift:
    eps = getattr(layer, "eps", 0.0)
    mean, var, estimated_mean, estimated_var = (
        t.double().cpu() for t in (mean, var, layer.running_mean, layer.running_var)
    )
    std, estimated_std = (var + eps).sqrt(), (estimated_var + eps).sqrt()
    deviation = (mean - estimated_mean).abs() / estimated_std
    return Drift(deviation.flatten(), (std / estimated_std).log().flatten())
