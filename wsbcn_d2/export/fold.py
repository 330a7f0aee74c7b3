"""Folding: a model of stock layers that computes what a trained model computes.

Weight standardization, and the estimates of BCN, are constant once training has ended. With the
standardized filters ``W_hat`` and bias ``b`` of a convolution, and the estimates of the BCN layer
that follows it,

    a = weight / sqrt(running_var + eps)
    z = a (W_hat * x + b - running_mean) + bias = (a W_hat) * x + (a (b - running_mean) + bias)

is a plain convolution, also where the image is padded, since that happens before the filters. What
remains of BCN is its channel normalization, which is :class:`torch.nn.GroupNorm` with the affine
parameters of a group repeated for each of its channels.
"""

import copy
from collections import defaultdict
from typing import Any, Dict, List, Optional, Set, Tuple, Type, Union, cast

import torch
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d, ModulatedDeformConv
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..layers import BatchChannelNorm, ChannelNorm, WeightStandardized, become

_PACKAGE = __name__.partition(".")[0]

# What a convolution with a bias can be. Only exact types: a subclass may do more than convolve.
_CONVOLUTIONS = (nn.Conv2d, Conv2d, nn.ConvTranspose2d, ModulatedDeformConv)
_Convolution = Union[nn.Conv2d, nn.ConvTranspose2d, ModulatedDeformConv]
# Those of them that call the layer in their attribute `norm`.
_OWN_NORM = (Conv2d, ModulatedDeformConv)

# Modules by id, with the parents and the names that they are registered under.
_Owners = Dict[int, List[Tuple[nn.Module, str]]]


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Makes a copy of a model that needs nothing of this package.

    - A weight-standardized convolution becomes the plain one with the standardized filters.
    - BCN behind a convolution (as its ``norm``, or next to it in a Sequential, which must be called
      as a whole, or in a module of Detectron2) becomes filters and bias of the convolution, and
      :class:`torch.nn.GroupNorm`.
    - BCN elsewhere becomes Detectron2's FrozenBatchNorm2d followed by GroupNorm: where it follows
      something else, where one of the two is used in several places, and behind a DeformConv,
      which has no bias.
    - BCN with estimates for each feature level becomes Detectron2's CycleBatchNormList followed by
      GroupNorm. As everywhere in Detectron2, this counts calls: after a forward pass that an
      exception ended halfway, set its ``_pos`` to 0.
    - The channel normalization alone becomes GroupNorm. Other normalization layers stay.
    - Fused blocks and heads of this package, and checkpointed blocks, become Detectron2's.

    The outputs are those of ``model.eval()`` up to rounding. There is one difference: GroupNorm
    refuses an input with a single value in each group (one image of one pixel, and one channel in
    a group), which BCN maps to ``group_bias``.

    The result is for inference: it is in evaluation mode, no parameter has ``requires_grad``, and
    without standardization and estimates it would not train like the original, as the authors of
    the paper warn too. To go on with training, use the original.

    Args:
        model: any model that contains layers of this package. It is left as it is. Half precision
            is folded in half precision: rather fold first.

    Returns:
        A new model on the same device, with stock classes only, and without hooks of this package.

    Raises:
        TypeError: if a module is of a class derived from one of this package, for which there is
            no stock counterpart, or something else than its class decides what it computes: a
            method of its own, or a pre-hook that may change its filters.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    model = copy.deepcopy(model, _computed_tensors(model)).eval().requires_grad_(False)
    modules: List[Any] = list(model.modules())  # their classes change
    for name, module in model.named_modules():
        _strip(module)
        if isinstance(module, (WeightStandardized, BatchChannelNorm, ChannelNorm)):
            _make_permanent(module)
            _check_own_forward(name or "the model", module)
        if not _is_ours(type(module)):
            continue
        if isinstance(module, WeightStandardized):
            _fold_standardization(module)
        elif not isinstance(module, (BatchChannelNorm, ChannelNorm)):
            module.__class__ = _stock_class(type(module))
    owners: _Owners = defaultdict(list)
    for parent in modules:
        for name, child in parent._modules.items():
            owners[id(child)].append((parent, name))
    for module in modules:
        if not _is_ours(type(module)):
            continue
        if isinstance(module, BatchChannelNorm):
            _fold_batch_channel_norm(module, owners)
        else:
            _become(module, _group_norm(module, module.weight, module.bias))
    for name, module in model.named_modules():
        _check_stock(name or "the model", module)
    return model


# -------------------------------------------------------------------- what computes its own weights


