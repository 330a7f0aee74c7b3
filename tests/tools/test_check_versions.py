"""The page of versions is what its numbers give."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_versions.py"


def load_tool():
    spec = spec_from_file_location("check_versions", TOOL)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page():
    results = json.loads((ROOT / "docs" / "data" / "versions.json").read_text())
    sets = yaml.safe_load((ROOT / "requirements" / "versions.yaml").read_text())
    assert results
    for name, result in results.items():  # no row of a set that was changed since
        assert result["detectron2"] == sets[name]["detectron2"]
    page = (ROOT / "docs" / "versions.md").read_text()
    for result in results.values():
        assert f"| {result['versions']['torch']} |" in page
    assert load_tool().table(results) in page


def test_unknown_set():
    result = subprocess.run(
        [sys.executable, str(TOOL), "newest", "ancient"], text=True, capture_output=True
    )
    assert result.returncode == 2
    assert "versions.yaml has no ancient, but oldest, newest" in result.stderr
