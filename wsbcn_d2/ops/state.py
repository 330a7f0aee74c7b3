"""What PyTorch is doing at the moment: whether it compiles, traces, repeats a forward pass.

The only file of the package that takes functions and variables from PyTorch by names that are not
public, each because there is no public one: ``tests/ops/test_state.py`` fails where one of them is
gone or means something else.
"""

import contextlib
from typing import Any, Iterator, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

# Types of tensors that are nothing else.
_PLAIN = (Tensor, torch.nn.Parameter)
# Modes under which plain tensors are traced: ``make_fx``, and fake tensors beside real ones.
_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)

is_compiling = torch.compiler.is_compiling


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread; in a forward pass that means that
    activation checkpointing repeats it."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_repeated() -> Optional[bool]:
    """Whether a forward pass may be one that activation checkpointing will repeat: it runs without
    gradients (reentrant), or something decides what autograd saves (not reentrant). None: nobody
    knows, since PyTorch 2.4 does not say."""
    if not torch.is_grad_enabled():
        return True
    hooks: Any = torch._C._autograd  # its types lack them
    # While hooks are disabled there are none, and asking for them is an error.
    if not hooks._saved_tensors_hooks_is_enabled():
        return False
    top = getattr(hooks, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True) is not None


def is_transformed(*tensors: Tensor) -> bool:
    """Whether ``torch.func`` is at work, or one of the tensors stands for many, as gradients with
    ``is_grads_batched=True`` do."""
    return torch._C._are_functorch_transforms_active() or any(
        [torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors]
    )


def is_trainable(tensor: Tensor) -> bool:
    """Whether somebody wants derivatives with respect to a tensor: autograd, ``torch.func``, within
    whose transformations ``requires_grad`` does not say what is asked for outside, or forward-mode
    differentiation."""
    if tensor.requires_grad:
        return True
    if not (forward_ad._current_level >= 0 or is_transformed()):
        return False
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return is_trainable(torch._C._functorch.get_unwrapped(tensor))


@contextlib.contextmanager
def without_derivatives() -> Iterator[None]:
    """``torch.no_grad``, which leaves forward-mode differentiation on, without that, too."""
    with torch.no_grad():
        # Asked for only where it is at work: torch.compile does not know it.
        if is_compiling() or forward_ad._current_level < 0:
            yield
        else:
            with forward_ad._set_fwd_grad_enabled(False):
                yield


def is_plain(*tensors: Tensor) -> bool:
    """Whether tensors have values in memory, to be computed with at once, and not only stand for
    some: traced, compiled, transformed by ``torch.func``, with a tangent, or of a type of their own
    (fake tensors, for example), and that no mode of PyTorch's tracers is watching."""
    return (
        all([type(t) in _PLAIN for t in tensors])
        and not is_compiling()
        and not torch.jit.is_tracing()
        and not is_transformed()
        and forward_ad._current_level < 0
        and not any([torch._C._get_dispatch_mode(mode) for mode in _TRACERS])
    )


def all_modules_are_hooked() -> bool:
    """Whether a hook listens to the modules of all models, such as those of
    :func:`torch.nn.modules.module.register_module_forward_hook`."""
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def free_saved_tensors(ctx: Any) -> None:
    """Lets an autograd function go of what it has saved, in its backward pass, unless the graph is
    retained."""
    ctx.maybe_clear_saved_tensors()


def current_stream(device: torch.device) -> int:
    """The number of the current stream of a GPU."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def assert_soon(condition: Tensor, message: str) -> None:
    """Raises RuntimeError unless a scalar is true: on the CPU at once, on a GPU, for which nothing
    waits, when it gets there (which ends the use of the GPU by this process)."""
    torch._assert_async(condition, message)
