"""Activation checkpointing: a call that is repeated uses the estimates of the call.

A forward pass of training moves the estimates and then normalizes by them. When a backward pass
repeats it, they must not move, and other calls of the layer may have moved them on meanwhile (two
views of an image, a Siamese branch, feature levels). Neither kind of PyTorch's checkpointing says
which call is being repeated. So calls that may be repeated are remembered, by the layer, with the
estimates that they used and the mean statistics of their input, which tell them apart.

What is remembered is (C,) tables, of at most :data:`_MOST` calls of a layer, until the layer is
called again after a backward pass has repeated one of them.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .normalization import Normalization
from .state import assert_soon, in_backward
from .tables import split_tables

_MOST = 64
# Between the statistics of one input: a repetition differs from the call by rounding only.
_TOLERANCE = 0.01


@dataclass
class _Call:
    """One call of a layer.

    Attributes:
        shape: of the input.
        m, v: mean of its tables ``m`` and ``v`` over images, (C,).
        mean, var: estimates that it was normalized by, (C,).
        node: its node in the graph, while there is one.
        repeated: whether a backward pass has repeated it.
    """

    shape: torch.Size
    m: Tensor
    v: Tensor
    mean: Tensor
    var: Tensor
    node: Callable[[], Any]
    repeated: bool = False

    def distance(self, m: Tensor, v: Tensor) -> Tensor:
        """How far the statistics of an input are from those of this call, a scalar: relative to
        the deviation of the values. Statistics that are not finite differ from those that are."""
        theirs, own = torch.stack([m, v.sqrt()]), torch.stack([self.m, self.v.sqrt()])
        is_finite = theirs.isfinite() & own.isfinite()
        difference = torch.where(is_finite, (theirs - own).abs(), 0.0)
        mean, deviation = own.nan_to_num(0.0, 0.0, 0.0).abs().mean(1)
        other_kind = theirs.isfinite() != own.isfinite()
        return (difference / (deviation + 1e-3 * mean + 1e-30) + other_kind).mean()


_calls: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def forward(
    kernels: Any,
    x: Tensor,
    norm: Normalization,
    residual: Optional[Tensor],
    activation: str,
    repeatable: Optional[bool],
    node: Any = None,
) -> Tuple[Tensor, Tensor]:
    """A forward pass of batch-channel normalization, or its repetition by a backward pass.

    Args:
        kernels: the backend.
        x, norm, residual, activation: see :mod:`.batch_channel_norm`.
        repeatable: whether it may be repeated; of a repetition, whether it is not a reentrant one.
            None: unknown.
        node: what the call is in the graph if autograd records it.

    Returns:
        ``y, tables``

    Raises:
        RuntimeError: if a backward pass repeats a call that there was not, or that cannot be told
            from others.
    """
    if in_backward():
        if norm.layer is not None and x.numel():
            m, v = kernels.moments(x)
            norm = _call_of(norm, x, m, v, repeatable)
        return kernels.forward(x, norm._replace(update_rate=None), residual, activation)
    y, tables = kernels.forward(x, norm, residual, activation)
    if repeatable is not False and norm.layer is not None and x.numel():
        split = split_tables(tables, x.shape[0], x.shape[1], norm.group_weight.shape[0])
        _remember(norm, x, split.m, split.v, node)
    return y, tables


def _remember(norm: Normalization, x: Tensor, m: Tensor, v: Tensor, node: Any) -> None:
    """Notes a call of a layer, which has just been made; m, v: moments of x, (N, C)."""
    calls: List[_Call] = _calls.setdefault(norm.layer, [])
    done = [i for i, call in enumerate(calls) if call.repeated]
    if done:  # what came before has been repeated, or will not be
        del calls[: done[-1] + 1]
    del calls[: max(len(calls) - _MOST + 1, 0)]
    estimates = (norm.running_mean.clone(), norm.running_var.clone())
    alive = (lambda: None) if node is None else weakref.ref(node)
    calls.append(_Call(x.shape, m.mean(0), v.mean(0), *estimates, alive))


def _call_of(
    norm: Normalization, x: Tensor, m: Tensor, v: Tensor, recorded: Optional[bool]
) -> Normalization:
    """The normalization of the call that is repeated, by the estimates that it used."""
    calls = [call for call in _calls.get(norm.layer, []) if call.shape == x.shape]
    if not calls:
        raise RuntimeError(
            "a backward pass repeats a call of a BatchChannelNorm (activation checkpointing) for "
            f"an input of shape {tuple(x.shape)}, but the layer had none, or {_MOST} calls ago"
        )
    distances = torch.stack([call.distance(m.mean(0), v.mean(0)) for call in calls])
    if len(calls) == 1:
        # Without waiting for a GPU.
        assert_soon(distances[0] <= _TOLERANCE, _OTHER_INPUT)
        call = calls[0]
    else:
        near = distances.tolist()
        least = min(near)
        if not least <= _TOLERANCE:
            raise RuntimeError(_OTHER_INPUT)
        equal = [call for call, distance in zip(calls, near) if distance == least]
        # Reentrant checkpointing repeats calls that were not recorded, the other kind those whose
        # graph is there: neither a pass for its loss alone, nor one that an error ended.
        same = [call for call in equal if recorded in (None, call.node() is not None)]
        equal = same or equal
        call = equal[0]
        if not all(torch.equal(other.mean, call.mean) for other in equal):
            raise RuntimeError(
                "a backward pass repeats a call of a BatchChannelNorm (activation checkpointing) "
                f"that cannot be told from another one: {len(equal)} calls had equal inputs, and "
                "different estimates. Call the layer once for each backward pass, or without "
                "checkpointing"
            )
    call.repeated = True
    return norm._replace(running_mean=call.mean, running_var=call.var)


_OTHER_INPUT = (
    "a backward pass repeats a call of a BatchChannelNorm (activation checkpointing) with another "
    "input than any that the layer had"
)
