"""What the documents say and tell people to run."""

import argparse
import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from torch.distributed import HashStore

import wsbcn_d2
from demo.digits import make_digits_dataset

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
GETTING_STARTED = (ROOT / "docs" / "getting_started.md").read_text()
# What stands for something, and one thing that it may stand for.
PLACEHOLDERS = {"<norm>": "bcn_ws", "<schedule>": "2x", "<images>": "1img", "<seed>": "1"}
# Programs of others.
FOREIGN = {"pip", "git", "sed", "source", "twine", "pre-commit"}

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def text_of(document):
    text = document.read_text()
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    return text


def blocks(text, language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [block for name, block in found if name == language]


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]


# ------------------------------------------------------------------------------------------ links


@every_document
def test_files_that_are_named_exist(document):
    folders = "benchmarks|tools|configs|docs|requirements|tests|wsbcn_d2"
    paths = set(re.findall(rf"\b((?:{folders})/[\w/.-]+\.\w+)", text_of(document)))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def anchors(document):
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@every_document
def test_links_are_alive(document):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


# --------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """Takes the place of what a tool would do with its arguments."""


def parse(tool, arguments, monkeypatch):
    """The arguments of a tool as it understands them; SystemExit if it does not."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *args):
        raise Parsed(parse_args(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    monkeypatch.undo()
    return parsed.value.args[0]


def commands(text):
    """The commands in a document as lists of words, without what comes before the program."""
    for block in blocks(text):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            if words[:1] == ["cd"]:  # what follows is for another project
                break
            if words:
                yield words
    for line in re.findall(r"`(tools/\w+\.py [^`]+)`", text):
        yield shlex.split(line)


def check_command(words, monkeypatch):
    program, *arguments = words
    if program.startswith("tools/"):
        options = parse(program, arguments, monkeypatch)
        if "lazy" not in program:
            cfg = get_cfg()
            wsbcn_d2.add_wsbcn_config(cfg)
            cfg.merge_from_list(getattr(options, "opts", None) or [])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "python" and arguments[0] == "-m":
        sys.path.insert(0, str(ROOT))
        assert importlib.util.find_spec(arguments[1]) is not None
        sys.path.remove(str(ROOT))
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], "command", "exec")
    elif program in ("python", ".ci/run"):
        assert (ROOT / [*arguments, program][0]).is_file()
    else:
        assert program in FOREIGN


@every_document
def test_commands_are_understood(document, monkeypatch):
    for words in commands(text_of(document)):
        try:
            check_command(words, monkeypatch)
        except (AssertionError, KeyError, SystemExit, ValueError) as error:
            raise AssertionError(f"{document.name}: {shlex.join(words)}") from error


def test_commands_are_found():
    programs = [words[0] for words in commands(README)]
    assert programs.count("make") == 2 and "tools/train_net.py" in programs


def test_tools_can_be_executed():
    assert [t for t in (ROOT / "tools").iterdir() if t.suffix and not os.access(t, os.X_OK)] == []


# ---------------------------------------------------------------------------------------- numbers


def pairs(name):
    """Box and mask AP of the settings of docs/results/NAME.json, as the documents write them."""
    runs = {}
    for run in json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["runs"]:
        values = [run["ap"][kind]["AP"]["value"] for kind in ("bbox", "segm")]
        runs.setdefault((run["norm"].split(",")[0], run["label"]), []).append(values)
    return {
        setting: " / ".join(
            f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "")
            for v in zip(*values)
        )
        for setting, values in runs.items()
    }


def test_numbers_of_the_readme():
    rows = re.findall(r"^\| `([^`]+)` \| (\d[^|]*) \| ([^|]*) \|", README, re.M)
    assert {norm: f"{box} / {mask}" for norm, box, mask in rows} == {
        norm: pair
        for (norm, label), pair in pairs("long").items()
        if label == norm.lower().replace("+", "_")  # the norm's own setting, with nothing else
    }


NUMBER = r"\d+\.\d(?: ± \d+\.\d)?"


def test_numbers_of_the_results():
    text = (ROOT / "docs" / "results.md").read_text()
    found = 0
    for part in re.split(r"^## ", text, flags=re.M):
        names = re.findall(r"\(results/(\w+)\.md\)", part)
        known = {pair for name in names if name != "norms" for pair in pairs(name).values()}
        if "larger batches" in part:  # which quotes the first section
            known |= set(pairs("long").values())
        given = re.findall(f"{NUMBER} / {NUMBER}", part)
        assert [pair for pair in given if pair not in known] == []
        found += len(given)
    assert found > 40


# --------------------------------------------------------------------------------------- snippets


@every_document
def test_snippets_are_python(document):
    for snippet in blocks(document.read_text(), "python"):
        compile(snippet, document.name, "exec")


@pytest.mark.parametrize("norm,count", [("GN+WS", ""), ("BCN+WS", "69 BatchChannelNorm(estimate)")])
def test_use(norm, count, tmp_path, monkeypatch):
    """The lines of the README make of a model of Detectron2 what they promise."""
    (python,) = blocks(README, "python")
    (yaml,) = blocks(README, "yaml")
    (tmp_path / "my.yaml").write_text(yaml.replace('GN+WS"', f'{norm}"'))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python, names)
    cfg = names["cfg"]
    cfg.MODEL.DEVICE = "cpu"
    summary = wsbcn_d2.summarize(build_model(cfg))
    assert summary.startswith("weight standardization in 69 of 74 convolutions")
    assert count in summary


def test_your_own_trainer():
    trainer, _ = blocks((ROOT / "docs" / "statistics.md").read_text(), "python")
    names = {}
    exec(trainer, names)
    assert issubclass(names["MyTrainer"], DefaultTrainer)
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS = "cpu", "backbone"
    assert type(names["MyTrainer"].build_model(cfg).backbone.stem).__name__.startswith("Checkp")


def test_your_own_loop(monkeypatch):
    """One of two processes: the other has seen as much, with mean 1 instead of 3."""
    _, loop = blocks((ROOT / "docs" / "statistics.md").read_text(), "python")
    norm = wsbcn_d2.BatchChannelNorm(2, 1, update_rate=0.5)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, batch):
            return {"loss": self.norm(batch).square().mean()}

    def all_reduce(flat):
        other = wsbcn_d2.BatchChannelNorm(2, 1, update_rate=0.5)
        other(torch.ones(1, 2, 4, 4))
        seen = other.seen_elements.double().unsqueeze(-1)
        parts = (other.running_mean * seen, other.running_var * seen, seen)
        flat += torch.cat([part.reshape(-1) for part in parts])

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = Model()
        names = {"model": model, "loader": [torch.full((1, 2, 4, 4), 3.0)]}
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        monkeypatch.setattr("wsbcn_d2.engine.statistics.several_ranks", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        exec(loop, names)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 0.5 * (3 + 1) / 2))


def one_class_with_polygons(annotations):
    """What the command of the README expects: Detectron2's balloon dataset is like that."""
    data = json.loads(annotations.read_text())
    data["categories"] = [{"id": 1, "name": "balloon"}]
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["category_id"] = 1
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    annotations.write_text(json.dumps(data))


