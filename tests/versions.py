"""What some environments cannot do: marks for tests."""

import pytest
import torch

from wsbcn_d2.ops import native_backend


def _compiles():
    try:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    except RuntimeError:  # not supported with this Python
        return False
    return True


def _has_native_kernels():
    try:
        native_backend.library()
    except OSError:
        return False
    return True


needs_compile = pytest.mark.skipif(
    not _compiles(), reason="this PyTorch has no torch.compile for this Python"
)
# PyTorch 2.4 lacks this function, and what else docs/versions.md says.
needs_newer_torch = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="PyTorch 2.4 cannot do that, see docs/versions.md",
)
needs_native_kernels = pytest.mark.skipif(
    not _has_native_kernels(), reason="the kernels in C were not built with the installation"
)
