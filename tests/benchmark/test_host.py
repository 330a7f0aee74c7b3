"""The tool that measures the host, in a process: it needs the compiler, not the interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_host.py"


def run(tmp_path, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env.update(environment, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(TOOL.parents[1]))
    return subprocess.run(
        [sys.executable, TOOL, "--repetitions", "2", "--warmup", "1"],
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )


def test_launches_of_a_step(tmp_path):
    pytest.importorskip("triton", minversion="3.3", reason="the API of its driver differs")
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    cell = r"\d+ \(\d+–\d+\)"
    both = rf"{cell} \| {cell}"
    rows = re.findall(
        rf"^\| ([\w, +]+) \| {both} \| ([\d.]+) \| ({both}|\ \| )\ \|$", result.stdout, re.M
    )
    assert {name: launches for name, launches, _ in rows} == {
        "GroupNorm": "0.0",
        "BCN": "4.0",  # moments and apply, sums and apply
        "GroupNorm, ReLU": "0.0",
        "BCN+ReLU": "4.0",
        "Conv2d": "0.0",
        "WSConv2d": "0.1",  # forward, once more for the backward pass, backward, of 30 together
        "bottleneck block, GN": "0.0",
        "bottleneck block, GN+WS": "0.3",
        "bottleneck block, BCN": "14.0",  # two outputs are made once more
        "bottleneck block, BCN+WS": "14.3",
    }
    # Once more without the extension, but for layers of PyTorch.
    assert [name for name, _, in_python in rows if not in_python.strip(" |")] == [
        "GroupNorm",
        "GroupNorm, ReLU",
        "Conv2d",
        "bottleneck block, GN",
    ]
    assert "kernels of wsbcn_d2: triton" in result.stdout


def test_interpreter_is_an_error(tmp_path):
    pytest.importorskip("triton", minversion="3.3", reason="the API of its driver differs")
    result = run(tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert result.stderr.strip().endswith(
        "TRITON_INTERPRET=1 is set: there are no launches to measure"
    )
