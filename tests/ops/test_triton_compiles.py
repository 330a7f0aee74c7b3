"""What Triton does with the kernels for GPUs, without one: the interpreter does nothing of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(tmp_path, script, *args, **variables):
    """What a script prints in a process of its own."""
    pytest.importorskip("triton", minversion="3.3", reason="the API of its compiler differs")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *args],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_kernels_compile_for_gpus(tmp_path):
    assert "compiled" in run(tmp_path, "compile_kernels.py")
