import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import wsbcn_d2
from wsbcn_d2 import collect_env, list_norm_options

ROOT = Path(__file__).resolve().parent.parent


def sections(text):
    """Returns what is printed as {name: value}; longer values go on in indented lines."""
    result = {}
    for line in text.splitlines():
        name, value = line[:22].strip(), line[22:].strip()
        if name:
            result[name] = value
            last = name
        else:
            result[last] += " " + value
    return result


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return subprocess.run(
        [sys.executable, "-m", "wsbcn_d2.collect_env"],
        check=True,
        stdout=subprocess.PIPE,
        universal_newlines=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "DETECTRON2_DATASETS": "/no/such/folder",
        },
    ).stdout


def test_fits_one_screen(printed):
    assert len(printed.splitlines()) < 45


def test_versions(printed):
    found = sections(printed)
    assert found["wsbcn_d2"].startswith(wsbcn_d2.__version__ + " ")
    assert found["wsbcn_d2"].endswith(str(ROOT / "wsbcn_d2"))
    assert found["Python"] == f"{platform.python_version()} @ {sys.executable}"
    assert found["torch"].startswith(torch.__version__)
    assert str(torch.version.cuda) in found["torch"] or torch.version.cuda is None
    for name in ("fvcore", "pycocotools", "numpy"):
        assert found[name] == metadata.version(name)
    assert found["torchvision"].partition("+")[0] == metadata.version("torchvision").split("+")[0]
    assert found["$DETECTRON2_DATASETS"] == "/no/such/folder"


def test_gpus(printed):
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in sections(printed)["GPU"]
    else:
        assert "GPU" not in sections(printed)
        assert torch.version.cuda is None or "no GPU available" in printed


def test_what_is_registered(printed):
    found = sections(printed)
    assert found["registered"] == "yes"
    assert found["kernels"].startswith(f"cpu: {wsbcn_d2.ops.backend_name(torch.device('cpu'))}")
    assert ("cuda: " in found["kernels"]) == torch.cuda.is_available()
    options, _, rest = found["norm options"].partition(";")
    assert options.split(", ") == list_norm_options()
    assert "+WS" in rest
    assert "build_wsbcn_resnet_fpn_backbone" in found["backbones"].split(", ")
    assert found["datasets here"] == "none"


def test_unregistered():
    wsbcn_d2.unregister()
    try:
        found = sections(collect_env.collect_env_info())
    finally:
        wsbcn_d2.register()
    assert found["registered"] == "no"
    assert found["backbones"] == "none"


def test_commit_of_a_checkout(printed):
    shown = sections(printed)["wsbcn_d2"]
    if not (ROOT / ".git").exists():
        assert "git" not in shown.partition("@")[0]
        return
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        check=True,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    ).stdout.strip()
    assert f"(git {commit}" in shown


def test_package_that_is_not_there():
    assert collect_env._version("no_such_package").startswith("not usable (No module named")


def test_dataset_whose_annotations_are_there(tmp_path, monkeypatch):
    annotations = tmp_path / "annotations.json"
    metadata_of_all = {
        "here": {"json_file": str(annotations)},
        "elsewhere": {"json_file": str(tmp_path / "no_such.json")},
        "without_files": {},
    }
    annotations.touch()
    monkeypatch.setattr(collect_env.DatasetCatalog, "list", lambda: list(metadata_of_all))
    monkeypatch.setattr(collect_env.MetadataCatalog, "get", metadata_of_all.__getitem__)
    assert collect_env._datasets() == ["here"]
