"""docs/tutorial.py, which CI runs once at toy length."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tutorial(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "tutorial.py")],
        env={**env, "TUTORIAL_STEPS": "2", "TUTORIAL_OUTPUT": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "BCN+WS: weight standardization in 36 of 41 convolutions" in result.stdout
    page = (tmp_path / "comparison.md").read_text()
    assert all(f"| {norm} | 1 |" in page for norm in ("GN", "BCN+WS"))
    assert (tmp_path / "predictions.png").stat().st_size > 1000
    names = {path.name for path in (tmp_path / "folded").iterdir()}
    assert names == {"config.yaml", "load_model.py", "model.pth"}
