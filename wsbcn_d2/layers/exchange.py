"""A module becomes one of another class, and stays the same object."""

from torch import nn


def become(module: nn.Module, new: nn.Module) -> None:
    """Gives a module the class and the contents of another; its hooks stay.

    It is not replaced, so that everything that refers to it sees the change, as do the plain lists
    of :class:`detectron2.modeling.FPN`.
    """
    hooks = {
        name: value
        for name, value in vars(module).items()
        if "_hooks" in name or name == "_is_full_backward_hook"
    }
    module.__class__ = type(new)
    contents = {**vars(new), **hooks}
    vars(module).clear()
    vars(module).update(contents)
