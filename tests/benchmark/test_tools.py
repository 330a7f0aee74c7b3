"""The two tools, and the command that runs them."""

import json
import os
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from wsbcn_d2.benchmark import report
from wsbcn_d2.benchmark.__main__ import COMMANDS, commands, main

ROOT = Path(__file__).parents[2]
NORMS = [
    *("--shapes", "1x64x6x5", "2x32x3x3", "--repetitions", "2", "--warmup", "1"),
    *("--copy-mib", "1", "--contenders", "BCN", "reference", "GroupNorm", "FrozenBN"),
]
TRAIN = [
    *("--norms", "GN", "BCN+WS", "--size", "64x96", "--checkpoint-activations"),
    *("--repetitions", "2", "--warmup", "1", "--opts"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
]


def load_tool(kind):
    name = f"benchmark_{kind}"
    spec = spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind,arguments", [("norms", NORMS), ("train", TRAIN)])
def test_benchmark(kind, arguments, tmp_path):
    tool = ROOT / "tools" / f"benchmark_{kind}.py"
    outputs = ["--json", "out.json", "--markdown", "out.md", "--plot", "out.png"]
    result = subprocess.run(
        [sys.executable, tool, "--device", "cpu", *outputs, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md", "out.png"]
    content = json.loads((tmp_path / "out.json").read_text())
    text = report.markdown(content)
    assert (tmp_path / "out.md").read_text() == text and result.stdout.strip() == text.strip()
    assert f"tools/benchmark_{kind}.py --device cpu --json out.json" in content["command"]
    assert "run" in result.stderr and "100%" in result.stderr  # the progress bar
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    if kind == "norms":
        assert len(content["rows"]) == 8
    else:
        names = ["GN", "BCN+WS", "BCN+WS, checkpointed"]
        assert [row["norm"] for row in content["rows"]] == names
        gn, ours, checkpointed = content["rows"]
        assert "standardization" not in gn and ours["standardization"]["median"] > 0
        assert "inference_folded" not in gn and ours["inference_folded"]["median"] > 0
        assert checkpointed["saved_bytes"] < ours["saved_bytes"]


@pytest.mark.parametrize(
    "kind,arguments,message",
    [
        ("train", ["--memory-gib", "8"], "memory_gib needs a GPU, and the device is cpu"),
        ("train", ["--amp", "float16"], "amp needs a GPU, and the device is cpu"),
        ("train", ["--size", "20"], "--size: must be like 256 or 800x1333"),
        ("train", ["--opts", "MODEL.NOWHERE", "1"], "there is no config key MODEL.NOWHERE"),
        ("norms", ["--shapes", "1x64x6"], "--shapes: must be like 1x64x400x672, got '1x64x6'"),
        ("norms", ["--json", f"{__file__}/out.json"], "cannot write"),
    ],
)
def test_an_error_is_one_line(kind, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tool = str(ROOT / "tools" / f"benchmark_{kind}.py")
    monkeypatch.setattr(sys, "argv", [tool, "--device", "cpu", *arguments])
    assert load_tool(kind).main() == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"benchmark_{kind}.py: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [c for device in COMMANDS for c in commands(device)])
def test_commands_behind_the_page(command):
    tool, *arguments = shlex.split(command)
    args = load_tool(Path(tool).stem.partition("_")[2]).build_parser().parse_args(arguments)
    name = Path(args.json).stem
    assert name in COMMANDS[args.device] and Path(args.json).parent == Path("docs/benchmarks")


def test_list_of_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--list"])
    assert main() == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "tools/benchmark_norms.py --device cpu --json docs/benchmarks/norms-cpu.json"
    assert second.startswith("tools/benchmark_train.py --device cpu --size 256 ")
    assert third.startswith("tools/benchmark_train.py --device cpu --size 800x1333 ")
