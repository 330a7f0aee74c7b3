import pytest
from ops.cases import DEVICE
from versions import TRITON_INTERPRETS

from wsbcn_d2.ops import backend_name, set_backend


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    """Every kind of kernels: Triton's on a GPU, or else in its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        if DEVICE.type == "cpu" and not TRITON_INTERPRETS:
            pytest.skip("this Triton has no interpreter")
    set_backend(request.param)
    assert backend_name(DEVICE) == request.param
    yield request.param
    set_backend(None)
