import pytest
import torch
from ops.cases import DEVICE
from versions import needs_native_kernels

from wsbcn_d2.ops import backend_name, set_backend

KINDS = ["eager", "native", "triton"]


def use(kind, device):
    """Chooses the kernels for tensors on a device while a test runs, which is skipped if there are
    none of this kind for it."""
    if kind == "native":
        if device.type != "cpu":
            pytest.skip("the compiled kernels are for the CPU")
        if needs_native_kernels.args[0]:
            pytest.skip(needs_native_kernels.kwargs["reason"])
    if kind == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        if device.type == "cpu":
            if torch.cuda.is_available():
                pytest.skip("without its interpreter, Triton is for tensors on a GPU")
    set_backend(kind)
    assert backend_name(device) == kind
    try:
        yield kind
    finally:
        set_backend(None)


@pytest.fixture(params=KINDS)
def backend(request):
    """Every kind of kernels for the device under test."""
    yield from use(request.param, DEVICE)


@pytest.fixture(params=KINDS)
def cpu_backend(request):
    """Every kind of kernels for tensors on the CPU."""
    yield from use(request.param, torch.device("cpu"))
