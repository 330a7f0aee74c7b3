"""Folders of runs, complete, incomplete, and of other people."""

import json

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from wsbcn_d2 import add_wsbcn_config
from wsbcn_d2.analysis import read_run
from wsbcn_d2.analysis.runs import label_by_config, label_by_folder, label_by_name, split_label


def make_run(folder, *opts, norm="GN", ours=False, seed=1):
    """A folder with the config and the metrics of a run."""
    cfg = get_cfg()
    if ours:
        add_wsbcn_config(cfg)
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    norms = [x for part in parts for x in (f"MODEL.{part}.NORM", norm)]
    cfg.merge_from_list([*norms, "MODEL.MASK_ON", "True", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1"])
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
    cfg.merge_from_list(["SEED", str(seed), "OUTPUT_DIR", str(folder), *opts])
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    lines = [{"iteration": i, "total_loss": 3.0 - i / 100, "time": 0.1 * i} for i in (19, 39, 59)]
    lines.append({"iteration": 60, "bbox/AP": 12.0, "segm/AP": float("nan")})
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_of_detectron2_alone(tmp_path):
    folder = make_run(tmp_path / "run", norm="SomebodysNorm(7)")
    (folder / "log.txt").write_text("iter: 19 max_mem: 812M\niter: 39 max_mem: 3456M\n")
    torch.save({"model": {"a": torch.zeros(3, 4), "b": torch.zeros(5)}}, folder / "model_0.pth")
    (folder / "last_checkpoint").write_text("model_0.pth")
    (folder / "inference").mkdir()
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    run = read_run(str(folder))
    assert run.notes == []
    assert run.name == "run" and run.norm == "SomebodysNorm(7)"
    assert run.iterations == 60
    assert run.seconds_per_iteration == pytest.approx(3.9)
    assert run.curve("bbox/AP") == ([60], [12.0]) and run.curve("segm/AP") == ([], [])
    assert run.peak_memory == 3456 and run.parameters == 17
    assert run.load_predictions() == []


def test_what_is_missing_is_said(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"iteration": 3, "total_loss": 1.0}\n{"iteration": 4, "t')
    run = read_run(str(folder))
    assert run.iterations == 4 and run.norm is None and run.seconds_per_iteration is None
    assert run.notes == [
        "no config.yaml",
        "metrics.json: 1 lines cannot be read",
        "no checkpoint",
        "no inference/coco_instances_results.json: no intervals",
    ]
    with pytest.raises(ValueError, match="has no coco_instances_results.json"):
        run.load_predictions()


def test_broken_files_are_said(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text("MODEL: !!python/object/apply:os.getcwd []")
    (folder / "model_final.pth").write_bytes(b"half a file")
    (folder / "inference").mkdir()
    (folder / "inference" / "coco_instances_results.json").write_text("{}")
    run = read_run(str(folder))
    first, second = run.notes
    assert first.startswith("config.yaml cannot be read (could not determine a constructor")
    assert second.startswith("model_final.pth cannot be read")
    with pytest.raises(ValueError, match="must hold a list in COCO's result format, not dict"):
        run.load_predictions()


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="it has none of config.yaml"):
        read_run(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        read_run(str(tmp_path / "nowhere"))


def test_labels_are_norms_and_what_else_differs(tmp_path):
    folders = [
        make_run(tmp_path / "gn_s1"),
        make_run(tmp_path / "gn_s2", seed=2),
        # neither the keys of this package nor its own name for a backbone make a difference
        make_run(
            tmp_path / "gn_s3",
            "MODEL.BACKBONE.NAME",
            "build_wsbcn_resnet_fpn_backbone",
            ours=True,
            seed=3,
        ),
        make_run(tmp_path / "fast", "SOLVER.BASE_LR", "0.5"),
        make_run(
            tmp_path / "slow-seed4",
            "MODEL.WSBCN.UPDATE_RATE_SCHEDULE",
            "lr",
            norm="BCN+WS",
            ours=True,
        ),
        make_run(tmp_path / "mixed", "MODEL.FPN.NORM", "BN"),
        make_run(tmp_path / "half", "SOLVER.AMP.ENABLED", "True"),
        make_run(tmp_path / "nameless"),
    ]
    (folders[-1] / "config.yaml").unlink()
    runs = [read_run(str(folder)) for folder in folders]
    assert label_by_config(runs) == [
        *("GN", "GN", "GN"),
        "GN, BASE_LR=0.5",
        "BCN+WS, UPDATE_RATE_SCHEDULE=lr",
        "GN, FPN BN",
        "GN, SOLVER.AMP.ENABLED=True",
        "nameless",
    ]
    assert label_by_folder(runs) == ["gn", "gn", "gn", "fast", "slow", "mixed", "half", "nameless"]


def test_labels_of_other_models_than_detectron2s(tmp_path):
    """Which of their norms count is not known."""
    for key, value in (("META_ARCHITECTURE", "MyRCNN"), ("BACKBONE.NAME", "build_my_backbone")):
        (tmp_path / key).mkdir()
        key = f"MODEL.{key}"
        norms = ["MODEL.RESNETS.NORM", "MODEL.ROI_BOX_HEAD.NORM"]
        runs = [
            read_run(
                str(
                    make_run(
                        tmp_path / key[6:] / n, key, value, *[x for k in norms for x in (k, n)]
                    )
                )
            )
            for n in ("GN", "BCN+WS")
        ]
        assert len(set(label_by_config(runs))) == 2


def test_folders_of_equal_names(tmp_path):
    folders = [tmp_path / name / "output" for name in ("gn", "bcn")]
    for folder in folders:
        folder.parent.mkdir()
    runs = [read_run(str(make_run(folder))) for folder in folders]
    assert label_by_name(runs) == ["gn/output", "bcn/output"]
    (folders[0] / "config.yaml").unlink()
    (folders[1] / "config.yaml").unlink()
    assert label_by_config([read_run(str(f)) for f in folders]) == ["gn/output", "bcn/output"]
    classes = [make_run(tmp_path / name) for name in ("classes10", "classes20")]
    assert label_by_folder([read_run(str(f)) for f in classes]) == ["classes10", "classes20"]


def test_a_config_that_is_none_of_detectron2(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text(yaml.dump({"model": {"_target_": "x.Y"}}))
    assert read_run(str(folder)).notes[0] == "config.yaml is not one of Detectron2's YACS configs"


@pytest.mark.parametrize(
    "argument, label, paths",
    [
        ("gn", "", ["gn"]),
        ("A=gn", "A", ["gn"]),
        ("lr=0.01", "", ["lr=0.01"]),
        ("A=lr=0.01", "A", ["lr=0.01"]),
        ("lr=0.1=gn", "lr=0.1", ["gn"]),
        ("BCN, lr=0.1=runs/lr=0.01/b", "BCN, lr=0.1", ["runs/lr=0.01/b"]),
        ("runs/lr=0.01/b", "", ["runs/lr=0.01/b"]),
        ("A=gn,lr=0.01", "A", ["gn", "lr=0.01"]),
        ("A=x,y", "A", ["x,y"]),  # which is one folder
        ("gn,lr=0.01", "", ["gn", "lr=0.01"]),
        # nothing is there: the error is to name what was meant
        ("A=nowhere", "A", ["nowhere"]),
        ("A=lr=7,gn", "A", ["lr=7", "gn"]),
        ("runs/lr=0.01/nowhere", "", ["runs/lr=0.01/nowhere"]),
    ],
)
def test_label_and_path(tmp_path, monkeypatch, argument, label, paths):
    for folder in ("gn", "lr=0.01", "x,y", "runs/lr=0.01/b"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_label(argument, ",") == (label, paths)
    if len(paths) == 1:
        assert split_label(argument) == (label, paths)
