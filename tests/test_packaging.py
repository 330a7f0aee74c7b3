"""What pip installs from an sdist and a wheel, and wsbcn_d2.model_zoo there and in a checkout."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from versions import needs_native_kernels

from wsbcn_d2 import model_zoo, version
from wsbcn_d2.version import check_versions

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
YAML = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_bcn_ws_2x_1img.yaml"
LAZY = "LazyConfig/mask_rcnn_R_50_FPN_1x.py"

# What a build reads.
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SOURCES += ("constraints.txt", "wsbcn_d2", "configs")
# What measures and demonstrates, which nobody installs.
LAB = ("benchmarks", "demo")


def files(folder):
    """Of the checkout, relative to it."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*")}
    return {path for path in found if path.endswith((".py", ".c", ".yaml", ".typed"))}


def run(*command, **kwargs):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        **kwargs,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, since setuptools writes into the folder that it builds from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, *LAB):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    # What a build of an older version has left.
    old = folder / "build" / "lib" / "wsbcn_d2" / "configs" / "old.yaml"
    old.parent.mkdir(parents=True)
    old.touch()
    return folder


@pytest.fixture(scope="module")
def unpacked_sdist(checkout, tmp_path_factory):
    pytest.importorskip("setuptools")
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=checkout)
    (archive,) = (checkout / "dist").iterdir()
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    (folder,) = folder.iterdir()
    return folder


def build_wheel(source, folder):
    pytest.importorskip("pip")
    if "bdist_wheel" not in run("setup.py", "--help-commands", cwd=source):
        pytest.skip("this version of setuptools needs the package wheel, which is not installed")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run("-m", "pip", "wheel", *options, source)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(unpacked_sdist, tmp_path_factory):
    return build_wheel(unpacked_sdist, tmp_path_factory.mktemp("wheel"))


# Of a compiler, if there is one.
KERNELS = re.compile(r"wsbcn_d2/ops/native_kernels\.[^/]+\.(so|pyd)$")


def contents(wheel):
    """All but the metadata and the kernels."""
    names = zipfile.ZipFile(wheel).namelist()
    return {n for n in names if not (KERNELS.match(n) or n.split("/")[0].endswith(".dist-info"))}


# What a wheel must have, by its place in the checkout.
def expected_contents():
    sources = {path for path in files("wsbcn_d2") if not path.endswith(".c")}
    return sources | {f"wsbcn_d2/{path}" for path in files("configs")}