def _computed_tensors(model: nn.Module) -> Dict[int, Tensor]:
    """Copies of what hooks have computed in the last forward pass (of pruned layers, for example),
    which cannot be copied with the modules: they are part of a graph."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _make_permanent(module: nn.Module) -> None:
    """Makes parameters that PyTorch's utilities compute from others what they are at present."""
    from torch.nn.utils import prune  # which nothing else imports

    if parametrize.is_parametrized(module):
        # Not remove_parametrizations, which changes the class, that copies of a module share.
        names = cast(nn.ModuleDict, module.parametrizations)
        values = {name: getattr(module, name) for name in names}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            setattr(module, name, _parameter(value))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)


def _check_own_forward(name: str, module: nn.Module) -> None:
    """
    Raises:
        TypeError: if more than its class and its parameters may decide what a module computes.
    """
    found = ""
    method = _own_method(module)
    if method:
        found = f"it has a {method} of its own"
    elif isinstance(module, WeightStandardized):
        if "weight" not in module._parameters:
            found = "its weight is no parameter"
        elif module._forward_pre_hooks:
            found = "its forward pre-hooks may change its weight; remove them first"
    elif module._modules:
        found = f"there are modules in it ({', '.join(module._modules)})"
    if found:
        raise TypeError(f"cannot fold {name}, a {type(module).__name__}: {found}")


def _own_method(module: nn.Module) -> str:
    """The name of a method that someone has put into a module in the place of its class's."""
    return next((n for n in vars(module) if callable(getattr(type(module), n, None))), "")


# ------------------------------------------------------------------------------------ convolutions


def _fold_standardization(conv: WeightStandardized) -> None:
    dtype = conv.weight.dtype
    conv.weight = _parameter(conv.weight.double())
    weight = conv.standardized_weight()
    stock: Type[nn.Module] = _stock_class(type(conv))
    if stock is Conv2d and conv.norm is None and conv.activation is None:
        stock = nn.Conv2d  # which, unlike Detectron2's, heeds the padding mode
    elif getattr(conv, "padding_mode", "zeros") != "zeros":
        raise TypeError(
            f"cannot fold a convolution with a norm or activation of its own and padding_mode="
            f"{conv.padding_mode!r}: detectron2.layers.Conv2d pads with zeros only"
        )
    # Whatever else there is, a hook may need.
    ours = {*_attributes(type(conv)(2, 2, 1)), *vars(WeightStandardized)}
    ours -= _attributes(stock(2, 2, 1))
    conv.__class__ = stock  # type: ignore[assignment]
    for name in ours & _attributes(conv):
        delattr(conv, name)
    conv.weight = _parameter(weight.to(dtype))


def _attributes(module: nn.Module) -> Set[str]:
    return {*vars(module), *module._parameters, *module._buffers}


def _feeding_convolution(norm: nn.GroupNorm, owners: _Owners) -> Optional[_Convolution]:
    """The convolution whose output is the input of a norm layer, and goes nowhere else; None if
    it is not certain that there is one."""
    if len(owners[id(norm)]) != 1 or norm._forward_hooks or norm._forward_pre_hooks:
        return None  # hooks are to see the same inputs as before
    parent, name = owners[id(norm)][0]
    if type(parent) in _OWN_NORM:
        return parent if name == "norm" and _is_plain(parent) else None
    # Modules of Detectron2 register a norm layer right after the convolution that feeds it.
    if type(parent).forward is not nn.Sequential.forward:
        if type(parent).__module__.partition(".")[0] != "detectron2":
            return None
    before = list(parent._modules.values())[: list(parent._modules).index(name)]
    before = [module for module in before if module is not None]
    conv: Any = before[-1] if before else None
    if (
        type(conv) not in _CONVOLUTIONS
        or len(owners[id(conv)]) != 1
        or conv.out_channels != norm.num_channels
        or conv._forward_hooks
        or not _is_plain(conv)
        or getattr(conv, "norm", None) is not None
        or getattr(conv, "activation", None) is not None
    ):
        return None
    return conv


def _is_plain(conv: nn.Module) -> bool:
    """Whether a convolution computes with its parameters, which no hook changes."""
    changing = conv._forward_pre_hooks or _own_method(conv)
    return not changing and "weight" in conv._parameters and "bias" in conv._parameters


