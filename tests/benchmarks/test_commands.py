"""The commands, in trials that take seconds."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import import_time, page
from benchmarks.results import FOR_THE_PAGE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command,name,rows",
    [
        ("layers", "layers-cpu", 2 * 3 * 2 * 4),  # layers, dtypes, formats, contenders
        ("train --model R-18-FPN --contenders GN BCN+WS", "train-R-18-FPN-cpu-64x96", 2),
        ("memory --models RetinaNet --norms GN --checkpointed all", "memory-cpu-float32-64x96", 1),
    ],
)
def test_command(command, name, rows, tmp_path):
    module, *options = command.split()
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--output", tmp_path, *options]
        + ["--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    path = tmp_path / f"{name}.json"
    assert result.stdout.splitlines() == [str(path)] and list(tmp_path.iterdir()) == [path]
    assert "100%" in result.stderr  # the progress bar
    content = json.loads(path.read_text())
    assert len(content["rows"]) == rows
    assert content["command"].startswith(f"python -m benchmarks.{module} --quick --output ")
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, text=True, capture_output=True).stdout.strip() or "unknown"
    assert content["commit"].partition(" ")[0] == head
    assert "1 threads used" in content["machine"]["CPU"]
    assert "PyTorch" in content["machine"]["software"]
    assert "### " in page.render(page.load(tmp_path), "plots")


def test_time_of_imports(monkeypatch, tmp_path, capsys):
    """With others, that are quick: one of them sleeps, and imports nothing that takes time."""
    monkeypatch.setattr(import_time, "STATEMENTS", ("import time; time.sleep(0.2)", "import time"))
    monkeypatch.setattr(sys, "argv", ["import_time.py", "--quick", "--output", str(tmp_path)])
    assert import_time.main() == 0
    path = tmp_path / "import-time.json"
    assert capsys.readouterr().out.strip() == str(path)
    slow, fast = (row["time"]["median"] for row in json.loads(path.read_text())["rows"])
    assert 200 <= slow < 2000 and fast < 100
    assert "| `import time` |" in page.render(page.load(tmp_path), "plots")


@pytest.mark.parametrize(
    "module,arguments,message",
    [
        ("train", ["--size", "20"], "--size: must be like 256 or 800x1333"),
        ("train", ["--size", "64", "64x64"], "--size: the same one twice: 64 64x64"),
        ("train", ["--output", __file__], "cannot write"),
        ("layers", ["--output", __file__], "cannot write"),
        ("memory", ["--size", "20"], "--size: must be like 256 or 800x1333"),
        ("memory", ["--output", __file__], "cannot write"),
        ("import_time", ["--output", __file__], "cannot write"),
    ],
)
def test_an_error_is_one_line(module, arguments, message, monkeypatch, capsys):
    device = [] if module == "import_time" else ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *device, *arguments])
    assert import_module(f"benchmarks.{module}").main() == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"python -m benchmarks.{module}: {message}")


def test_what_make_runs():
    """All commands, with results where the page looks for them."""
    lines = subprocess.run(
        ["make", "--dry-run", "benchmark"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    commands = [line.partition(" -m benchmarks.")[2] for line in lines if "benchmarks." in line]
    modules = [command.split()[0] for command in commands]
    assert modules == ["layers", "train", "train", "memory", "memory", "import_time", "page"]
    assert all(command.endswith(f"--output {FOR_THE_PAGE}") for command in commands[:-1])
