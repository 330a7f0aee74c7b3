"""What PyTorch is doing at the moment."""

import sys

import torch


def is_compiling() -> bool:
    """Whether torch.compile is tracing."""
    if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling()
    # PyTorch 2.0 to 2.2, which imports what compiles only when it is used
    return "torch._dynamo" in sys.modules and torch._dynamo.is_compiling()


def in_backward() -> bool:
    """Whether the autograd engine is running this thread; in a forward pass that means that
    activation checkpointing is doing it once more."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1
