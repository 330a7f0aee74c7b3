"""Launches of Triton's kernels that repeat.

At each launch Triton looks at every argument, to find out for which of its compiled kernels they
are: at the types, which integers are 1, and which integers and addresses are multiples of 16. With
one image a step this is a good part of what the host does. Here what does not change from call to
call is put together once, and where the rest is known to be the same as well, the kernel that was
found is launched again, with addresses in place of tensors.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
import triton
from torch import Tensor

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Older compiled kernels take other arguments than their functions. On AMD GPUs what Triton compiles
# for depends on the size of the memory behind a tensor, too.
_COMPILED_KERNELS_REPEAT = _VERSION >= (3, 3) and torch.version.hip is None
# What a compiled kernel hands to the function in C that launches it differs between versions; this
# is known of these.
_LAUNCHERS_ARE_KNOWN = _VERSION == (3, 6)


def signature(
    tensors: Sequence[Optional[Tensor]], addresses: Sequence[Optional[int]]
) -> Tuple[Any, ...]:
    """What Triton's choice of a compiled kernel depends on: the types of tensors, and which of
    their addresses are multiples of 16."""
    any_bit = 0
    for address in addresses:
        if address is not None:
            any_bit |= address
    aligned = any_bit & 15 == 0 or tuple([a is None or a & 15 == 0 for a in addresses])
    return tuple([None if t is None else t.dtype for t in tensors]), aligned


def addresses_of(tensors: Sequence[Optional[Tensor]]) -> List[Optional[int]]:
    """Where tensors begin; they must be kept until the launches with these are made."""
    return [None if t is None else t.data_ptr() for t in tensors]


def current_stream(device: torch.device) -> int:
    """The stream to launch on: the current one of a device, which is the current device."""
    if device.type == "cuda":
        return torch._C._cuda_getCurrentRawStream(device.index)
    return 0  # interpreted


class Launch:
    """A kernel with its grid and those of its arguments that do not change from call to call.

    To be called with a stream (:func:`current_stream`) and the other arguments, which are the first
    of the kernel's: tensors, None or floats, no integers. On the second and all later calls they
    must agree with those of the first in their :func:`signature`, and the device that is the
    current one; and with ``known`` tensors may be replaced by :func:`addresses_of` them.

    Attributes:
        known: whether the compiled kernel is.
    """

    __slots__ = ("known", "_kernel", "_grid", "_num_warps", "_values", "_again", "_launcher")

    def __init__(
        self, kernel: Any, grid: Tuple[int, ...], num_warps: int = 4, **constants: Any
    ) -> None:
        """
        Args:
            kernel: what ``triton.jit`` made of a function.
            grid: number of programs in each dimension.
            num_warps: warps, of 32 threads, for each of them.
            constants: the last arguments of the kernel, by name.

        Raises:
            TypeError: if an argument of the kernel before one of the constants is not among them.
        """
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        try:
            self._values = [constants[name] for name in names]
        except KeyError:
            raise TypeError(
                f"the constants are {', '.join(constants)}, the kernel ends with {', '.join(names)}"
            ) from None
        self.known = False
        self._kernel = kernel
        self._grid = grid
        self._num_warps = num_warps
        self._again: Any = None
        self._launcher: Any = None

    @property
    def parts(self) -> Optional[Tuple[Any, ...]]:
        """For :file:`extension.cpp`, what it is made of each time: the function in C that launches
        the compiled kernel, the grid, the arguments between the stream and those given to this
        object, and those after them. None if it is not known, or not such a function."""
        if self._launcher is None:
            return None
        return (*self._launcher, tuple(self._values))

    def __call__(self, stream: int, *args: Any) -> None:
        if self._launcher is not None and not is_watched():
            launch, grid, constants = self._launcher
            launch(*grid, stream, *constants, *args, *self._values)
            return
        if self._again is not None:
            self._again(*args, *self._values, stream=stream)
            return
        compiled = self._kernel[self._grid](*args, *self._values, num_warps=self._num_warps)
        if _COMPILED_KERNELS_REPEAT and compiled is not None:  # None by the interpreter
            grid = (*self._grid, 1, 1)[:3]
            self._again = compiled[grid]
            self._launcher = _launcher(compiled, grid)
            self.known = True


def is_watched() -> bool:
    """Whether something wants to be told of launches, which the compiled kernel does."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    # Chains of hooks, which are empty; None, or a hook, if someone replaced them.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _launcher(compiled: Any, grid: Tuple[int, int, int]) -> Optional[Tuple[Any, ...]]:
    """The function in C that launches a compiled kernel, the grid, and its arguments between the
    stream and those of the kernel; None where it is to be left to the compiled kernel."""
    run = compiled.run
    if not _LAUNCHERS_ARE_KNOWN or run.global_scratch_size or run.profile_scratch_size:
        return None
    cooperative, dependent = run.launch_cooperative_grid, run.launch_pdl
    metadata = (compiled.packed_metadata, None, None, None)  # no hooks
    constants = (compiled.function, cooperative, dependent, None, None, *metadata)
    return run.launch, grid, constants
