"""Symbolic tracing (:mod:`torch.fx`): a layer of this package is one node, as those of PyTorch are.

FX looks inside all modules that are not PyTorch's. There it would find operations that are chosen
by values, and lose what a state dict says of a layer.
"""

from typing import Any

from torch import nn
from torch.fx import Proxy


def node_of(module: nn.Module, x: Proxy, *args: Any) -> Any:
    """What the ``forward`` of a module returns for the proxy of an input: that of its output.

    Args:
        module: a part of the model that is traced.
        x, args: what it was called with.
    """
    name = x.tracer.path_of_module(module)  # type: ignore[attr-defined]  # it is a Tracer
    return x.tracer.create_proxy("call_module", name, (x, *args), {})