def _scale_outputs(conv: _Convolution, scale: Tensor, shift: Tensor) -> None:
    """Makes the outputs of a convolution ``scale * conv(x) + shift``, each (C_out,), float64."""
    weight = conv.weight.double()
    if isinstance(conv, nn.ConvTranspose2d):
        # (C_in, C_out / groups, kh, kw): each group of inputs has outputs of its own
        weight = weight.unflatten(0, (conv.groups, -1))
        weight = (weight * scale.view(conv.groups, 1, -1, 1, 1)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, 1, 1)
    if conv.bias is not None:
        shift = shift + scale * conv.bias.double()
    dtype = conv.weight.dtype
    conv.weight, conv.bias = _parameter(weight.to(dtype)), _parameter(shift.to(dtype))


# ---------------------------------------------------------------------------- normalization layers


def _fold_batch_channel_norm(norm: BatchChannelNorm, owners: _Owners) -> None:
    group_norm = _group_norm(norm, norm.group_weight, norm.group_bias)
    if norm.running_mean.dim() == 2:
        _become(norm, nn.Sequential(_cycle_batch_norms(norm), group_norm))
        return
    conv = _feeding_convolution(norm, owners)
    if conv is None:
        _become(norm, nn.Sequential(_frozen_batch_norm(norm), group_norm))
        return
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    _scale_outputs(conv, scale, norm.bias.double() - scale * norm.running_mean.double())
    _become(norm, group_norm)


def _become(norm: nn.Module, new: nn.Module) -> None:
    """As ``become``, but what a user has put into the layer, for hooks, stays."""
    fresh = type(norm)(norm.num_channels, norm.num_groups)
    added = {key: value for key, value in vars(norm).items() if key not in vars(fresh)}
    for key in ("_parameters", "_buffers"):
        own = vars(fresh)[key]
        vars(new)[key].update({k: v for k, v in vars(norm)[key].items() if k not in own})
    become(norm, new.eval())
    vars(norm).update(added)


def _group_norm(norm: nn.GroupNorm, group_weight: Tensor, group_bias: Tensor) -> nn.GroupNorm:
    channels = norm.num_channels // norm.num_groups
    group_norm = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    group_norm.weight = _parameter(group_weight.repeat_interleave(channels))
    group_norm.bias = _parameter(group_bias.repeat_interleave(channels))
    return group_norm


def _frozen_batch_norm(norm: BatchChannelNorm) -> FrozenBatchNorm2d:
    # In the dtype of the estimates, which half precision could not hold.
    batch_norm = FrozenBatchNorm2d(norm.num_channels, norm.eps).to(norm.running_mean)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(batch_norm, name).copy_(getattr(norm, name))
    return batch_norm


def _cycle_batch_norms(norm: BatchChannelNorm) -> CycleBatchNormList:
    levels = CycleBatchNormList(norm.num_levels, num_features=norm.num_channels, eps=norm.eps)
    levels.to(norm.running_mean)
    for level, mean, var in zip(levels, norm.running_mean, norm.running_var):
        level.running_mean.copy_(mean)
        level.running_var.copy_(var)
    levels.weight, levels.bias = _parameter(norm.weight.clone()), _parameter(norm.bias.clone())
    return levels


# -------------------------------------------------------------------------------------- all modules


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _is_ours(kind: Any) -> bool:
    return str(getattr(kind, "__module__", "")).partition(".")[0] == _PACKAGE


def _strip(module: nn.Module) -> None:
    """Removes hooks of this package, and what it has noted in the module."""
    for name, value in list(vars(module).items()):
        if name.endswith("_hooks"):
            for key, hook in list(value.items()):
                # load_state_dict's are wrapped
                if _is_ours(getattr(hook, "hook", hook)):
                    del value[key]
        elif _is_ours(type(value)):
            delattr(module, name)


def _stock_class(kind: Type[nn.Module]) -> Type[nn.Module]:
    """The first class that this one is derived from and that is not of this package."""
    stock = next(base for base in kind.__mro__ if not _is_ours(base))
    return kind if stock is nn.Module else stock


def _check_stock(name: str, module: nn.Module) -> None:
    """
    Raises:
        TypeError: if something of this package is left in a module.
    """
    kind = type(module)
    ours = next((base for base in kind.__mro__ if _is_ours(base)), None)
    if ours is not None:
        raise TypeError(
            f"cannot fold {name}, a {kind.__module__}.{kind.__name__}: it is derived from "
            f"{ours.__module__}.{ours.__name__}, and there is no stock class that it could become"
        )
    left = [key for key, value in vars(module).items() if _is_ours(value) or _is_ours(type(value))]
    if left:
        raise TypeError(f"cannot fold {name}: its {', '.join(left)} is of {_PACKAGE}")
