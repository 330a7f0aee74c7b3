"""Files appear when they are complete, whatever happens while they are written."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import Conv2d
from torch import nn

from wsbcn_d2.engine import ConfigError
from wsbcn_d2.engine.checkpoint import (
    AtomicCheckpointer,
    CompleteCheckpointer,
    atomic_write,
    check_output,
)
from wsbcn_d2.norm_options import NormOption

ROOT = Path(__file__).parents[2]

# For every KIND:VICTIM a process that saves once, saves again under the same name, and is gone in
# the middle of writing VICTIM, as by `kill -9`.
KILLED = """
import builtins, os, sys
import torch
from torch import nn
from detectron2.checkpoint import DetectionCheckpointer
from wsbcn_d2.engine.checkpoint import AtomicCheckpointer

for case in sys.argv[1:]:
    kind, victim = case.split(":")
    os.mkdir(case)
    if os.fork() == 0:
        break
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
else:
    sys.exit(0)

model = nn.Linear(1000, 10)
nn.init.constant_(model.weight, 1.0)
cls = AtomicCheckpointer if kind == "atomic" else DetectionCheckpointer
checkpointer = cls(model, case)
checkpointer.save("model_final", iteration=3)
nn.init.constant_(model.weight, 2.0)
original = builtins.open

def open_to_die(path, mode="r", *args, **kwargs):
    file = original(path, mode, *args, **kwargs)
    if "w" in mode and os.path.basename(path).startswith(victim):
        if victim == "last_checkpoint":
            os._exit(9)
        write = file.write
        class Dying:
            def __getattr__(self, name):
                return getattr(file, name)
            def __enter__(self):
                return self
            def __exit__(self, *args):
                file.close()
            def write(self, data):
                write(bytes(data)[: len(data) // 2])
                file.flush()
                os._exit(9)
        return Dying()
    return file

import iopath.common.file_io
builtins.open = iopath.common.file_io.open = open_to_die
checkpointer.save("model_final", iteration=7)
os._exit(1)
"""


def test_killed_while_writing(tmp_path):
    """The same name, as `model_final` when a finished run is prolonged."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cases = [f"{k}:{v}" for k in ("atomic", "stock") for v in ("model_final", "last_checkpoint")]
    result = subprocess.run(
        [sys.executable, "-c", KILLED, *cases],
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr

    def resumed(case):
        model = nn.Linear(1000, 10)
        checkpointer = AtomicCheckpointer(model, str(tmp_path / case))
        extra = checkpointer.resume_or_load("", resume=True)
        return extra["iteration"], model.weight[0, 0].item()

    assert resumed("atomic:model_final") == (3, 1.0)
    # the second checkpoint is complete, and the name to be written is the same
    assert resumed("atomic:last_checkpoint") == (7, 2.0)
    # Detectron2's own, for comparison
    with pytest.raises(Exception, match="zip|central directory|PytorchStreamReader"):
        resumed("stock:model_final")
    with pytest.raises(ConfigError, match="cannot be read"):
        resumed("stock:last_checkpoint")
    assert os.path.getsize(tmp_path / "stock:last_checkpoint" / "last_checkpoint") == 0


def test_same_files_as_detectron2(tmp_path):
    model = nn.Linear(3, 2)
    contents = {}
    for cls in (AtomicCheckpointer, DetectionCheckpointer):
        folder = tmp_path / cls.__name__
        folder.mkdir()
        checkpointer = cls(model, str(folder))
        checkpointer.save("model_0000001", iteration=1)
        checkpointer.save("model_0000002", iteration=2)
        assert checkpointer.has_checkpoint()
        assert checkpointer.get_checkpoint_file() == str(folder / "model_0000002.pth")
        assert len(checkpointer.get_all_checkpoint_files()) == 2
        files = sorted(os.listdir(folder))
        contents[cls] = files, torch.load(folder / "model_0000002.pth", weights_only=True)
    first, second = contents.values()
    assert first[0] == second[0] == ["last_checkpoint", "model_0000001.pth", "model_0000002.pth"]
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04 half"], ids=repr)
@pytest.mark.parametrize("cls", [AtomicCheckpointer, CompleteCheckpointer])
def test_file_that_is_no_checkpoint(tmp_path, cls, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="model.pth' is not a checkpoint: ") as raised:
        cls(nn.Linear(1, 1)).load(str(path))
    assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
@pytest.mark.parametrize("cls", [AtomicCheckpointer, CompleteCheckpointer])
def test_weights_under_the_names_of_other_programs(tmp_path, cls, key):
    path, source, model = str(tmp_path / "model.pth"), nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save({key: source.state_dict(), "epoch": 3, "optimizer": {"state": {}}}, path)
    cls(model).load(path)
    torch.testing.assert_close(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "state", [{"net.weight": torch.ones(2, 3), "net.bias": torch.ones(2)}, {"epoch": 3}]
)
def test_weights_of_which_none_fits(tmp_path, state):
    """Training would begin with random weights, and only the log would say so."""
    path = str(tmp_path / "model.pth")
    torch.save({"model": state}, path)
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="model.pth'") as raised:
        AtomicCheckpointer(model).load(path)
    if "net.weight" in state:
        assert "none of its 2 entries (net.weight, net.bias, ...) is a par" in str(raised.value)
        # a part of them is welcome
        torch.save({"model": {**state, "bias": torch.ones(2)}}, path)
        AtomicCheckpointer(model).load(path)
        assert model.bias.tolist() == [1, 1]


def test_entries_that_the_model_lacks(tmp_path):
    """Those of a part that it has not are left out, those of a layer that it has are an error."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    path, state = str(tmp_path / "model.pth"), model.state_dict()
    del model[1].num_batches_tracked  # as of a frozen one
    torch.save(
        {"model": {**state, "mask_head.weight": torch.ones(1), "mean": state["0.bias"]}}, path
    )
    CompleteCheckpointer(model).load(path)
    model[1].register_buffer("num_batches_tracked", torch.tensor(0))
    del state["1.num_batches_tracked"]  # as older frozen ones, which do not count
    torch.save({"model": dict(state)}, path)
    CompleteCheckpointer(model).load(path)
    for name in ("1.group_weight", "0.norm.weight"):
        torch.save({"model": {**state, name: torch.ones(1)}}, path)
        with pytest.raises(
            ConfigError, match=f"model.pth': .* 1 entries more .*, the first of them {name};"
        ):
            CompleteCheckpointer(model).load(path)
        AtomicCheckpointer(model).load(path)
    torch.save({"model": {**state, "0.ws_eps": torch.ones(1)}}, path)
    with pytest.raises(ConfigError, match=r"1 convolutions .* the first of them 0: use a config"):
        AtomicCheckpointer(model).load(path)


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="full"):
        with atomic_write(str(path), "w") as file:
            file.write("ne")
            raise RuntimeError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with atomic_write(str(path), "w") as file:
        file.write("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_other_modes_and_places_are_left_to_detectron2(tmp_path):
    manager = AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path)).path_manager
    path = str(tmp_path / "file")
    with manager.open(path, "w") as file:
        file.write("a")
    with manager.open(path, "a") as file:
        file.write("b")
    with manager.open(path) as file:
        assert file.read() == "ab"
    assert manager.exists(path) and manager.isfile(path)


class Classifier(nn.Module):
    def __init__(self, classes, extra=False):
        super().__init__()
        self.features = nn.Linear(4, 8)
        self.predict = nn.Linear(8, classes)
        if extra:
            self.masks = nn.Linear(8, 1)


def trained(folder, model, resume, lr=0.1):
    """After a step of SGD with momentum, whose state has the shapes of the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    checkpointer = AtomicCheckpointer(model, str(folder), optimizer=optimizer)
    checkpointer.resume_or_load("", resume=resume)
    model.predict(model.features(torch.ones(1, 4))).sum().backward()
    optimizer.step()
    checkpointer.save("model_final")
    return model


@pytest.mark.parametrize(
    "other, message",
    [
        (Classifier(3), r"predict.weight has the shape \(5, 8\) there and \(3, 8\) in the model"),
        (Classifier(5, extra=True), "it has no masks.weight"),
    ],
)
def test_resuming_with_another_model(tmp_path, other, message):
    """With another number of classes, or a new head; before the optimizer's first step."""
    trained(tmp_path, Classifier(5), resume=False)
    with pytest.raises(ConfigError, match="cannot resume from .*model_final.pth.*: " + message):
        trained(tmp_path, other, resume=True)
    trained(tmp_path, Classifier(5), resume=True)
    # as mere weights, for another task, it is welcome
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    checkpointer = AtomicCheckpointer(other, str(tmp_path), optimizer=optimizer)
    checkpointer.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)


@pytest.mark.parametrize("before, after", [("GN+WS", "GN"), ("BN", "GN"), ("BCN+WS", "BCN")])
def test_resuming_with_other_norms(tmp_path, before, after):
    """All that the model has is there, so that it would load."""

    def model(norm):
        return nn.Sequential(Conv2d(3, 32, 1, norm=NormOption.parse(norm).build(32)))

    AtomicCheckpointer(model(before), str(tmp_path)).save("model_final")
    with pytest.raises(ConfigError, match="cannot resume .*: it has 0.*, and the model has not"):
        AtomicCheckpointer(model(after), str(tmp_path), resumes=True).resume_or_load("")
    AtomicCheckpointer(model(before), str(tmp_path), resumes=True).resume_or_load("")


def test_weights_that_are_not_there(tmp_path):
    for path in ("detectron://x.pkl", str(tmp_path / "x.pth")):
        with pytest.raises(ConfigError, match=f"'{path}' cannot be read: "):
            AtomicCheckpointer(nn.Linear(1, 1)).load(path)


def test_resuming_without_a_part_of_the_model(tmp_path):
    """All of the model is in the checkpoint; but its optimizer has more parameters."""
    trained(tmp_path, Classifier(5, extra=True), resume=False)
    with pytest.raises(ConfigError, match="cannot resume .* another model or optimizer: .*group"):
        trained(tmp_path, Classifier(5), resume=True)


@pytest.mark.parametrize("path", ["", "new/", "."])
def test_output_that_is_no_file(path, tmp_path, monkeypatch):
    """Found out before long work: it cannot be written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError, match=f"'{path}' is a folder; give a file to write"):
        check_output(path)
    with pytest.raises(OSError):
        with atomic_write(path) as file:
            file.write(b"1")
    check_output("new/file.pth")


def test_output_that_would_replace_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.pth").write_bytes(b"1")
    os.symlink("old.pth", "link.pth")
    os.mkfifo("pipe.pth")
    check_output("old.pth", source="detectron2://old.pth")
    for path, message in (
        ("old.pth", "'old.pth' is the file to read; give another one to write"),
        ("link.pth", "'link.pth' is the file to read"),
        ("pipe.pth", "cannot write 'pipe.pth': it is a device, or no regular file"),
        (os.devnull, "it is a device"),
        ("new.pkl", "cannot write 'new.pkl': checkpoints are written as .pth"),
        ("new.safetensors", "checkpoints are written as .pth"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(path, source="old.pth")


def test_a_full_disk(tmp_path):
    """The error names the file, and the file is the old one."""
    path = tmp_path / "old.pth"
    path.write_bytes(b"1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write '.*old.pth': is the disk full"):
            with atomic_write(str(path)) as file:
                torch.save(torch.zeros(1 << 20), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"1" and os.listdir(tmp_path) == ["old.pth"]
