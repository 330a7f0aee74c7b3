import pytest
import torch
from ops.cases import DEVICE
from versions import TRITON_INTERPRETS, needs_c_compiler

from wsbcn_d2.ops import backend_name, set_backend
from wsbcn_d2.ops.extension import load

KINDS = ["eager", "native", "triton", "without extension"]


def use(kind, device):
    """Chooses the kernels for tensors on a device while a test runs, which is skipped if there are
    none of this kind for it."""
    if kind == "native":
        if device.type != "cpu":
            pytest.skip("the compiled kernels are for the CPU")
        if needs_c_compiler.args[0]:
            pytest.skip(needs_c_compiler.kwargs["reason"])
    if kind == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        if device.type == "cpu":
            if torch.cuda.is_available():
                pytest.skip("without its interpreter, Triton is for tensors on a GPU")
            if not TRITON_INTERPRETS:
                pytest.skip("this Triton has no interpreter")
    with pytest.MonkeyPatch.context() as patch:
        if kind == "without extension":
            patch.setenv("WSBCN_D2_EXTENSION", "0")
            load.cache_clear()
        else:
            set_backend(kind)
            assert backend_name(device) == kind
        try:
            yield kind
        finally:
            set_backend(None)
            if kind == "without extension":
                load.cache_clear()


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Sets a compiler by its environment variable: a shell script, whose calls a file has, one a
    line, which is returned."""

    def set_to(variable, body):
        path, calls = tmp_path / "compiler", tmp_path / "calls"
        path.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
        path.chmod(0o755)
        monkeypatch.setenv(variable, str(path))
        return calls

    return set_to


@pytest.fixture(params=KINDS)
def backend(request):
    """Every kind of kernels for the device under test."""
    yield from use(request.param, DEVICE)


@pytest.fixture(params=KINDS)
def cpu_backend(request):
    """Every kind of kernels for tensors on the CPU."""
    yield from use(request.param, torch.device("cpu"))
