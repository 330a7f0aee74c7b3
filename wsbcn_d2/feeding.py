"""Finds the convolution whose output goes into ("feeds") a normalization layer: by the structure of
the model, or by a pass through it."""

import itertools
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeGuard,
)

import torch
from torch import Tensor, nn

from .layers import is_convolution

# The parents of a layer, the innermost first, each with the name of the layer, or of the parent
# before, in it.
Path = Sequence[Tuple[nn.Module, str]]

ONE_WEIGHT = (
    "the convolution before it is not standardized, as filters of one weight each would become 0"
)


class NotFed(ValueError):
    """No convolution that could be standardized is before the layer."""


class NotFedYet(NotFed):
    """Nothing is before the layer so far; further parents or siblings of them could tell."""


def feeding_convolution(
    path: Path, channels: int, following: Any = None, complete: bool = True
) -> nn.Module:
    """The convolution whose outputs a norm layer normalizes, as far as the structure tells.

    That is the convolution that owns the layer, or else what is registered right before it: a
    convolution, or a Sequential that ends in one. If the layer leads a Sequential, it is what is
    before that. Lists of the same length, convolutions first, are taken in pairs, and so are
    several convolutions of a module with as many such layers right behind them. A layer that is
    registered first of all, before the convolution, follows it if it has as many channels as that
    one has outputs, and not as many as it has inputs.

    Args:
        path: of the layer, as far out as is known.
        channels: of the layer.
        following: what is about to be registered behind the outermost place of the path.
        complete: whether all modules are registered, or else only those up to the layer.

    Raises:
        NotFed: if there is none; it says what is there.
        ValueError: if it cannot be told.
    """
    for (parent, name), outer in zip(path, [*path[1:], None]):
        if is_convolution(parent):
            return parent
        before, after = _siblings(parent, name)
        if isinstance(parent, nn.ModuleList) and not (before and is_convolution(_last(before[-1]))):
            if outer is None:
                raise NotFedYet("is in a list, beside which no list of convolutions is known")
            return _from_parallel_list(parent, int(name), *outer, channels)
        if before:
            if not _is_sequence(parent):
                before = before[: _end_in_runs(before, after, complete)]
            return _fitting(_last(before[-1]), channels)
        if not _is_sequence(parent):
            after.extend([] if outer or following is None else [following])
            return _registered_later(after, channels)
    raise NotFedYet("follows no module")


def _end_in_runs(before: List[nn.Module], after: List[nn.Module], complete: bool) -> int:
    """How many of the modules before a layer end in the one to look at: all; or, if it is one of
    several layers behind several convolutions, those up to the convolution in the same place.

    Raises:
        ValueError: if there are not as many.
    """
    place = _run(reversed(before), _is_norm)
    layers = place + 1 + _run(after, _is_norm)
    convolutions = _run(reversed(before[: len(before) - place]), is_convolution)
    if layers == 1 or convolutions < 2:
        return len(before)
    if layers != convolutions or not complete:  # those before it were paired otherwise then
        raise ValueError(f"is one of several layers behind {convolutions} convolutions")
    return len(before) - convolutions + 1


def _run(modules: Iterable[nn.Module], belongs: Callable[[nn.Module], bool]) -> int:
    """How many of the first modules are of a kind."""
    return sum(1 for _ in itertools.takewhile(belongs, modules))


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "eps") and not is_convolution(module)


def path_of(model: nn.Module, name: str) -> Path:
    """The path of a module within a model, by its full name."""
    path: List[Tuple[nn.Module, str]] = []
    for child in name.split("."):
        path.insert(0, (model, child))
        model = model.get_submodule(child)
    return path


def _siblings(parent: nn.Module, name: str) -> Tuple[List[nn.Module], List[nn.Module]]:
    """The modules before and behind a place; all are before one that does not exist yet."""
    names = list(parent._modules)
    place = names.index(name) if name in names else len(names)
    before, behind = (
        [m for m in map(parent._modules.get, part) if m is not None]
        for part in (names[:place], names[place + 1 :])
    )
    return before, behind


def _is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _last(module: nn.Module) -> nn.Module:
    """The part of a Sequential whose output is that of the whole."""
    while _is_sequence(module) and len(module):
        module = module[-1]
    return module


def _fitting(module: nn.Module, channels: int) -> nn.Module:
    found = f"follows a {type(module).__name__}"
    if not is_convolution(module):
        raise NotFed(found)
    if any(getattr(module, part, None) is not None for part in ("norm", "activation")):
        raise NotFed(f"{found} with a norm or activation of its own")
    if module.out_channels != channels:
        raise ValueError(f"{found}, which has {module.out_channels} output channels")
    return module


