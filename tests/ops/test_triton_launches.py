"""What Triton does with the kernels for GPUs, without one: the interpreter does nothing of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from versions import needs_extension


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


def test_repeated_launches_are_those_of_triton(tmp_path):
    output = run(tmp_path, "repeat_launches.py", "without", WSBCN_D2_EXTENSION="0")
    repeated, total, *_ = map(int, re.findall(r"\d+", output))
    assert repeated >= total / 2


@needs_extension
def test_launches_of_the_extension_are_those_of_triton(tmp_path):
    output = run(tmp_path, "repeat_launches.py", "with")
    repeated, total, without_python, passes = map(int, re.findall(r"\d+", output))
    assert repeated >= total / 2
    # From the second time on, but for the two cases with the statistics of the batch, and with
    # other versions of Triton than those whose launchers are known.
    assert without_python >= passes / 2 if "are known" in output else without_python == 0
