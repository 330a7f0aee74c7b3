"""Which kernels run, by function and environment variable, and what happens if they cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from versions import needs_native_kernels

from wsbcn_d2.ops import BACKENDS, backend_name, set_backend

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# Normalizes twice as a process starts, and twice after a change of the variable; prints each time
# what did it, whether Triton's kernels have been imported, and what has been logged.
SCRIPT = """
import logging, os, sys, torch
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("detectron2.wsbcn_d2").addHandler(handler)
from wsbcn_d2 import BatchChannelNorm, WSConv2d
from wsbcn_d2.ops import backend_name
conv = WSConv2d(3, 4, 1, norm=BatchChannelNorm(4, 2))
for choice in ("", "triton"):
    os.environ["WSBCN_D2_BACKEND"] = choice
    for _ in range(2):
        conv(torch.ones(1, 3, 2, 2)).sum().backward()
    name = backend_name(torch.device("cpu"))
    print(name, "wsbcn_d2.ops.triton_kernels" in sys.modules, len(messages), *messages)
"""


@pytest.fixture(autouse=True)
def restore():
    yield
    set_backend(None)


def run(script, env, path=()):
    env["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])
    result = subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def normalize_in_a_process(path=(), **environment):
    """The second line that :data:`SCRIPT` prints, if the first says that it did without Triton."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env.update(environment, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    default, chosen = run(SCRIPT, env, path).splitlines()
    assert default == "native False 0"
    return chosen


@needs_native_kernels
def test_environment_variable_and_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert normalize_in_a_process(TRITON_INTERPRET="1") == "triton True 0"


@needs_native_kernels
def test_triton_without_gpu_falls_back_and_says_why_once():
    pytest.importorskip("triton", reason="Triton is not installed")
    chosen = normalize_in_a_process()
    assert chosen.startswith("eager True 1 Triton cannot be used on cpu, so wsbcn_d2 runs in")
    assert "compiles for GPUs only" in chosen


@needs_native_kernels
def test_broken_triton_falls_back_and_says_why_once(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libtriton.so is missing')\n")
    chosen = normalize_in_a_process(path=[str(tmp_path)])
    assert chosen.startswith("eager False 1 Triton cannot be used on cpu")
    assert "ImportError: libtriton.so is missing" in chosen


@needs_native_kernels
def test_function_before_variable(monkeypatch):
    monkeypatch.setenv("WSBCN_D2_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match="WSBCN_D2_BACKEND must be one of auto, eager, native, triton"
    ):
        backend_name(CPU)
    set_backend("eager")
    assert backend_name() == backend_name(CPU) == "eager"
    set_backend(None)
    monkeypatch.setenv("WSBCN_D2_BACKEND", "")  # as if it were not set
    assert backend_name(CPU) == "native"


def test_unknown_backend():
    assert BACKENDS == ("auto", "eager", "native", "triton")
    set_backend("eager")
    with pytest.raises(ValueError, match="one of auto, eager, native, triton, got 'cuda'"):
        set_backend("cuda")
    assert backend_name() == "eager"  # as before
