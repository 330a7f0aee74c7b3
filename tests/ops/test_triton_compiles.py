import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_compile_for_gpus(tmp_path):
    pytest.importorskip("triton", minversion="3.3", reason="the API of its compiler differs")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "compiled" in result.stdout
