"""The norm options: strings that describe a normalization completely.

    NAME                    BCN, CN, GN, BN, ...
    NAME(key=value, ...)    BCN(groups=16), BCN(groups=16, update_rate=0.01), GN(groups=8)
    either of them + "+WS"  BCN+WS, GN(groups=8)+WS: the convolution that the layer follows is
                            weight-standardized

Strings are the interface because they survive YAML files, config dumps and checkpoints.
"""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Union

from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.layers.batch_norm import LayerNorm
from torch import nn

from .layers import BatchChannelNorm, ChannelNorm

_WS = "+WS"

# Where a norm layer keeps its WeightStandardizationRequest. The request must be found when the
# layer becomes part of a model, whoever puts it there, so it travels with the layer.
_WS_ATTRIBUTE = "weight_standardization_request"


_Value = Union[int, float]  # of an argument


@dataclass
class WeightStandardizationRequest:
    """The wish of a norm layer that the convolution that feeds it be standardized.

    Attributes:
        channels: outputs of the convolution.
        done: whether that has happened; the layer may then be put anywhere else as well.
    """

    channels: int
    done: bool = False


@dataclass(frozen=True)
class _Kind:
    """A normalization that can be asked for by name."""

    build: Callable[..., nn.Module]  # called with the number of channels and the arguments
    defaults: Dict[str, _Value]  # the arguments that the string may contain


def _batch_channel_norm(mode: str) -> Callable[..., nn.Module]:
    def build(channels: int, groups: int, update_rate: float) -> nn.Module:
        return BatchChannelNorm(channels, groups, update_rate=update_rate, mode=mode)

    return build


_GROUPS: Dict[str, _Value] = {"groups": 32}
_BCN_DEFAULTS: Dict[str, _Value] = {"groups": 32, "update_rate": 0.1}

