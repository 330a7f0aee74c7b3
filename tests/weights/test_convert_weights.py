"""Converted weights in a Detectron2 model compute what they did at their source."""

import functools
import os
import pickle
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from sources import (
    BLOCKS,
    MASKRCNN_BENCHMARK,
    MMDETECTION,
    Detector,
    Random,
    authors_bcn,
    batch_norm,
    bcn_entries,
    bcn_ws_filters,
    gn_entries,
    gn_ws_filters,
    group_norm,
    make_resnet50,
    resnet50,
)
from torch import nn

import wsbcn_d2
from wsbcn_d2.layers import WeightStandardized
from wsbcn_d2.weights import CheckpointError, ConversionError, convert_state_dict, read_checkpoint
from wsbcn_d2.weights.formulas import rescaled_weight, source_filters

ROOT = Path(__file__).parents[2]
MASK_RCNN = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_ws_2x_1img.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 32),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
]
RESNEXT = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 1]
BATCH_NORMS = {"running_mean", "running_var"}


def config(norm=None, extra=()):
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.merge_from_file(str(MASK_RCNN))
    norms = [] if norm is None else ["MODEL.RESNETS.NORM", norm]
    cfg.merge_from_list([*SMALL, *norms, *extra])
    return cfg


def save(sd, path, **wrappers):
    torch.save({"state_dict": sd, "epoch": 3} if not wrappers else wrappers, path)
    return str(path)


def loaded(path, cfg, tmp_path):
    """The model of a config with converted weights, through Detectron2's own loader."""
    model = build_model(cfg).eval()
    state, report = convert_state_dict(read_checkpoint(path), model)
    converted = str(tmp_path / "converted.pth")
    torch.save({"model": state, "__author__": "test"}, converted)
    DetectionCheckpointer(model).load(converted)
    return model, report


def assert_same(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and b.abs().max() > 0.05
        assert (a - b).abs().max() / b.abs().max() < tolerance


def in_double(model, sd):
    """The comparison is of formulas; rounding of a deep network in float32 would hide errors."""
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in sd.items()}


# -------------------------------------------------------------------------------- ImageNet models

SOURCES = {
    "gn_ws": ("GN+WS", gn_entries, gn_ws_filters, group_norm),
    "bcn_ws": ("BCN+WS", bcn_entries, bcn_ws_filters, authors_bcn),
    "bn": ("BN", lambda r, name, c: r.statistics(name, c), lambda w: w, batch_norm),
}


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("source", SOURCES)
def test_backbones(source, groups, tmp_path):
    norm, entries, filters, normalize = SOURCES[source]
    random = Random()
    make_resnet50(random, entries, groups=groups)
    random.linear("fc", 10, 512)
    path = save({f"module.{k}": v for k, v in random.sd.items()}, tmp_path / "source.pth.tar")
    cfg = config(norm, RESNEXT if groups == 32 else [])
    model, report = loaded(path, cfg, tmp_path)
    assert not report.missing and set(report.left_over) == set()
    model, sd = in_double(model, random.sd)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = list(model.backbone.bottom_up(x).values())
        theirs = resnet50(x, sd, filters, normalize, groups=groups)
    assert_same(ours, theirs, 1e-5)
    standardized = [m for m in model.backbone.bottom_up.modules() if isinstance(m, nn.Conv2d)]
    assert report.filters.total() == (0 if source == "bn" else len(standardized))