def make_balloons(folder, **sizes):
    make_digits_dataset(str(folder), progress=False, **sizes)
    for part in ("train", "val"):
        annotations = folder / "annotations" / f"instances_{part}.json"
        one_class_with_polygons(annotations)
        annotations.rename(folder / f"{part}.json")


def test_your_own_lazy_config(tmp_path):
    text = section(GETTING_STARTED, "LazyConfig")
    (config,), (command,) = blocks(text, "python"), blocks(text)
    make_balloons(tmp_path / "PATH", num_train=2, num_val=2, image_size=64)
    (tmp_path / "my_lazy.py").write_text(config)
    tool, *arguments = shlex.split(command)
    size = "mapper.augmentations.0.short_edge_length"
    small = [
        *("train.max_iter=1", "train.device=cpu"),
        *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
        *(f"dataloader.train.{size}=[64]", f"dataloader.test.{size}=64"),
    ]
    command = [sys.executable, str(ROOT / tool), *arguments, *small]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "groups=16" in (tmp_path / "output" / "lazy" / "config.yaml").read_text()
    assert (tmp_path / "output" / "lazy" / "model_final.pth").is_file()


# Runs commands and then a snippet in one process, which has to import everything once only.
RUN = """
import json, runpy, sys
commands, snippet = json.loads(sys.argv[1])
for sys.argv in commands:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
exec(snippet)
"""


def test_your_own_dataset(tmp_path):
    text = section(README, "Your own dataset") + section(GETTING_STARTED, "Look at the run")
    (predictor,) = blocks(section(GETTING_STARTED, "Predict"), "python")
    predictor += "import numpy; print(predictor(numpy.zeros((96, 80, 3), 'uint8')))"
    make_balloons(tmp_path / "PATH", num_train=4, num_val=2, image_size=96)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # all detections, as there are hardly good ones after so few steps
    shorter = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    shorter += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    script = [[str(ROOT / words[0]), *words[1:]] for words in commands(text)]
    script[0] += shorter
    subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([script, predictor])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    run = tmp_path / "output" / "my"
    metrics = json.loads((run / "metrics.json").read_text().splitlines()[-1])
    compared = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert compared["dataset"]["name"] == "my_val"
    assert compared["groups"][0]["ap"]["bbox"]["AP"]["value"] == pytest.approx(
        metrics["bbox/AP"], abs=1e-3
    )
    assert (run / "predictions.png").stat().st_size > 1000
    assert (run / "folded" / "config.yaml").is_file()


# ----------------------------------------------------------------------------------- architecture


def imports(path, package):
    """The files and folders of the package that a file imports, by their names in the page."""
    relative = path.relative_to(package)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = relative.parts[: len(relative.parts) - node.level]
            names = [folder + tuple((node.module or "").split("."))] if node.module else []
            names = names or [folder + (alias.name,) for alias in node.names]
            yield from (name[0] for name in names)


def test_rows_of_the_architecture_import_from_rows_below():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## What runs")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.M)
    rows = [re.findall(r"`([\w.]+)/?`", cell) for cell in cells]
    level = {name.partition(".")[0]: number for number, row in enumerate(rows) for name in row}
    package = ROOT / "wsbcn_d2"
    wrong = set()
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].partition(".")[0]
        for other in imports(path, package) if own != "__init__" else ():
            if other != own and level[other] <= level[own]:
                wrong.add((own, other))
    assert wrong == set()
