"""Launches of Triton's kernels that repeat.

At each launch Triton looks at every argument, to find out for which of its compiled kernels they
are: at the types, which integers are 1, and which integers and addresses are multiples of 16. With
one image a step this is a good part of what the host does. Here what does not change from call to
call is put together once, and where the rest is known to be the same as well, the kernel that was
found is launched again.
"""

from typing import Any, Optional, Tuple

import torch
import triton
from torch import Tensor

# Older compiled kernels take other arguments than their functions. On AMD GPUs what Triton compiles
# for depends on the size of the memory behind a tensor, too.
_COMPILED_KERNELS_REPEAT = (
    tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
    and torch.version.hip is None
)


def signature(*tensors: Optional[Tensor]) -> Tuple[Any, ...]:
    """What Triton's choice of a compiled kernel depends on: the types of tensors, and whether their
    addresses are multiples of 16."""
    return tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


class Launch:
    """A kernel with its grid and those of its arguments that do not change from call to call.

    To be called with the other arguments, which are the first of the kernel's: tensors, None or
    floats, no integers. On the second and all later calls they must agree with those of the first
    in their :func:`signature`, and the device that is the current one.
    """

    __slots__ = ("_kernel", "_grid", "_values", "_again")

    def __init__(self, kernel: Any, grid: Tuple[int, ...], **constants: Any) -> None:
        """
        Args:
            kernel: what ``triton.jit`` made of a function.
            grid: number of programs in each dimension.
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
        self._kernel = kernel
        self._grid = grid
        self._again: Any = None

    def __call__(self, *args: Any) -> None:
        if self._again is not None:
            self._again(*args, *self._values)
            return
        compiled = self._kernel[self._grid](*args, *self._values)
        if _COMPILED_KERNELS_REPEAT and compiled is not None:  # None by the interpreter
            self._again = compiled[(*self._grid, 1, 1)[:3]]