def test_sdist_has_what_the_wheel_is_built_from(unpacked_sdist):
    assert "[flake8]" in (unpacked_sdist / "setup.cfg").read_text()  # setuptools adds a section
    for name in {*SOURCES[:-2], *files("wsbcn_d2"), *files("configs")} - {"setup.cfg"}:
        assert (unpacked_sdist / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert not any((unpacked_sdist / name).exists() for name in LAB)


def test_wheel_from_the_sdist(wheel):
    """So it has nothing of what measures and demonstrates."""
    others = ("py.typed", "ops/native_backend.py", f"configs/{YAML}")
    assert {f"wsbcn_d2/{name}" for name in others} <= contents(wheel)
    assert contents(wheel) == expected_contents()


@needs_native_kernels
def test_wheel_has_kernels(wheel):
    assert len([name for name in zipfile.ZipFile(wheel).namelist() if KERNELS.match(name)]) == 1


def test_wheel_from_the_checkout(checkout, tmp_path):
    assert contents(build_wheel(checkout, tmp_path)) == expected_contents()


READ = f"""
import json
import wsbcn_d2
from wsbcn_d2 import model_zoo

cfg = model_zoo.get_config({YAML!r})
print(json.dumps({{
    "package": wsbcn_d2.__file__,
    "file": model_zoo.get_config_file({YAML!r}),
    "norm": cfg.MODEL.RESNETS.NORM,
    "cfg": cfg.dump(),
    "lazy": model_zoo.get_config({LAZY!r}).train.norm,
}}))
"""


def test_installed_package_has_the_configs(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    output = run("-W", "ignore", "-c", READ, cwd=elsewhere, env=environment)
    found = json.loads(output.splitlines()[-1])
    assert Path(found["package"]) == site / "wsbcn_d2" / "__init__.py"
    assert Path(found["file"]) == site / "wsbcn_d2" / "configs" / YAML
    assert found["norm"] == found["lazy"] == "BCN+WS"
    assert found["cfg"] == model_zoo.get_config(YAML).dump()


def test_import_brings_nothing_that_detectron2_has_not():
    """So its time is that of our own few files; Triton and the like wait until they are used."""
    code = """if True:
        import sys
        import detectron2.checkpoint, detectron2.config, detectron2.data, detectron2.engine
        import detectron2.modeling
        before = set(sys.modules)
        import wsbcn_d2
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert new == {"wsbcn_d2"}, new
    """
    run("-W", "error::DeprecationWarning:wsbcn_d2", "-c", code)


MARK = "convert_frozenbatchnorm2d_to_batchnorm2d"  # Detectron2 0.6 has no such method
TOO_OLD = (
    "wsbcn_d2 needs Python 3.10, torch 2.4 and Detectron2's main branch of 2024, or newer; this "
    "environment has "
)


def test_importing_with_too_old_versions():
    code = f"""if True:
        import torch, detectron2.layers
        torch.__version__ = "2.3.1+cu121"
        del detectron2.layers.FrozenBatchNorm2d.{MARK}
        try:
            import wsbcn_d2
        except ImportError as error:
            print(error)
    """
    found = "torch 2.3.1+cu121 and a Detectron2 of before 2024, as its release 0.6 is."
    assert run("-c", code).splitlines()[-1] == TOO_OLD + found


def test_every_version_is_checked(monkeypatch):
    for holder, name, value, found in (
        (sys, "version_info", (3, 9, 18, "final", 0), "Python 3."),
        (torch, "__version__", "1.13.1", "torch 1.13.1."),
        (torch, "__version__", "2.4.0a0+git1234", None),
        (torch, "__version__", "3.0.0", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, value)
            if found is None:
                check_versions()
            else:
                with pytest.raises(ImportError, match=re.escape(TOO_OLD + found)):
                    check_versions()


def test_versions_of_python_are_the_same_everywhere(unpacked_sdist):
    setup_env = runpy.run_path(str(ROOT / "tools" / "setup_env.py"))
    (oldest_major, oldest), (_, newest) = setup_env["OLDEST"], setup_env["NEWEST"]
    tested = [f"{oldest_major}.{minor}" for minor in range(oldest, newest + 1)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == tested
    metadata = Parser().parsestr((unpacked_sdist / "PKG-INFO").read_text())
    classifiers = [c for c in metadata.get_all("Classifier") if "Python ::" in c]
    assert classifiers == [f"Programming Language :: Python :: {python}" for python in tested]
    assert metadata["Requires-Python"] == f">={tested[0]}"
    assert version._PYTHON == setup_env["OLDEST"]
    assert f"torch>={version._TORCH[0]}.{version._TORCH[1]}" in metadata.get_all("Requires-Dist")


def test_configs_of_a_checkout():
    assert model_zoo.get_config_file(YAML) == str(CONFIGS / YAML)
    cfg = model_zoo.get_config(YAML)
    assert isinstance(cfg, CfgNode) and not cfg.is_frozen()
    assert cfg.MODEL.FPN.NORM == "BCN+WS" and "SYNC_PERIOD" in cfg.MODEL.WSBCN
    assert model_zoo.get_config(LAZY).model.backbone.norm == "BCN+WS"


@pytest.mark.parametrize("name", ["", "COCO-InstanceSegmentation", YAML.replace("bcn_ws", "bcnws")])
def test_unknown_config(name):
    with pytest.raises(FileNotFoundError) as error:
        model_zoo.get_config_file(name)
    assert f"no config {name!r} in {CONFIGS}" in str(error.value)
    assert (YAML in str(error.value)) == name.endswith(".yaml")


def test_installation_without_configs(monkeypatch, tmp_path):
    monkeypatch.setattr(model_zoo, "_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="neither .*a nor .*b"):
        model_zoo.get_config_file(YAML)
