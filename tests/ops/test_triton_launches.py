"""What Triton does with the kernels for GPUs, without one: the interpreter does nothing of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(script, tmp_path):
    """What a script prints in a process of its own."""
    pytest.importorskip("triton", minversion="3.3", reason="the API of its compiler differs")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_kernels_compile_for_gpus(tmp_path):
    assert "compiled" in run("compile_kernels.py", tmp_path)


def test_repeated_launches_are_those_of_triton(tmp_path):
    repeated, total = re.findall(r"\d+", run("repeat_launches.py", tmp_path))
    assert int(repeated) >= int(total) / 2
