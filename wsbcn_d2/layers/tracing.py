"""Symbolic tracing (:mod:`torch.fx`): a layer of this package is one node, as those of PyTorch are.

FX looks inside all modules that are not PyTorch's. There it would find operations that are chosen
by values, and lose what a state dict says of a layer.
"""

from typing import Any, cast

from torch import nn
from torch.fx import Proxy, Tracer


def node_of(module: nn.Module, x: Proxy, *args: Any) -> Any:
    """What the ``forward`` of a module returns for the proxy of an input: that of its output.

    Args:
        module: a part of the model that is traced.
        x, args: what it was called with.
    """
    tracer = cast(Tracer, x.tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), {})