@pytest.mark.parametrize("target", ["BN+WS", "FrozenBN+WS", "BN"])
def test_plain_filters_keep_their_function(target, tmp_path):
    """Torchvision's own model is the judge."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18()
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.weight.data, m.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            nn.init.normal_(m.bias), nn.init.normal_(m.running_mean)
        if isinstance(m, nn.Conv2d):
            m.weight.data += 0.02  # which standardization alone would remove
    path = save(theirs.state_dict(), tmp_path / "resnet18.pth", model=theirs.state_dict())
    extra = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
    model, report = loaded(path, config(target, extra), tmp_path)
    assert not report.missing
    x = torch.randn(1, 3, 64, 64)
    stages = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(theirs, name).register_forward_hook(lambda m, i, out: stages.append(out))
    with torch.no_grad():
        theirs.eval()(x)
        assert_same(list(model.backbone.bottom_up(x).values()), stages, 1e-4)
    for _, module in model.backbone.bottom_up.named_modules():
        if isinstance(module, WeightStandardized):
            assert module.ws_scale.shape == (module.out_channels,)


def test_batch_norm_becomes_the_first_part_of_bcn(tmp_path):
    random = Random()
    make_resnet50(random, SOURCES["bn"][1])
    path = save(random.sd, tmp_path / "bn.pth")
    model, report = loaded(path, config("BCN"), tmp_path)
    state = model.backbone.bottom_up.state_dict()
    for ours, theirs in (("stem.conv1", "bn1"), ("res3.0.shortcut", "layer2.0.downsample.1")):
        for entry in ("weight", "bias", *BATCH_NORMS):
            assert torch.equal(state[f"{ours}.norm.{entry}"], random.sd[f"{theirs}.{entry}"])
        assert (state[f"{ours}.norm.group_weight"] == 1).all()
        assert f"backbone.bottom_up.{ours}.norm.group_weight" in report.initialized
    assert not report.missing


CAFFE2 = {"weight": "bn_s", "bias": "bn_b", "running_mean": "bn_rm", "running_var": "bn_riv"}


def test_caffe2_names(tmp_path):
    """MSRA's R-50 as Detectron2 hosts it: a pickled dictionary of arrays."""
    random = Random()
    make_resnet50(random, SOURCES["bn"][1])
    blobs = {"conv1_w": random.sd["conv1.weight"].numpy()}
    for entry, c2 in CAFFE2.items():
        blobs[f"res_conv1_{c2}"] = random.sd[f"bn1.{entry}"].numpy()
    for s, blocks in enumerate(BLOCKS):
        for b in range(blocks):
            pairs = [(f"conv{i + 1}", f"bn{i + 1}", "branch2" + "abc"[i]) for i in range(3)]
            if b == 0:
                pairs.append(("downsample.0", "downsample.1", "branch1"))
            for conv, bn, branch in pairs:
                source, c2 = f"layer{s + 1}.{b}.", f"res{s + 2}_{b}_{branch}"
                blobs[f"{c2}_w"] = random.sd[f"{source}{conv}.weight"].numpy()
                for entry, suffix in CAFFE2.items():
                    blobs[f"{c2}_{suffix}"] = random.sd[f"{source}{bn}.{entry}"].numpy()
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": blobs, "matching_heuristics": True}))
    model, report = loaded(str(path), config("FrozenBN"), tmp_path)
    assert not report.missing and not report.left_over
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = list(model.backbone.bottom_up(x).values())
        assert_same(ours, resnet50(x, random.sd, lambda w: w, batch_norm), 1e-3)


def test_torchvision_as_detectron2_converts_it(tmp_path):
    """Its tool, convert-torchvision-to-d2.py, writes Detectron2's names, and a flag that is also in
    files with Caffe2's."""
    source = build_model(config("BN")).backbone.bottom_up
    arrays = {k: v.numpy() for k, v in source.state_dict().items() if "num_batches" not in k}
    path = tmp_path / "R-50.pkl"
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=5))
    model, report = loaded(str(path), config("BCN"), tmp_path)
    assert not report.missing and not report.left_over
    state = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(state[name], torch.from_numpy(array)) for name, array in arrays.items())


# -------------------------------------------------------------------------------- whole detectors


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("project", ["mmdetection", "maskrcnn-benchmark"])
def test_detectors(project, masks, tmp_path):
    """Mask R-CNN, and Faster R-CNN, whose files have the same names."""
    first = project == "maskrcnn-benchmark"
    source = Detector(MASKRCNN_BENCHMARK if first else MMDETECTION, background_first=first)
    if not masks:
        source.sd = {k: v for k, v in source.sd.items() if ".mask" not in k}
    wrapped = {f"module.{k}": v for k, v in source.sd.items()}
    wrappers = {"model": wrapped, "iteration": 5} if first else {"state_dict": source.sd}
    if not first:
        wrappers["meta"] = {"config": "conv_cfg = dict(type='ConvWS')"}
    path = save(None, tmp_path / "detector.pth", **wrappers)
    model, report = loaded(path, config(extra=["MODEL.MASK_ON", masks]), tmp_path)
    assert report.layout == project and report.formula == "gn"
    assert not report.missing and not report.left_over
    model, source.sd = in_double(model, source.sd)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    heads = model.roi_heads
    with torch.no_grad():
        assert_same(list(model.backbone.bottom_up(x).values()), source.backbone(x), 1e-5)
        pyramid = list(model.backbone(x).values())[:4]
        assert_same(pyramid, source.fpn(source.backbone(x)), 1e-5)
        logits, deltas = model.proposal_generator.rpn_head(pyramid[:1])
        assert_same([logits[0], deltas[0]], source.rpn(pyramid[0]), 1e-5)
        pooled = torch.randn(5, 32, 7, 7, dtype=torch.float64)
        ours = heads.box_predictor(heads.box_head(pooled))
        assert_same(ours, source.box(pooled), 1e-5)
        if not masks:
            return
        pooled = torch.randn(5, 32, 14, 14, dtype=torch.float64)
        assert_same([heads.mask_head.layers(pooled)], [source.mask(pooled)], 1e-5)


def test_mmdetection_without_weight_standardization(tmp_path):
    """Its files say so; the names are the same."""
    source = Detector(MMDETECTION)
    meta = {"config": "norm_cfg = dict(type='GN', num_groups=32)"}
    path = save(None, tmp_path / "gn.pth", state_dict=source.sd, meta=meta)
    model = build_model(config())
    _, report = convert_state_dict(read_checkpoint(path), model)
    assert report.formula is None
    _, report = convert_state_dict(read_checkpoint(path), model, formula="gn")
    assert report.formula == "gn"


