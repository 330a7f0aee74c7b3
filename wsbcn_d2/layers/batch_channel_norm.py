"""Batch-channel normalization and its channel part, as modules.

Both are subclasses of :class:`torch.nn.GroupNorm`, which is what tools that look for normalization
layers expect: Detectron2's solver gives their parameters ``WEIGHT_DECAY_NORM``, and the helpers
that replace BatchNorm layers (FrozenBN conversion, SyncBN conversion, quantization), which would
silently drop the channel normalization, leave them alone.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..ops import (
    Normalization,
    batch_channel_norm,
    batch_channel_norm_by,
    channel_norm,
    in_backward,
    is_trainable,
    several_ranks,
)
from .folded import refuse_folded
from .sharing import notice_levels
from .tracing import node_of

MODES = ("estimate", "batch", "sync")
_ESTIMATES = ("running_mean", "running_var", "seen_elements")


def check_groups(num_groups: int, num_channels: int) -> None:
    """Raises ValueError unless ``num_groups`` is positive and divides ``num_channels``."""
    if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
        raise ValueError(
            f"{num_channels} channels cannot be divided into {num_groups} groups of equal size"
        )


def check_input(x: Tensor, num_channels: int) -> None:
    """Raises ValueError unless ``x`` is of shape (N, num_channels, H, W) and a floating dtype."""
    if not x.is_floating_point():
        raise ValueError(f"expected an input of a floating dtype, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] != num_channels:
        raise ValueError(f"expected an input of shape (N, {num_channels}, H, W), got {x.shape}")


class ChannelNorm(nn.GroupNorm):
    """Channel normalization: group normalization whose affine is per group.

    The second half of :class:`BatchChannelNorm` on its own (arXiv 1903.10520v2, Section 3.3; the
    affine per group follows the authors' code).

    Attributes:
        weight, bias: (num_groups,), initialized to 1 and 0.
    """

    def __init__(self, num_channels: int, num_groups: int = 32, eps: float = 1e-5) -> None:
        """
        Args:
            num_channels: C of the (N, C, H, W) inputs.
            num_groups: number of groups; must divide ``num_channels``.
            eps: added to the variance, inside the root.

        Raises:
            ValueError: if the groups do not divide the channels.
        """
        check_groups(num_groups, num_channels)
        super().__init__(num_groups, num_channels, eps, affine=False)
        self.weight = nn.Parameter(torch.ones(num_groups))
        self.bias = nn.Parameter(torch.zeros(num_groups))

    def reset_parameters(self) -> None:
        """Sets weight to 1 and bias to 0."""
        if self.weight is not None:  # not yet there in the constructor of the base class
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, C, H, W).

        Returns:
            Tensor of the same shape.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return node_of(self, x)
        if not torch.jit.is_tracing():
            check_input(x, self.num_channels)
        return channel_norm(x, self.weight, self.bias, self.eps)

    def _load_from_state_dict(
        self, state_dict: Dict[str, Tensor], prefix: str, local_metadata: Dict[str, Any], *args: Any
    ) -> None:
        refuse_folded(local_metadata, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, groups={self.num_groups}"


class BatchChannelNorm(nn.GroupNorm):
    """Batch-channel normalization (arXiv 1903.10520v2, Section 3.3 and Algorithm 1).

    Batch normalization, then channel normalization over groups of channels of each image; see
    :mod:`wsbcn_d2.ops.batch_channel_norm` for the equations. Modes:

    - ``"estimate"``: the batch normalization uses running estimates of the batch statistics, in
      training too, so that it works with a single image. Each training forward moves the estimates
      by ``update_rate`` towards the batch and then normalizes with them.
    - ``"batch"``: the batch normalization is that of :class:`torch.nn.BatchNorm2d` (for large
      batches).
    - ``"sync"``: the same with statistics over the batches of all ranks, on any device, and with
      empty batches on some ranks allowed. Every rank must call the layer equally often.

    The estimates are updated in training mode only, and not while all affine parameters have
    ``requires_grad=False``: a frozen layer normalizes with the estimates it has, in every mode.
    The update also happens under ``no_grad``, but not when activation checkpointing repeats a call:
    that uses the estimates of the call (:mod:`wsbcn_d2.ops.recomputation`). A batch with a
    non-finite value leaves the estimates of the layer as they are and is counted in
    ``skipped_updates``. The estimates stay in float32 (float64 after ``.double()``) whatever the
    dtype of the module.

    Attributes:
        weight, bias: affine of the batch normalization, (C,).
        group_weight, group_bias: affine of the channel normalization, (num_groups,).
        running_mean, running_var: estimates, (C,), or (num_levels, C) after
            :meth:`set_num_levels`. With ``weight`` and ``bias`` they have the names of BatchNorm,
            so that checkpoints of BatchNorm models load into this layer.
        skipped_updates: number of non-finite batches seen; an integer buffer, not saved.
        seen_elements: number of values behind the updates since it was last reset, for averaging
            over ranks; (num_levels,) with several levels; not saved.
        update_rate: float in [0, 1]; constant unless something outside changes it.
        level: index of the estimates that the next call uses; see :meth:`set_num_levels`.
        first_size: height and width of the first input of training, () before that, and None when
            it need not be known any more; see :mod:`.sharing`.
    """

    running_mean: Tensor
    running_var: Tensor
    skipped_updates: Tensor
    seen_elements: Tensor

    __jit_unused_properties__ = ["frozen", "num_levels"]

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        update_rate: float = 0.1,
        mode: str = "estimate",
    ) -> None:
        """
        Args:
            num_channels: C of the (N, C, H, W) inputs.
            num_groups: groups of the channel normalization; must divide ``num_channels``.
            eps: added to both variances, inside the roots.
            update_rate: fraction, in [0, 1], by which the estimates move towards each batch.
            mode: "estimate", "batch" or "sync".

        Raises:
            ValueError: if the groups do not divide the channels, the rate is out of range or the
                mode is unknown.
        """
        check_groups(num_groups, num_channels)
        if not 0.0 <= update_rate <= 1.0:
            raise ValueError(f"update_rate must be in [0, 1], got {update_rate}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        super().__init__(num_groups, num_channels, eps)
        self.update_rate = update_rate
        self.mode = mode
        self.group_weight = nn.Parameter(torch.ones(num_groups))
        self.group_bias = nn.Parameter(torch.zeros(num_groups))
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.zeros(num_channels, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_channels, dtype=dtype))
        self.register_buffer("skipped_updates", torch.tensor(0), persistent=False)
        self.register_buffer("seen_elements", torch.zeros((), dtype=dtype), persistent=False)
        self.level = 0
        self.first_size: Optional[Tuple[int, ...]] = ()

    def reset_parameters(self) -> None:
        """Sets weights to 1, biases to 0, the estimates to (0, 1) and the counters to 0."""
        super().reset_parameters()
        if "group_weight" not in self._parameters:
            return  # called by the constructor of the base class
        nn.init.ones_(self.group_weight)
        nn.init.zeros_(self.group_bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.skipped_updates.zero_()
        self.seen_elements.zero_()
        self.level = 0

    @property
    def frozen(self) -> bool:
        """True if no affine parameter is trainable; the estimates are then constant."""
        # Not self.parameters(): a replica of DataParallel, or FSDP, has tensors in their place.
        return _are_frozen(self.weight, self.bias, self.group_weight, self.group_bias)

    @property
    def num_levels(self) -> int:
        """Number of estimates that the layer cycles through; see :meth:`set_num_levels`."""
        return self.running_mean.shape[0] if self.running_mean.dim() == 2 else 1

    def set_num_levels(self, num_levels: int) -> None:
        """Keeps separate estimates for each of ``num_levels`` feature levels.

        For a layer that a head shares between the levels of a feature pyramid, as
        :class:`detectron2.layers.CycleBatchNormList` does for BatchNorm: the affine parameters are
        shared, and consecutive calls use the estimates of consecutive levels. The caller must call
        the layer once for each level, in order. All levels start from the present estimates.
        """
        if num_levels < 1:
            raise ValueError(f"num_levels must be positive, got {num_levels}")
        if self.running_mean.dim() == 2:
            raise ValueError(f"the layer already has estimates for {self.num_levels} levels")
        self.running_mean = self.running_mean.expand(num_levels, -1).clone()
        self.running_var = self.running_var.expand(num_levels, -1).clone()
        self.seen_elements = self.seen_elements.expand(num_levels).clone()
        self.level = 0
        self.first_size = None

    def restart_levels(self) -> None:
        """Makes the next call use the estimates of the first level."""
        self.level = 0

    def forward(self, x: Tensor, residual: Optional[Tensor] = None, activation: str = "") -> Tensor:
        """
        Args:
            x: (N, C, H, W), N may be 0.
            residual: of the shape and dtype of x, added to the result.
            activation: "" or "relu", applied to the result, after that addition. Neither needs a
                further pass over x.

        Returns:
            Tensor of the same shape, dtype and memory format.

        Raises:
            ValueError: if x or residual has another shape.
        """
        if torch.jit.is_scripting():
            return self._exported(x, residual, activation)
        else:  # TorchScript does not compile what is in the branch not taken
            if isinstance(x, Proxy):
                return node_of(self, x, residual, activation)
            if not self.training and torch.jit.is_tracing():
                return self._exported(x, residual, activation)
            return self._normalized(x, residual, activation)

    @torch.jit.unused
    def _normalized(self, x: Tensor, residual: Optional[Tensor], activation: str) -> Tensor:
        check_input(x, self.num_channels)
        y = batch_channel_norm(x, self.normalization(), residual, activation)
        if self.training and self.first_size is not None:
            notice_levels(self, x, y)
        return y

    @torch.jit.unused
    def normalization(self) -> Normalization:
        """What the operation is to be called with, for one call, which it counts as one."""
        parameters = (self.weight, self.bias, self.group_weight, self.group_bias)
        mean, var, seen = self.running_mean, self.running_var, self.seen_elements
        if mean.dim() == 2:
            level = self._next_level()
            mean, var, seen = mean[level], var[level], seen[level]
        training = self.training and not _are_frozen(*parameters)
        of_batch = training and self.mode != "estimate"
        # Where calls differ in what they normalize by.
        differ = not of_batch and (training or self.num_levels > 1)
        return Normalization(
            *parameters,
            mean,
            var,
            eps=self.eps,
            use_batch_statistics=of_batch,
            update_rate=self.update_rate if training else None,
            skipped_updates=self.skipped_updates,
            seen_elements=seen,
            synchronize=of_batch and self.mode == "sync" and several_ranks(),
            layer=self.running_mean if differ else None,
        )

    def _next_level(self) -> int:
        """The level of a call; of one that activation checkpointing repeats the operation knows by
        which estimates it was."""
        level = self.level
        if not in_backward():
            self.level = (level + 1) % self.num_levels
        return level

    def _exported(self, x: Tensor, residual: Optional[Tensor], activation: str) -> Tensor:
        """Evaluation by stock operations, for TorchScript, which knows no autograd functions and
        whose traces must hold for inputs of any size."""
        mean, var = self.running_mean, self.running_var
        if mean.dim() == 2:
            mean, var = mean[self.level], var[self.level]
            self.level = (self.level + 1) % self.running_mean.shape[0]
        return batch_channel_norm_by(
            x,
            mean,
            torch.rsqrt(var + self.eps),
            self.weight,
            self.bias,
            self.group_weight,
            self.group_bias,
            self.eps,
            residual,
            activation,
        )

    def extra_repr(self) -> str:
        levels = f", levels={self.num_levels}" if self.num_levels > 1 else ""
        return (
            f"{self.num_channels}, groups={self.num_groups}, mode={self.mode}, "
            f"update_rate={self.update_rate}{levels}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        # Half precision cannot hold the variances that occur (a stem's exceeded its range after
        # one step), so a change of dtype may only raise that of the estimates.
        estimates = {name: getattr(self, name) for name in _ESTIMATES}
        super()._apply(fn, *args, **kwargs)
        for name, old in estimates.items():
            new = getattr(self, name)
            if torch.finfo(new.dtype).bits < 32:
                self._buffers[name] = old.to(device=new.device, dtype=torch.float32)
        return self

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
        # BatchNorm's counter has no counterpart here.
        state_dict.pop(prefix + "num_batches_tracked", None)
        if self.running_mean.dim() == 2:
            for name in ("running_mean", "running_var"):
                self._load_levels(state_dict, prefix, name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in _ESTIMATES:  # with assign=True they are those given
            self._buffers[name] = _at_least_float32(getattr(self, name))

    def _load_levels(self, state_dict: Dict[str, Tensor], prefix: str, name: str) -> None:
        """Takes the estimates of the levels from the layers of a CycleBatchNormList."""
        levels: List[Any] = []
        for i in range(self.num_levels):
            levels.append(state_dict.pop(f"{prefix}{i}.{name}", None))
            state_dict.pop(f"{prefix}{i}.num_batches_tracked", None)
        if all(level is not None for level in levels):
            state_dict[prefix + name] = torch.stack(levels)


def _at_least_float32(table: Tensor) -> Tensor:
    return table.float() if torch.finfo(table.dtype).bits < 32 else table


def _are_frozen(weight: Tensor, bias: Tensor, group_weight: Tensor, group_bias: Tensor) -> bool:
    return not (
        is_trainable(weight)
        or is_trainable(bias)
        or is_trainable(group_weight)
        or is_trainable(group_bias)
    )