_KINDS: Dict[str, _Kind] = {
    "BCN": _Kind(_batch_channel_norm("estimate"), _BCN_DEFAULTS),
    "BatchBCN": _Kind(_batch_channel_norm("batch"), _BCN_DEFAULTS),
    "SyncBCN": _Kind(_batch_channel_norm("sync"), _BCN_DEFAULTS),
    "CN": _Kind(lambda channels, groups: ChannelNorm(channels, groups), _GROUPS),
    "GN": _Kind(lambda channels, groups: nn.GroupNorm(groups, channels), _GROUPS),
    # Detectron2's own
    "BN": _Kind(nn.BatchNorm2d, {}),
    "SyncBN": _Kind(nn.SyncBatchNorm, {}),
    "FrozenBN": _Kind(FrozenBatchNorm2d, {}),
    "nnSyncBN": _Kind(nn.SyncBatchNorm, {}),
    "naiveSyncBN": _Kind(NaiveSyncBatchNorm, {}),
    "naiveSyncBN_N": _Kind(lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N"), {}),
    "LN": _Kind(LayerNorm, {}),
}


def list_norm_options() -> List[str]:
    """All names, those of this package first; each may be followed by ``+WS``."""
    return list(_KINDS)


@dataclass(frozen=True)
class NormOption:
    """A parsed norm option.

    Attributes:
        name: one of :func:`list_norm_options`.
        arguments: the arguments written in the string.
        weight_standardization: whether it ends in ``+WS``.
    """

    name: str
    arguments: Dict[str, _Value]
    weight_standardization: bool

    @classmethod
    def parse(cls, option: str) -> "NormOption":
        """Reads a norm option.

        Args:
            option: the string, for example ``"BCN(groups=16)+WS"``; blanks do not matter.

        Raises:
            ValueError: naming what was found and what is allowed.
        """
        text = "".join(option.split())
        standardized = text.endswith(_WS)
        match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text[: -len(_WS)] if standardized else text)
        if match is None or match[1] not in _KINDS:
            by_small_letters = {name.lower(): name for name in _KINDS}
            word = re.split(r"\W", text)[0].lower()
            close = [
                by_small_letters[name] + _WS * ("+" in text)
                for name in difflib.get_close_matches(word, by_small_letters, n=3, cutoff=0.5)
            ]
            raise ValueError(
                f"unknown norm option {option!r}"
                + f"; close to it are {', '.join(close)}" * bool(close)
                + f"; allowed are {', '.join(_KINDS)}, each optionally "
                "followed by '+WS', and '' for none. Groups are written as in 'BCN(groups=16)+WS'."
            )
        arguments = _parse_arguments(option, match[1], match[2] or "")
        return cls(match[1], arguments, standardized)

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return (
            self.name
            + (f"({arguments})" if arguments else "")
            + (_WS if self.weight_standardization else "")
        )

    @property
    def groups(self) -> Optional[int]:
        """Those of the channel or group normalization; None if there is none."""
        groups = {**_KINDS[self.name].defaults, **self.arguments}.get("groups")
        return None if groups is None else int(groups)

    def with_one_group(self) -> "NormOption":
        """The same kind of layer for any number of channels, without weight standardization."""
        groups: Dict[str, _Value] = {"groups": 1} if "groups" in _KINDS[self.name].defaults else {}
        return NormOption(self.name, groups, False)

    def check_channels(self, out_channels: int, *others: int) -> None:
        """
        Args:
            out_channels: channels of a layer.
            others: those of other layers, for the string in the error to fit them, too.

        Raises:
            ValueError: if the groups do not divide the channels; it names the string that would
                work.
        """
        groups = self.groups
        if groups is None or out_channels % groups == 0:
            return
        fitting = {**self.arguments, "groups": math.gcd(groups, out_channels, *others)}
        possible = NormOption(self.name, fitting, self.weight_standardization)
        raise ValueError(
            f"norm option {str(self)!r}: {out_channels} channels cannot be divided into "
            f"{groups} groups; {str(possible)!r} would work" + (" for all layers" if others else "")
        )

    def build(self, out_channels: int) -> nn.Module:
        """Builds the layer for a number of channels.

        Args:
            out_channels: channels of the (N, C, H, W) inputs of the layer.

        Returns:
            The normalization layer. If the option asks for weight standardization, it says so to
            :func:`weight_standardization_request`.

        Raises:
            ValueError: if the groups do not divide the channels; it names the string that would
                work.
        """
        self.check_channels(out_channels)
        kind = _KINDS[self.name]
        arguments = {**kind.defaults, **self.arguments}
        norm = kind.build(out_channels, **arguments)
        if self.weight_standardization:
            norm.__dict__[_WS_ATTRIBUTE] = WeightStandardizationRequest(out_channels)
        return norm


def get_norm(
    norm: Union[str, Callable[[int], nn.Module], None], out_channels: int
) -> Optional[nn.Module]:
    """A superset of :func:`detectron2.layers.get_norm`.

    Args:
        norm: a norm option; or a callable that takes the number of channels and returns a layer;
            or None or "" for no normalization.
        out_channels: channels of the (N, C, H, W) inputs of the layer.

    Returns:
        The layer or None.

    Raises:
        ValueError: if the string is no norm option, or its groups do not divide the channels.
    """
    if norm is None or norm == "":
        return None
    if isinstance(norm, str):
        return NormOption.parse(norm).build(out_channels)
    return norm(out_channels)


def weight_standardization_request(module: nn.Module) -> Optional[WeightStandardizationRequest]:
    """The request of a norm layer; None if its option is without ``+WS``, or it is none."""
    return module.__dict__.get(_WS_ATTRIBUTE)


def _parse_arguments(option: str, name: str, text: str) -> Dict[str, _Value]:
    defaults = _KINDS[name].defaults
    arguments: Dict[str, _Value] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in defaults or key in arguments:
            raise ValueError(
                f"norm option {option!r}: bad argument {item!r}; {name} takes "
                + (", ".join(f"{k} (default {v})" for k, v in defaults.items()) or "no arguments")
                + (", each at most once" if defaults else "")
            )
        arguments[key] = _parse_value(option, key, value, type(defaults[key]))
    return arguments


def _parse_value(option: str, key: str, text: str, kind: Any) -> _Value:
    allowed = "a positive integer" if kind is int else "a number in [0, 1]"
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not (value >= 1 if kind is int else 0.0 <= value <= 1.0):
        raise ValueError(f"norm option {option!r}: {key} must be {allowed}, got {text!r}")
    return value