def test_into_a_model_without_weight_standardization(tmp_path):
    random = Random()
    make_resnet50(random, gn_entries)
    path = save(random.sd, tmp_path / "gn_ws.pth")
    model, report = loaded(path, config("GN"), tmp_path)
    model, sd = in_double(model, random.sd)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = list(model.backbone.bottom_up(x).values())
        assert_same(ours, resnet50(x, sd, gn_ws_filters, group_norm), 1e-4)


def test_own_checkpoints_stay_as_they_are(tmp_path):
    trained = build_model(config("BCN+WS"))
    path = save(trained.state_dict(), tmp_path / "own.pth", model=trained.state_dict())
    state, report = convert_state_dict(read_checkpoint(path), build_model(config("BCN+WS")))
    assert not report.missing and not report.left_over
    for name, value in state.items():
        assert torch.equal(value, trained.state_dict()[name]), name
    with pytest.raises(ConversionError, match=r"\+WS"):
        convert_state_dict(read_checkpoint(path), build_model(config("BCN")))


# ---------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("formula, reference", [("gn", gn_ws_filters), ("bcn", bcn_ws_filters)])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(8, 3, 7, 7), (8, 64, 1, 1), (8, 1, 3, 3), (4, 512, 3, 3)])
def test_rescaled_filters(shape, scale, formula, reference):
    weight = torch.randn(shape, dtype=torch.float64) * scale + scale
    expected = reference(weight)
    torch.testing.assert_close(source_filters(weight, formula), expected)
    rescaled = rescaled_weight(weight.float(), formula)
    ours = wsbcn_d2.standardize_weight(rescaled).double()
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-4


def test_constant_and_single_weight_filters():
    weight = torch.randn(3, 4, 3, 3)
    weight[1] = 0.5
    rescaled = rescaled_weight(weight, "gn")
    assert torch.isfinite(rescaled).all()
    assert (wsbcn_d2.standardize_weight(rescaled)[1] == 0).all()
    single = rescaled_weight(torch.randn(3, 1, 1, 1), "bcn")
    assert torch.isfinite(single).all() and (single == 0).all()


# ------------------------------------------------------------------------------- files of strangers


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_no_code_of_a_file_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"conv1.weight": Malicious()}}
    if name.endswith("pkl"):
        Path(name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(name)
    assert not Path("executed").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(str(tmp_path / "nothing.pth"))
    empty = tmp_path / "empty.pth"
    empty.touch()
    with pytest.raises(CheckpointError, match="0 bytes"):
        read_checkpoint(str(empty))
    torch.save({"epoch": 3}, empty)
    with pytest.raises(CheckpointError, match="no weights"):
        read_checkpoint(str(empty))
    torch.save({"conv1.weight": torch.tensor([1.0, float("nan")])}, empty)
    with pytest.raises(CheckpointError, match="conv1.weight"):
        read_checkpoint(str(empty))
    torch.save({"something": torch.ones(2)}, empty)
    with pytest.raises(ConversionError, match="something"):
        convert_state_dict(read_checkpoint(str(empty)), nn.Identity())


@pytest.fixture
def server(tmp_path):
    """The address of a folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_address_of_a_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    weight = np.arange(6.0, dtype=np.float32)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"stem.weight": weight}}))
    checkpoint = read_checkpoint(f"{server}/model.pkl")
    np.testing.assert_array_equal(checkpoint.tensors["stem.weight"], weight)
    for address in (f"{server}/nothing.pkl", "detectron3://model.pkl"):
        with pytest.raises(CheckpointError, match=f"{address}: "):
            read_checkpoint(address)


def run(*args):
    command = [sys.executable, str(ROOT / "tools/convert_weights.py"), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_tool(tmp_path):
    random = Random()
    make_resnet50(random, gn_entries)
    path = save(random.sd, tmp_path / "gn_ws.pth.tar")
    output = tmp_path / "converted.pth"
    arguments = ["--input", path, "--config-file", MASK_RCNN, "--output", output]
    dry = run(*arguments, "--dry-run", *SMALL)
    assert dry.returncode == 0 and not output.exists(), dry.stderr
    assert "layer1.0.conv1.weight -> backbone.bottom_up.res2.0.conv1.weight" in dry.stdout
    done = run(*arguments, *SMALL)
    assert done.returncode == 0 and sorted(os.listdir(tmp_path)) == [output.name, "gn_ws.pth.tar"]
    model = torch.load(output, weights_only=True)["model"]
    assert "backbone.bottom_up.stem.conv1.ws_eps" in model

    output.unlink()
    del random.sd["layer3.1.conv2.weight"]
    save(random.sd, path)
    failed = run(*arguments, *SMALL)
    assert failed.returncode == 1 and not output.exists()
    assert "backbone.bottom_up.res4.1.conv2.weight" in failed.stdout
    random.sd["layer3.1.conv2.weight"] = torch.ones(2, 2)
    save(random.sd, path)
    failed = run(*arguments, *SMALL)
    assert failed.returncode == 2 and "layer3.1.conv2.weight (2, 2)" in failed.stderr