def _from_parallel_list(
    norms: nn.ModuleList, index: int, holder: nn.Module, name: str, channels: int
) -> nn.Module:
    candidates = [
        [_last(module) for module in other]
        for other in _siblings(holder, name)[0]
        if isinstance(other, nn.ModuleList)
    ]
    candidates = [other for other in candidates if other and all(map(is_convolution, other))]
    if not candidates:
        raise NotFedYet("is in a list, beside which no list of convolutions is known")
    fitting = [
        other
        for other in candidates
        if len(other) == max(len(norms), index + 1) and other[index].out_channels == channels
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"is in a list behind {len(candidates)} lists of convolutions, {len(fitting)} of which "
            "have the same length and as many channels"
        )
    return _fitting(fitting[0][index], channels)


def _registered_later(after: List[nn.Module], channels: int) -> nn.Module:
    if not after:
        raise NotFedYet("follows no module")
    conv = after[0]
    if is_convolution(conv) and conv.out_channels == channels != conv.in_channels:
        return conv
    raise NotFed("follows no module")


def preceding_layer(path: Path) -> Tuple[Optional[nn.Module], bool]:
    """The layer with parameters that is registered before a place, and whether it is certain that
    its output is what comes there, but for what has no parameters; None if it is not a layer."""
    for parent, name in path:
        certain = _is_sequence(parent)
        for module in reversed(_siblings(parent, name)[0]):
            for part in _reversed(module):
                if next(part.parameters(), None) is not None:
                    return (None if list(part.children()) else part), certain
            if not certain:
                return None, False
        if not certain:
            return parent, False
    return None, False


def _reversed(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a Sequential consists of, the last first."""
    if _is_sequence(module):
        for child in reversed(module):
            yield from _reversed(child)
    else:
        yield module


@torch.no_grad()
def followed_convolutions(
    model: nn.Module, norms: Mapping[nn.Module, str], example_inputs: Any
) -> Tuple[Dict[nn.Module, List[nn.Module]], Dict[nn.Module, int]]:
    """Calls a model once, in evaluation mode, and looks whose outputs the norm layers get.

    Args:
        model: it is as before afterwards.
        norms: the layers to look at, with their names.
        example_inputs: what to call the model with: a tuple of arguments, or the only one.

    Returns:
        For each layer that was called, the convolutions whose outputs it got, unchanged; none if it
        also got, or only, something else. For each layer that was called several times, with
        feature maps of several sizes, how often that was.

    Raises:
        ValueError: if the model cannot be called with these, or a layer gets no feature maps of
            shape (N, C, H, W).
    """
    outputs: Dict[int, Tuple[nn.Module, Tensor, int]] = {}
    found: Dict[nn.Module, List[Optional[nn.Module]]] = {}
    shapes: Dict[nn.Module, List[torch.Size]] = {}

    def note_output(conv: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # kept, so that its id is not given to another
            outputs[id(output)] = conv, output, output._version

    def note_input(norm: nn.Module, inputs: Any) -> None:
        shapes.setdefault(norm, []).append(inputs[0].shape)
        conv, _, version = outputs.get(id(inputs[0]), (None, None, None))
        found.setdefault(norm, []).append(conv if version == inputs[0]._version else None)

    hooks = [m.register_forward_hook(note_output) for m in model.modules() if is_convolution(m)]
    hooks += [norm.register_forward_pre_hook(note_input) for norm in norms]
    try:
        call(model, example_inputs, "example_inputs")
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (shape, *_) in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"cannot convert {norms[norm]}: its input is of shape {tuple(shape)}, and not "
                "(N, C, H, W). Other parts of the model can be converted one by one."
            )
    convolutions = {
        norm: [] if None in convs else [conv for conv in dict.fromkeys(convs) if conv is not None]
        for norm, convs in found.items()
    }
    levels = {norm: len(sizes) for norm, sizes in shapes.items() if len(set(sizes)) > 1}
    return convolutions, levels


def call(model: nn.Module, inputs: Any, name: str) -> None:
    """Calls a model in evaluation mode, and sets all modes back.

    Args:
        model: to call.
        inputs: a tuple of arguments, or the only one.
        name: of the inputs, for the error.

    Raises:
        ValueError: if that fails, for whatever reason.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    except Exception as error:
        cause = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise ValueError(f"{name}: the model cannot be called with them ({cause})") from error
    finally:
        for module, mode in modes:
            module.training = mode
