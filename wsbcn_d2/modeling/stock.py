"""Whether Detectron2's classes are as Detectron2 has them."""

from typing import Any, Callable, Optional


def stock_method(cls: type, name: str) -> Optional[Callable[..., Any]]:
    """A method of a class of Detectron2; None if someone has already put another in its place.

    What is derived from the class for speed compares it at each call, so that another method that
    someone gives the class later takes effect there, too.
    """
    method = getattr(cls, name)
    own = method.__module__ == cls.__module__ and method.__qualname__ == f"{cls.__name__}.{name}"
    return method if own and not hasattr(method, "__wrapped__") else None
