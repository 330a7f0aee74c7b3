"""What PyTorch is doing at the moment."""

import sys
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
    is_compiling = torch.compiler.is_compiling

else:  # PyTorch 2.0 to 2.2, which imports what compiles only when it is used

    def is_compiling() -> bool:
        """Whether torch.compile is tracing."""
        return "torch._dynamo" in sys.modules and torch._dynamo.is_compiling()


# Types of tensors that are nothing else.
PLAIN = (Tensor, torch.nn.Parameter)


def in_backward() -> bool:
    """Whether the autograd engine is running this thread; in a forward pass that means that
    activation checkpointing is doing it once more."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def is_traced(x: Tensor) -> bool:
    """Whether operations on a tensor are recorded or transformed instead of computed: by
    torch.compile, torch.jit.trace or torch.func, or by the type of the tensor."""
    return (
        is_compiling()
        or type(x) not in PLAIN
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


def is_observed(x: Tensor) -> bool:
    """Whether something wants to see the operations on a tensor by name: torch.compile, the
    profiler, or what intercepts operations, by a mode or by the type of the tensor."""
    return (
        is_compiling()
        or type(x) not in PLAIN
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def several_ranks(process_group: Optional["dist.ProcessGroup"] = None) -> bool:
    """Whether this is one of several processes (of a group; default: of all)."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(process_group) > 1
