"""Weight standardization: the filters of a convolution are standardized before they are used.

    W_hat[o] = (W[o] - mean W[o]) / sqrt(var W[o] + eps)        for each output channel o

(arXiv 1903.10520v2, Eq. 11, with the biased variance and eps inside the root, as the paper writes
it.) Any constant offset of a filter is lost, and its scale is normalized away, so a normalization
layer should follow; the layers that predict must not be standardized.
"""

import logging
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import Tensor, nn
from torch.fx import Proxy

from ..ops import Geometry, standardize_weight, standardized_conv2d
from .folded import refuse_folded
from .fusion import normalize
from .tracing import node_of

logger = logging.getLogger("detectron2.wsbcn_d2")  # so that it is shown where Detectron2 is

_EPS = 1e-5
_MARK = "ws_eps"
_ADAPTATION = ("ws_scale", "ws_shift")


class WeightStandardized(nn.Module):
    """What all weight-standardized convolutions have in common; not to be used on its own.

    The state dict of such a layer has the keys of the plain one and ``ws_eps``, a float64 scalar.
    It tells weights that were trained under weight standardization from those that were not: the
    latter give another function here, which loading them reports. A checkpoint may also have
    ``ws_scale`` and ``ws_shift``, (C_out,): the filters used are then ``ws_scale * W_hat +
    ws_shift``. Conversion writes them, so that filters that were trained without weight
    standardization keep their scale and mean (the adaptive variant of Qiao et al., DetectoRS,
    arXiv 2006.02334); they are constant.

    Filters are standardized at each call: it computes with the weight that there is, whatever has
    changed it.

    Attributes:
        eps: added to the variance of a filter, inside the root; loaded with the weights.
        ws_scale, ws_shift: buffers, None unless a checkpoint brought them.
    """

    out_channels: int
    weight: Tensor
    eps: float
    ws_scale: Optional[Tensor]
    ws_shift: Optional[Tensor]

    def _init_standardization(self, eps: float) -> None:
        _check_filters(self)
        self.eps = eps
        # A buffer as well, which nothing reads: torch.distributed.checkpoint.state_dict, for models
        # of several processes, knows parameters and buffers only.
        self.register_buffer(_MARK, self._mark())
        for name in _ADAPTATION:
            self.register_buffer(name, None)

    def _mark(self) -> Tensor:
        device = self.weight.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which that lacks
        return torch.tensor(self.eps, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        self._buffers.pop(_MARK, None)  # `.half()` would change its value
        super()._apply(fn, *args, **kwargs)
        self._buffers[_MARK] = self._mark()
        return self

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        """As in any module, but what folds a norm into the filters is an error."""
        if name == "weight" and not self.training and self._is_rescaled(param):
            raise TypeError(
                "filters were multiplied by factors, as tools do that fold a BatchNorm into a "
                "convolution; standardization would undo that. Use wsbcn_d2.fold(model) first, "
                "which makes it a plain convolution"
            )
        super().register_parameter(name, param)

    def _is_rescaled(self, new: Optional[Tensor]) -> bool:
        """Whether new filters are those that the convolution has, each times a factor."""
        old = self._parameters.get("weight")
        if old is None or new is None or old.shape != new.shape or old.is_meta or new.is_meta:
            return False
        outputs = 1 if isinstance(self, nn.ConvTranspose2d) else 0
        a, b = (w.detach().float().transpose(0, outputs).flatten(1) for w in (old, new))
        b = b.to(a.device)
        factors = ((a * b).sum(1, True) / a.square().sum(1, True)).nan_to_num(1.0)
        # One factor for all, or 0, is none of a norm: scaled as a whole.
        changed = (factors - 1).abs().max() > 1e-4 and (factors - factors[0]).abs().max() > 1e-4
        return bool(changed) and torch.allclose(b, factors * a, 1e-4)

    def standardized_weight(self) -> Tensor:
        """The filters that the convolution uses, of the shape and dtype of ``weight``."""
        return self._adapted(standardize_weight(self.weight, self.eps))

    def _adapted(self, filters: Tensor) -> Tensor:
        scale, shift = self.ws_scale, self.ws_shift
        if scale is None or shift is None:
            return filters
        shape = [-1] + [1] * (filters.dim() - 1)
        return (filters * scale.view(shape) + shift.view(shape)).to(filters.dtype)

    def _save_to_state_dict(
        self, destination: Dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _MARK] = torch.tensor(self.eps, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Tensor],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        refuse_folded(local_metadata, prefix)
        mark = state_dict.pop(prefix + _MARK, None)
        if mark is not None:
            self.eps = float(mark)
        elif prefix + "weight" in state_dict:
            # `missing_keys` is one list for the whole model: say it once per load.
            if not any(key.endswith(_MARK) for key in missing_keys):
                logger.warning(
                    f"The weights loaded into {prefix}weight (and perhaps others) were not trained "
                    "with weight standardization: there is no record of it in the checkpoint. "
                    "Standardizing them changes what the model computes. Either convert them with "
                    "tools/convert_weights.py, which keeps what they compute, or use weights that "
                    "were trained with it, or remove '+WS' from the NORM options of the model."
                )
            missing_keys.append(prefix + _MARK)
        has_table = any(prefix + name in state_dict for name in _ADAPTATION)
        # Without a weight: it is computed from others (pruned, parametrized).
        if has_table or prefix + "weight" in state_dict:
            self._expect_adaptation(state_dict, prefix, error_msgs)
        self._buffers.pop(_MARK, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._buffers[_MARK] = self._mark()

    def _expect_adaptation(
        self, state_dict: Dict[str, Tensor], prefix: str, error_msgs: List[str]
    ) -> None:
        """Makes room for what the state dict has of it; if it cannot be right, for nothing."""
        given = {name: state_dict.get(prefix + name) for name in _ADAPTATION}
        expected, problems = (self.out_channels,), []
        for name, table in given.items():
            if table is None:
                problems.append(f"{prefix}{name} is missing")
            elif table.shape != expected:
                problems.append(f"{prefix}{name} is of shape {tuple(table.shape)}, not {expected}")
        fits = not problems
        if problems and any(table is not None for table in given.values()):
            error_msgs.extend(problems)
            for name in _ADAPTATION:
                state_dict.pop(prefix + name, None)
        for name in _ADAPTATION:
            self._buffers[name] = self._filter_table() if fits else None

    def _filter_table(self) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.empty(self.out_channels, dtype=dtype, device=self.weight.device)


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """``stride, padding, dilation, groups`` of a convolution whose padding is in numbers."""
    pairs: List[Any] = [conv.stride, conv.padding, conv.dilation]
    stride, padding, dilation = ((p, p) if isinstance(p, int) else p for p in pairs)
    return stride, padding, dilation, conv.groups


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """The filters of a transposed convolution, (C_out, C_in / groups, kh, kw), from its weight,
    (C_in, C_out / groups, kh, kw), and back: each of the groups that divide the inputs has outputs
    of its own."""
    return weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)


def adaptation(weight: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """Scale and shift that undo the standardization of plain filters (adaptive WS).

    Args:
        weight: (C_out, ...).
        eps: of our formula.

    Returns:
        ``ws_scale`` and ``ws_shift``, at least float32, (C_out,).
    """
    v, mean = torch.var_mean(weight.double().flatten(1), 1, correction=0)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.sqrt(v + eps).to(dtype), mean.to(dtype)


class WSConv2d(WeightStandardized, Conv2d):
    """A :class:`detectron2.layers.Conv2d` whose filters are standardized before use."""

    if TYPE_CHECKING:  # Detectron2 has no types, and TorchScript would take these for its own
        norm: Optional[nn.Module]
        activation: Optional[Callable[[Tensor], Tensor]]
        bias: Optional[Tensor]
        _conv_forward: Callable[[Tensor, Tensor, Optional[Tensor]], Tensor]

    def __init__(
        self,
        *args: Any,
        norm: Optional[nn.Module] = None,
        activation: Optional[Callable[[Tensor], Tensor]] = None,
        eps: float = _EPS,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: those of :class:`torch.nn.Conv2d`.
            norm: normalization layer applied to the output.
            activation: applied after the normalization.
            eps: added to the variance of each filter, inside the root.
        """
        super().__init__(*args, norm=norm, activation=activation, **kwargs)
        self._init_standardization(eps)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, C_in, H, W), N may be 0.

        Returns:
            (N, C_out, H_out, W_out)
        """
        if torch.jit.is_scripting():
            x = self._conv_forward(x, self.standardized_weight(), self.bias)
            if self.norm is not None:
                x = self.norm(x)
            if self.activation is not None:
                x = self.activation(x)
            return x
        else:
            if isinstance(x, Proxy):
                return node_of(self, x)
            return normalize(self.convolve(x), self.norm, activation=self.activation)

    @torch.jit.unused
    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone, without what follows it."""
        in_numbers = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if self.ws_scale is not None or not in_numbers or x.dim() != 4:
            return self._conv_forward(x, self.standardized_weight(), self.bias)
        return standardized_conv2d(x, self.weight, self.bias, self.eps, geometry_of(self))


class WSConvTranspose2d(WeightStandardized, nn.ConvTranspose2d):
    """A :class:`torch.nn.ConvTranspose2d` whose filters are standardized before use."""

    def __init__(self, *args: Any, eps: float = _EPS, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: those of :class:`torch.nn.ConvTranspose2d`.
            eps: added to the variance of each filter, inside the root.
        """
        super().__init__(*args, **kwargs)
        self._init_standardization(eps)

    def standardized_weight(self) -> Tensor:
        """The filters that the convolution uses, (C_in, C_out / groups, kh, kw)."""
        filters = standardize_weight(outputs_first(self.weight, self.groups), self.eps)
        return outputs_first(self._adapted(filters), self.groups)

    def forward(self, x: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        """
        Args:
            x: (N, C_in, H, W).
            output_size: as in :class:`torch.nn.ConvTranspose2d`.

        Returns:
            (N, C_out, H_out, W_out)
        """
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return node_of(self, x, output_size)
        output_padding = self._output_padding(
            x,
            output_size,
            self.stride,  # type: ignore[arg-type]  # lists are what TorchScript calls tuples
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            x,
            self.standardized_weight(),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]  # never a word, as for other convolutions
            output_padding,
            self.groups,
            self.dilation,
        )


# The plain classes and what they become. Only exact types are listed: a subclass may use its weight
# in a way that its standardized counterpart would not.
_STANDARDIZED: Dict[Type[nn.Module], Type[WeightStandardized]] = {
    Conv2d: WSConv2d,
    nn.Conv2d: WSConv2d,
    nn.ConvTranspose2d: WSConvTranspose2d,
}

# Detectron2 installed without its compiled ops has placeholders for these two that cannot be
# constructed, nor be a base class.
if issubclass(DeformConv, nn.Module):

    def _convolve(
        module: Any, filters: Tensor, forward: Callable[..., Tensor], *args: Any
    ) -> Tensor:
        """``forward(*args)`` of a module with other filters, and without its norm and activation.

        Instance attributes hide the parameter and the layer of the same names.
        """
        activation = module.activation
        object.__setattr__(module, "weight", filters)
        object.__setattr__(module, "norm", None)
        module.activation = None
        try:
            return forward(*args)
        finally:
            object.__delattr__(module, "weight")
            object.__delattr__(module, "norm")
            module.activation = activation

    def _normalized(module: Any, x: Tensor) -> Tensor:
        if module.norm is not None:
            x = module.norm(x)
        return x if module.activation is None else module.activation(x)

    class WSDeformConv(WeightStandardized, DeformConv):
        """A :class:`detectron2.layers.DeformConv` whose filters are standardized before use."""

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            """The arguments are those of :class:`detectron2.layers.DeformConv`."""
            filters = self.standardized_weight()
            return _normalized(self, _convolve(self, filters, super().forward, x, offset))

    class WSModulatedDeformConv(WeightStandardized, ModulatedDeformConv):
        """A :class:`detectron2.layers.ModulatedDeformConv` with standardized filters."""

        def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
            """The arguments are those of :class:`detectron2.layers.ModulatedDeformConv`."""
            filters = self.standardized_weight()
            return _normalized(self, _convolve(self, filters, super().forward, x, offset, mask))

    _STANDARDIZED[DeformConv] = WSDeformConv
    _STANDARDIZED[ModulatedDeformConv] = WSModulatedDeformConv


def weights_per_filter(conv: Any) -> int:
    """How many weights the filter of one output channel of a convolution has."""
    return conv.weight.numel() // conv.out_channels


def _check_filters(conv: nn.Module) -> None:
    if weights_per_filter(conv) == 1:
        raise ValueError(
            "filters of one weight each (1x1, depthwise) would be standardized to 0: leave this "
            f"convolution of {conv.out_channels} channels without weight standardization"
        )


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution that :func:`standardize_` accepts, or was given to it."""
    return isinstance(module, WeightStandardized) or type(module) in _STANDARDIZED


def standardize_(conv: nn.Module) -> nn.Module:
    """Turns a convolution into its weight-standardized counterpart, in place.

    The object stays the same and only its class changes, so that everything that refers to it,
    such as the plain lists of :class:`detectron2.modeling.FPN`, sees the change. A convolution
    that is standardized already is left alone.

    Args:
        conv: an instance, not of a subclass, of Conv2d, ConvTranspose2d, DeformConv or
            ModulatedDeformConv.

    Returns:
        ``conv``

    Raises:
        TypeError: if ``conv`` is something else.
        ValueError: if its filters have one weight each, which would become 0.
    """
    if isinstance(conv, WeightStandardized):
        return conv
    if type(conv) not in _STANDARDIZED:
        raise TypeError(
            f"cannot standardize the weights of a {type(conv).__module__}.{type(conv).__name__}; "
            f"allowed are {', '.join(sorted({c.__name__ for c in _STANDARDIZED}))}"
        )
    _check_filters(conv)
    changing: Any = conv
    if type(conv) is Conv2d:
        changing.padding_mode = "zeros"  # whatever it says, Detectron2's pads with zeros
    if type(conv) is nn.Conv2d:
        changing.norm, changing.activation = None, None
    changing.__class__ = _STANDARDIZED[type(conv)]
    changing._init_standardization(_EPS)
    return conv
