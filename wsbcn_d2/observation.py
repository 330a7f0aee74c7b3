"""What the inputs of normalization layers are like, from data: the statistics that a layer without
running statistics takes of each image, and those that another kind of layer needs."""

from typing import Any, Dict, Iterable, List, Mapping

import torch
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn

from .feeding import call


class Observation:
    """Averages over the inputs (N, C, H, W) of a layer.

    Attributes:
        mean, var: of each channel, over everything, (C,), float64.
        own_mean, own_var: what the layer itself normalizes a channel with, on average, (C,).
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: List[Tensor] = []

    def add(self, norm: nn.Module, x: Tensor) -> None:
        """Takes an input of a layer into account; an empty one changes nothing."""
        x = x.double()
        mean = x.mean((2, 3))
        square = x.square().mean((2, 3))
        if isinstance(norm, nn.GroupNorm):
            own_var, own_mean = torch.var_mean(
                x.unflatten(1, (norm.num_groups, -1)), (2, 3, 4), unbiased=False
            )
            repeats = norm.num_channels // norm.num_groups
            own_mean, own_var = (t.repeat_interleave(repeats, 1) for t in (own_mean, own_var))
        elif isinstance(norm, LayerNorm):
            own_var, own_mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
            own_mean, own_var = (t.mean((2, 3)).expand_as(mean) for t in (own_mean, own_var))
        elif isinstance(norm, nn.InstanceNorm2d):
            own_mean, own_var = mean, square - mean.square()
        else:  # BatchNorm without running statistics
            own_mean = mean.mean(0).expand_as(mean)
            own_var = square.mean(0) - own_mean.square()
        sums = [t.sum(0) for t in (mean, square, own_mean, own_var)]
        self._sums = [a + b for a, b in zip(self._sums, sums)] if self._sums else sums
        self.images += len(x)

    @property
    def mean(self) -> Tensor:
        return self._sums[0] / self.images

    @property
    def var(self) -> Tensor:
        return self._sums[1] / self.images - self.mean.square()

    @property
    def own_mean(self) -> Tensor:
        return self._sums[2] / self.images

    @property
    def own_var(self) -> Tensor:
        return self._sums[3] / self.images


@torch.no_grad()
def observe(
    model: nn.Module, norms: Mapping[nn.Module, str], levels: Mapping[nn.Module, int], data: Any
) -> Dict[nn.Module, List[Observation]]:
    """Calls a model with data, in evaluation mode, and observes layers.

    Args:
        model: it is as before afterwards.
        norms: the layers to observe, with their names.
        levels: by how many feature levels they are shared, if by more than one.
        data: an iterable of what to call the model with, each a tuple of arguments or the only one.

    Returns:
        For each layer one observation a level.

    Raises:
        ValueError: if the model cannot be called with the data, a layer is not called, or its input
            is infinite or NaN.
    """
    found = {norm: [Observation() for _ in range(levels.get(norm, 1))] for norm in norms}
    calls: Dict[nn.Module, int] = {}

    def note(norm: nn.Module, inputs: Any) -> None:
        calls[norm] = calls.get(norm, -1) + 1
        found[norm][calls[norm] % len(found[norm])].add(norm, inputs[0])

    if not isinstance(data, Iterable) or isinstance(data, Tensor):
        raise ValueError(f"data: expected an iterable of inputs, got a {type(data).__name__}")
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        for inputs in data:
            calls.clear()
            call(model, inputs, "data")
    finally:
        for hook in hooks:
            hook.remove()
    if not any(observation.images for of in found.values() for observation in of):
        raise ValueError("data: there are no inputs in it with which a layer is called")
    for norm, name in norms.items():
        if not all(observation.images for observation in found[norm]):
            raise ValueError(f"data: the model does not call {name} for each of its levels")
        if not all(torch.cat([o.mean, o.var]).isfinite().all() for o in found[norm]):
            raise ValueError(f"data: the input of {name} has infinite or NaN values")
    return found
