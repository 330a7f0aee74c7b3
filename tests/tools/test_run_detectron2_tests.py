"""The comparison of test runs, with a checkout of four tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "run_detectron2_tests.py"

TESTS = """
import sys, pytest
from detectron2.layers import get_norm

def test_same(): pass

def test_wrong(): assert False

@pytest.mark.skipif("wsbcn_d2" in sys.modules, reason="only without")
def test_skipped(): pass

class TestNorm:
    def test_option(self):
        assert get_norm("BCN", 32) is not None
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    (folder / "tests" / "layers").mkdir(parents=True)
    for package in (folder / "tests", folder / "tests" / "layers", folder / "detectron2"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    (folder / "tests" / "test_here.py").write_text("def test_wrong(): assert False")
    (folder / "tests" / "layers" / "test_norms.py").write_text(TESTS)
    # Settings around it are not for it.
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option")
    return folder


def run(checkout, *tests, **env):
    command = [sys.executable, str(TOOL), "--detectron2", checkout.name, *tests]
    return subprocess.run(
        command, cwd=checkout.parent, env={**os.environ, **env}, text=True, capture_output=True
    )


def test_differences(checkout):
    result = run(checkout)
    assert result.stdout.endswith("5 tests without wsbcn_d2, 5 with; differ: 2\n"), result.stdout
    assert result.stderr.splitlines() == [
        "tests.layers.test_norms.TestNorm::test_option: failure without, passed with",
        "tests.layers.test_norms::test_skipped: passed without, skipped with",
    ]
    assert result.returncode == 1


def test_no_difference(checkout):
    for package in ("detectron2", "wsbcn_d2"):  # in the place of those that take long to import
        (checkout / f"{package}.py").touch()
    result = run(checkout, "tests/test_here.py", PYTHONPATH=str(checkout))
    assert result.stdout.endswith("1 tests without wsbcn_d2, 1 with; differ: 0\n"), result.stdout
    assert (result.returncode, result.stderr) == (0, "")


def test_no_checkout(checkout):
    result = run(checkout, "tests/layer")
    assert result.returncode == 2 and result.stdout == ""
    assert "expected a checkout of Detectron2, found no " in result.stderr
    assert result.stderr.endswith("tests/layer\n")
