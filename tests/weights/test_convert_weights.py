"""Converted weights in a Detectron2 model compute what they did at their source."""

import functools
import os
import pickle
import runpy
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import Conv2d
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
from wsbcn_d2.engine import AtomicCheckpointer, ConfigError
from wsbcn_d2.engine.checkpoint import CompleteCheckpointer
from wsbcn_d2.export import fold
from wsbcn_d2.export.stock import save_for_detectron2
from wsbcn_d2.layers import WeightStandardized, WSConvTranspose2d
from wsbcn_d2.weights import CheckpointError, ConversionError, convert_state_dict, read_checkpoint
from wsbcn_d2.weights.formulas import rescaled_weight, source_filters
from wsbcn_d2.weights.training import MASKRCNN_BENCHMARK as BENCHMARK_KEYS
from wsbcn_d2.weights.training import MSRA

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
MASK_RCNN = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_ws_2x_1img.yaml"
MODELS = {
    "FPN": MASK_RCNN,
    "C4": CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_ws_1x_1img.yaml",
    "DC5": CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_gn_ws_1x_1img.yaml",
}
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 32),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
]
RESNEXT = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 1]
HEADS_WITH_GN = ["MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NORM", "GN"]
BATCH_NORMS = {"running_mean", "running_var"}


def config(norm=None, extra=(), kind="FPN"):
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.merge_from_file(str(MODELS[kind]))
    norms = [] if norm is None else ["MODEL.RESNETS.NORM", norm]
    cfg.merge_from_list([*SMALL, *norms, *extra])
    return cfg


def save(sd, path, **wrappers):
    torch.save({"state_dict": sd, "epoch": 3} if not wrappers else wrappers, path)
    return str(path)


def loaded(path, cfg, tmp_path, formula="auto"):
    """The model of a config with converted weights, through Detectron2's own loader."""
    model = build_model(cfg).eval()
    state, report = convert_state_dict(read_checkpoint(path), model, formula=formula)
    converted = str(tmp_path / "converted.pth")
    torch.save({"model": state, "__author__": "test"}, converted)
    DetectionCheckpointer(model).load(converted)
    return model, report


def assert_same(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and b.abs().max() > 0.05
        assert (a - b).abs().max() / b.abs().max() < tolerance


def last_stages(model, x):
    """What the ResNet of a model returns: all stages with an FPN, else the last ones."""
    stages = list(getattr(model.backbone, "bottom_up", model.backbone)(x).values())
    if hasattr(model.roi_heads, "res5"):
        stages.append(model.roi_heads.res5(stages[-1]))
    return stages


def in_double(model, sd):
    """The comparison is of formulas; rounding of a deep network in float32 would hide errors."""
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in sd.items()}


# -------------------------------------------------------------------------------- ImageNet models

SOURCES = {
    "gn_ws": ("GN+WS", gn_entries, gn_ws_filters, group_norm),
    "bcn_ws": ("BCN+WS", bcn_entries, bcn_ws_filters, authors_bcn),
    "bn": ("BN", lambda r, name, c: r.statistics(name, c), lambda w: w, batch_norm),
}


@pytest.mark.parametrize("kind, groups", [("FPN", 1), ("FPN", 32), ("C4", 1), ("DC5", 1)])
@pytest.mark.parametrize("source", SOURCES)
def test_backbones(source, kind, groups, tmp_path):
    norm, entries, filters, normalize = SOURCES[source]
    random = Random()
    make_resnet50(random, entries, groups=groups)
    random.linear("fc", 10, 512)
    path = save({f"module.{k}": v for k, v in random.sd.items()}, tmp_path / "source.pth.tar")
    cfg = config(norm, RESNEXT if groups == 32 else [], kind)
    formula = "gn" if source == "gn_ws" else "auto"
    model, report = loaded(path, cfg, tmp_path, formula)
    assert not report.missing and not report.left_over and not report.other_norms
    model, sd = in_double(model, random.sd)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = last_stages(model, x)
        theirs = resnet50(x, sd, filters, normalize, groups=groups, dilated=kind == "DC5")
    assert len(ours) == {"FPN": 4, "C4": 2, "DC5": 1}[kind]
    assert_same(ours, theirs[-len(ours) :], 1e-5)
    convolutions = [value for value in sd.values() if value.dim() == 4]
    assert report.filters.total() == (0 if source == "bn" else len(convolutions))


# Where the stem and the last stage are.
PLACES = {
    "FPN": ("backbone.bottom_up.stem.", "backbone.bottom_up.res5."),
    "C4": ("backbone.stem.", "roi_heads.res5."),
    "DC5": ("backbone.stem.", "backbone.res5."),
}


@pytest.mark.parametrize("kind", PLACES)
def test_names_of_the_model(kind, tmp_path):
    random = Random()
    make_resnet50(random, SOURCES["bn"][1])
    path = save(random.sd, tmp_path / "bn.pth")
    model = build_model(config("BN", kind=kind))
    state, report = convert_state_dict(read_checkpoint(path), model)
    stem, res5 = PLACES[kind]
    assert torch.equal(state[f"{stem}conv1.weight"], random.sd["conv1.weight"])
    assert torch.equal(state[f"{stem}conv1.norm.running_var"], random.sd["bn1.running_var"])
    for ours, theirs in (("conv3", "conv3"), ("conv3.norm", "bn3")):
        assert torch.equal(state[f"{res5}2.{ours}.weight"], random.sd[f"layer4.2.{theirs}.weight"])
    shortcut = random.sd["layer4.0.downsample.1.running_mean"]
    assert torch.equal(state[f"{res5}0.shortcut.norm.running_mean"], shortcut)
    trained = [name for name in random.sd if "num_batches" not in name]
    assert len(state) == len(trained) and list(report.taken) == trained
    new = {"proposal_generator.rpn_head.conv.weight", "roi_heads.mask_head.predictor.bias"}
    assert new < set(report.initialized) and not report.missing


def test_deeplab_stem_and_decoder(tmp_path):
    """Names as in Detectron2's DeepLab models; the decoder has parts that are called as stages."""
    deeplab = pytest.importorskip("detectron2.projects.deeplab")

    def build(norm):
        cfg = get_cfg()
        deeplab.add_deeplab_config(cfg)
        cfg.merge_from_file(str(CONFIGS / "Cityscapes/deeplab_v3_plus_R_103_gn_ws_484e_1img.yaml"))
        size = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
        cfg.merge_from_list([*SMALL, *size, "MODEL.RESNETS.NORM", norm])
        return build_model(cfg)

    trained = build("BN").backbone.state_dict()
    arrays = {name: value.numpy() for name, value in trained.items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "detectron2"}))
    state, report = convert_state_dict(read_checkpoint(str(path)), build("BCN"))
    assert not report.missing and not report.left_over
    for name in ("stem.conv3.weight", "res2.0.conv1.weight", "res5.2.conv3.norm.running_var"):
        assert torch.equal(state[f"backbone.{name}"], trained[name])
    assert "sem_seg_head.decoder.res2.project_conv.weight" in report.initialized


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
    assert not report.missing and not report.other_norms
    # The channel normalization is new to the frozen layers, too, which would never learn it.
    frozen = build_model(config("BCN", ["MODEL.BACKBONE.FREEZE_AT", 2]))
    with pytest.raises(ConversionError, match="22 parameters .* frozen .*FREEZE_AT 0$"):
        convert_state_dict(read_checkpoint(path), frozen)
    with pytest.raises(ConfigError, match="lacks 22 frozen .* set MODEL.BACKBONE.FREEZE_AT 0$"):
        AtomicCheckpointer(frozen).load(str(tmp_path / "converted.pth"))


@pytest.mark.parametrize("source, target", [("bn", "GN"), ("bn", "GN+WS"), ("bcn_ws", "BN")])
def test_norms_of_another_kind(source, target, tmp_path):
    """The result is another function: an error, unless it is allowed."""
    random = Random()
    make_resnet50(random, SOURCES[source][1])
    checkpoint = read_checkpoint(save(random.sd, tmp_path / "source.pth"))
    model = build_model(config(target))
    lost, pattern = ("bn1.running_mean, bn1.r", "*.running_*")
    if source == "bcn_ws":
        lost, pattern = ("bn1.weight, bn1.b", "*bn?.[wb]*")
    with pytest.raises(ConversionError, match=f"no place for 106 weights of .* does: {lost}"):
        convert_state_dict(checkpoint, model)
    patterns = [pattern.removeprefix("*"), pattern, "*downsample.1.[wb]*"]
    state, report = convert_state_dict(checkpoint, model, leave_out=patterns)
    assert not report.missing and report.left_over
    assert len(report.other_norms) == 53
    assert report.other_norms[0] == "backbone.bottom_up.stem.conv1.norm"
    assert "warning: 53 norms of the file are of another kind" in str(report)
    norm = "bn1.pbn" if source == "bcn_ws" else "bn1"
    stem = state["backbone.bottom_up.stem.conv1.norm.weight"]
    assert torch.equal(stem, random.sd[f"{norm}.weight"])


def test_norms_that_the_model_does_not_have(tmp_path):
    random = Random()
    make_resnet50(random, gn_entries)
    path = save(random.sd, tmp_path / "gn_ws.pth")
    convert_gn = functools.partial(convert_state_dict, read_checkpoint(path), formula="gn")
    with pytest.raises(ConversionError, match="no place for 104 weights"):
        convert_gn(build_model(config("")))
    _, report = convert_gn(build_model(config("")), leave_out=["*bn*", "*downsample.1*"])
    assert not report.missing and len(report.other_norms) == 53
    _, report = convert_gn(build_model(config("GN")))
    assert not report.other_norms and "warning" not in str(report)


CAFFE2 = {"weight": "bn_s", "bias": "bn_b", "running_mean": "bn_rm", "running_var": "bn_riv"}


@pytest.mark.parametrize("kind", MODELS)
def test_caffe2_names(kind, tmp_path):
    """MSRA's R-50 as Detectron2 hosts it, a pickled dictionary of arrays: in a stock model, which
    Detectron2 loads it into by itself, it computes the same."""
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
    path.write_bytes(pickle.dumps({"blobs": blobs}))
    blobs["conv1_b"] = np.ones(32, np.float32)  # which Detectron2 leaves out, too
    path.write_bytes(pickle.dumps({"blobs": blobs}))
    msra = [x for pair in MSRA.items() for x in pair]
    model, report = loaded(str(path), config("FrozenBN", msra, kind), tmp_path)
    assert not report.missing and not report.left_over
    cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/mask_rcnn_R_50_{kind}_1x.yaml")
    cfg.merge_from_list(SMALL)
    stock = build_model(cfg).eval()
    DetectionCheckpointer(stock).load(str(path))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = last_stages(model, x)
        assert_same(ours, last_stages(stock, x), 1e-6)
        options = {"dilated": kind == "DC5", "stride_in_1x1": True}
        theirs = resnet50(x, random.sd, lambda w: w, batch_norm, **options)
        assert_same(ours, theirs[-len(ours) :], 1e-3)


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
    keys = [x for pair in BENCHMARK_KEYS.items() for x in pair] if first else []
    cfg = config(extra=["MODEL.MASK_ON", masks, *keys])
    model, report = loaded(path, cfg, tmp_path, "gn" if first else "auto")
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


GN, WS = "norm_cfg=dict(type='GN', num_groups=32)", "conv_cfg=dict(type='ConvWS')"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"model = dict(backbone=dict({GN}, {WS}), neck=dict({GN}, {WS}))", "gn"),
        (f"model = dict(backbone=dict({GN}, {WS}), neck=dict({GN}))", "backbone and not .* neck"),
        (f"m = dict(backbone=dict({GN}, {WS}), neck=dict({GN}, conv_cfg=None))", "not .* neck"),
        (f"m = dict(backbone=dict({GN}), head=[dict({GN}, {WS}), dict(a=1)])", "of head and not"),
        (f"m = {{'backbone': dict({GN}, {WS}), 'neck': {{'norm_cfg': 1}}}}", "not those of neck"),
        (f"m = dict(backbone=dict({GN}, {WS}), neck=dict(a=1), head=dict(norm_cfg=None))", "gn"),
        (f"conv_cfg = {WS[9:]}; m = dict(neck=dict({GN}, conv_cfg=conv_cfg))", "gn"),
        (f"no Python: {WS}", "gn"),
        (f"model = dict(backbone=dict({GN}))", None),
    ],
)
def test_mmdetection_with_parts_that_are_not_standardized(tmp_path, text, expected):
    source = Detector(MMDETECTION)
    meta = {"config": f"seed = None\n{text}", "epoch": 12}
    checkpoint = read_checkpoint(save(None, tmp_path / "a.pth", state_dict=source.sd, meta=meta))
    model = build_model(config())
    if expected in ("gn", None):
        assert convert_state_dict(checkpoint, model)[1].formula == expected
    else:
        with pytest.raises(ConversionError, match=expected):
            convert_state_dict(checkpoint, model)


@pytest.mark.parametrize("norm, count", [("GN+WS", 0), ("GN(groups=8)+WS", 53), ("LN+WS", 53)])
def test_group_norms_into_other_norms_are_reported(norm, count, tmp_path):
    """Names and shapes are the same."""
    random = Random()
    make_resnet50(random, gn_entries)
    _, report = loaded(save(random.sd, tmp_path / "a.pth"), config(norm), tmp_path, "gn")
    assert len(report.other_norms) == count and ("warning" in str(report)) == bool(count)


def test_copies_of_openmmlab_call_the_norms_gn(tmp_path):
    random = Random()
    make_resnet50(random, gn_entries, norm="gn")
    path = save(random.sd, tmp_path / "resnet50_gn_ws.pth")
    model, _ = loaded(path, config("GN+WS"), tmp_path, "gn")
    model, sd = in_double(model, random.sd)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = list(model.backbone.bottom_up(x).values())
        assert_same(ours, resnet50(x, sd, gn_ws_filters, group_norm, norm="gn"), 1e-4)


def test_into_a_model_without_weight_standardization(tmp_path):
    random = Random()
    make_resnet50(random, gn_entries)
    path = save(random.sd, tmp_path / "gn_ws.pth")
    model, report = loaded(path, config("GN"), tmp_path, "gn")
    model, sd = in_double(model, random.sd)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = list(model.backbone.bottom_up(x).values())
        assert_same(ours, resnet50(x, sd, gn_ws_filters, group_norm), 1e-4)


# Files whose names are those of standardized models, from models that are not.
PLAIN = {
    "torchvision's names with GN": ("authors-gn-ws", gn_entries, None),
    "mmdetection with BN": ("mmdetection", SOURCES["bn"][1], MMDETECTION),
    "maskrcnn-benchmark with BN": ("maskrcnn-benchmark", SOURCES["bn"][1], MASKRCNN_BENCHMARK),
    "mmdetection with GN": ("mmdetection", gn_entries, MMDETECTION),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_names_do_not_tell_whether_filters_are_standardized(kind, tmp_path):
    layout, entries, names = PLAIN[kind]
    random = Random()
    resnet = dict(names["resnet"]) if names else {}
    if entries is not gn_entries and "norm" in resnet:
        resnet["norm"] = "bn"
    make_resnet50(random, entries, **resnet)
    first = layout == "maskrcnn-benchmark"
    sd = {**Detector(names, background_first=first).sd, **random.sd} if names else random.sd
    sd = {k: v for k, v in sd.items() if entries is gn_entries or ".gn" not in k}
    checkpoint = read_checkpoint(save(sd, tmp_path / "source.pth"))
    norm = "GN" if entries is gn_entries else "BN"
    model = build_model(config(norm, ["MODEL.FPN.NORM", "GN", *HEADS_WITH_GN]))
    with pytest.raises(ConversionError, match=f"as in {layout}.*do not tell.*formula: none; gn,"):
        convert_state_dict(checkpoint, model)
    model.backbone.bottom_up.double()
    state, report = convert_state_dict(checkpoint, model, formula="none", trust_model=True)
    assert report.layout == layout and not report.filters
    stages = {k: v for k, v in state.items() if k.startswith("backbone.bottom_up")}
    model.load_state_dict(stages, strict=False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    sd = {k: v.double() for k, v in random.sd.items()}
    normalize = group_norm if entries is gn_entries else batch_norm
    with torch.no_grad():
        ours = list(model.backbone.bottom_up.eval()(x).values())
        assert_same(ours, resnet50(x, sd, lambda w: w, normalize, **resnet), 1e-5)


def test_models_that_this_package_has_converted(tmp_path):
    """Their files say it, whatever the other names are."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(32, c))
    wsbcn_d2.convert(theirs, "GN+WS", keep_function=True)
    path = save(theirs.state_dict(), tmp_path / "converted.pth", model=theirs.state_dict())
    extra = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
    model, report = loaded(path, config("GN+WS", extra), tmp_path)
    assert not report.left_over and report.filters == {"taken as they are": 20}
    x = torch.randn(1, 3, 64, 64)
    stages = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(theirs, name).register_forward_hook(lambda m, i, out: stages.append(out))
    with torch.no_grad():
        theirs.eval()(x)
        assert_same(list(model.backbone.bottom_up(x).values()), stages, 1e-4)
    with pytest.raises(ConversionError, match="trained with weight standardization"):
        convert_state_dict(read_checkpoint(path), build_model(config("GN", extra)))


@pytest.mark.parametrize(
    "names, pattern",
    [
        (["layer2.0.se.fc1.weight", "layer4.2.se.fc2.bias"], "*.se.*"),
        (["layer1.0.conv1.bias"], "layer1.0.conv1.bias"),
        (["layer3.0.conv2.weight_gamma"], "*_gamma"),  # of mmcv's ConvAWS2d
    ],
)
def test_left_over_weights_of_what_is_converted(names, pattern, tmp_path):
    random = Random()
    make_resnet50(random, gn_entries)
    for name in names:
        random.sd[name] = random.randn(4)
    random.sd["head.weight"] = random.randn(4)  # a classifier is no part of a detector
    checkpoint = read_checkpoint(save(random.sd, tmp_path / "source.pth"))
    model = build_model(config("GN+WS"))
    with pytest.raises(ConversionError, match=f"for {len(names)} weights .*: {names[0]}.*--leave"):
        convert_state_dict(checkpoint, model, formula="gn")
    _, report = convert_state_dict(checkpoint, model, formula="gn", leave_out=[pattern])
    assert report.left_over == [*names, "head.weight"]


def test_parts_may_be_left_out(tmp_path):
    """Of a Mask R-CNN, a Faster R-CNN takes the rest."""
    source = Detector(MMDETECTION)
    checkpoint = read_checkpoint(save(source.sd, tmp_path / "detector.pth"))
    model = build_model(config(extra=["MODEL.MASK_ON", False]))
    _, report = convert_state_dict(checkpoint, model, formula="gn")
    assert not report.missing and all("mask_head" in name for name in report.left_over)


def test_own_checkpoints_stay_as_they_are(tmp_path):
    trained = build_model(config("BCN+WS"))
    path = save(trained.state_dict(), tmp_path / "own.pth", model=trained.state_dict())
    state, report = convert_state_dict(read_checkpoint(path), build_model(config("BCN+WS")))
    assert not report.missing and not report.left_over
    for name, value in state.items():
        assert torch.equal(value, trained.state_dict()[name]), name
    with pytest.raises(ConversionError, match=r"\+WS"):
        convert_state_dict(read_checkpoint(path), build_model(config("BCN")))


def test_nothing_that_the_model_has_a_place_for(tmp_path):
    backbone = build_model(config("BN")).backbone
    sd = {f"backbone.{k}": v for k, v in backbone.state_dict().items() if k.startswith("bottom_up")}
    path = save(sd, tmp_path / "fpn.pth")
    message = "no place for any of the 265 weights.*backbone.bottom_up.stem.conv1.weight"
    with pytest.raises(ConversionError, match=message):
        convert_state_dict(read_checkpoint(path), build_model(config("BN", kind="C4")))


@pytest.mark.parametrize("norm", ["BCN", "CN", "GN+WS"])
def test_folded_checkpoints(norm, tmp_path):
    """What is refused in loading is refused here; without layers of this package nothing is."""
    cfg = config(norm)
    cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_BOX_HEAD.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = norm
    model = build_model(cfg)
    save_for_detectron2(fold(model), cfg, str(tmp_path))
    checkpoint = read_checkpoint(str(tmp_path / "model.pth"))
    with pytest.raises(ConversionError, match="come from a folded model.*use the checkpoint"):
        convert_state_dict(checkpoint, model)
    if norm == "GN+WS":
        stock = build_model(config("GN", ["MODEL.FPN.NORM", "GN", *HEADS_WITH_GN]))
        state, report = convert_state_dict(checkpoint, stock)
        assert not report.missing and not report.left_over
        assert all(torch.equal(value, checkpoint.tensors[name]) for name, value in state.items())


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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("layer1.", "layer1._checkpoint_wrapped_module."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('.bn1', '._fsdp_wrapped_module.bn1')}",
    ],
)
def test_names_within_wrappers(wrap, tmp_path):
    random = Random()
    make_resnet50(random, SOURCES["bn"][1])
    wrapped = {wrap(name): value for name, value in random.sd.items()}
    checkpoint = read_checkpoint(save(wrapped, tmp_path / "bn.pth"))
    assert list(checkpoint.tensors) == list(random.sd)


def test_checkpoint_of_a_compiled_model(tmp_path):
    def compiled(model):
        """What torch.compile(model).state_dict() is, whose import takes seconds."""
        return nn.ModuleDict({"_orig_mod": model}).state_dict()

    def build():
        return nn.Sequential(Conv2d(3, 32, 1, norm=wsbcn_d2.get_norm("BCN+WS", 32)))

    model, other = build(), build()
    torch.save({"model": compiled(model)}, tmp_path / "compiled.pth")
    CompleteCheckpointer(other).load(str(tmp_path / "compiled.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    folded = compiled(fold(model))
    for entry in folded._metadata.values():
        entry["wsbcn_d2_folded"] = True
    torch.save({"model": folded}, tmp_path / "folded.pth")
    with pytest.raises(ValueError, match="come from a folded model"):
        CompleteCheckpointer(other).load(str(tmp_path / "folded.pth"))
    with pytest.raises(ConversionError, match="come from a folded model"):
        convert_state_dict(read_checkpoint(str(tmp_path / "folded.pth")), model)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    random = Random()
    make_resnet50(random, SOURCES["bn"][1])
    path = tmp_path / "bn.safetensors"
    safetensors.save_file({f"_orig_mod.{k}": v for k, v in random.sd.items()}, path)
    tensors = read_checkpoint(str(path)).tensors
    assert tensors.keys() == random.sd.keys()
    assert all(torch.equal(tensors[k], v) for k, v in random.sd.items())
    model = nn.Linear(3, 2)
    safetensors.save_file(model.state_dict(), path)
    other = nn.Linear(3, 2)
    CompleteCheckpointer(other).load(str(path))
    assert torch.equal(model.weight, other.weight)
    path.write_bytes(b"no such file")
    with pytest.raises(CheckpointError, match="not a file of safetensors"):
        read_checkpoint(str(path))


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "bn.safetensors"
    path.write_bytes(b"12345678")
    for read in (read_checkpoint, CompleteCheckpointer(nn.Linear(2, 2)).load):
        with pytest.raises(ValueError, match="is needed: pip install safetensors") as error:
            read(str(path))
        assert "\n" not in str(error.value)


TOOL = ROOT / "tools/convert_weights.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool in this process: exit status, standard output, standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
        status = runpy.run_path(str(TOOL))["main"]()
        return (status, *capsys.readouterr())

    return run


def test_tool(run, tmp_path):
    random = Random()
    make_resnet50(random, gn_entries)
    path = save(random.sd, tmp_path / "gn_ws.pth.tar")
    output = tmp_path / "converted.pth"
    arguments = ["--input", path, "--config-file", MASK_RCNN, "--output", output]
    arguments += ["--formula", "gn"]
    status, out, err = run(*arguments, "--dry-run", *SMALL)
    assert status == 0 and not output.exists(), err
    assert "layer1.0.conv1.weight -> backbone.bottom_up.res2.0.conv1.weight" in out
    command = [sys.executable, TOOL, *arguments, *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.close()  # as "| head" does
    assert sorted(os.listdir(tmp_path)) == [output.name, "gn_ws.pth.tar"]
    model = torch.load(output, weights_only=True)["model"]
    assert "backbone.bottom_up.stem.conv1.ws_eps" in model
    AtomicCheckpointer(build_model(config())).load(str(output))
    other = [("INPUT.FORMAT", "BGR"), ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0])]
    other += [("MODEL.RESNETS.STRIDE_IN_1X1", True)]
    for key, value in other:
        was = r"\"\[58.395, .*\]\"" if "STD" in key else "(RGB|False)"
        with pytest.raises(
            ConfigError, match=f"was converted for another config, with {key} {was}:"
        ):
            AtomicCheckpointer(build_model(config(extra=[key, value]))).load(str(output))

    before = Path(path).read_bytes()
    status, _, err = run(*arguments[:-3], path, "--formula", "gn", *SMALL)
    assert status == 2 and "gn_ws.pth.tar' is the file to read; give another one to write" in err
    assert Path(path).read_bytes() == before

    output.unlink()
    del random.sd["layer3.1.conv2.weight"]
    save(random.sd, path)
    status, out, err = run(*arguments, *SMALL)
    assert status == 1 and not output.exists()
    assert "backbone.bottom_up.res4.1.conv2.weight" in out
    assert "2 weights are missing, as backbone.bottom_up.res4.1.conv2.weight. No conv" in err
    random.sd["layer3.1.conv2.weight"] = torch.ones(2, 2)
    save(random.sd, path)
    status, _, err = run(*arguments, *SMALL)
    assert status == 2 and "layer3.1.conv2.weight (2, 2)" in err


def test_tool_with_other_inputs(run, tmp_path):
    """The format of images is compared for models that do not keep it, too: semantic segmentors."""
    random = Random()
    make_resnet50(random, gn_entries)
    path, output = save(random.sd, tmp_path / "gn_ws.pth.tar"), tmp_path / "converted.pth"
    config_file = CONFIGS / "Cityscapes/semantic_R_50_FPN_gn_ws_699e_1img.yaml"
    arguments = ["--input", path, "--config-file", config_file, "--output", output]
    arguments += ["--formula", "gn"]
    keys = [*SMALL, "INPUT.FORMAT", "BGR"]
    status, _, err = run(*arguments, *keys)
    assert status == 2 and not output.exists() and err.count("\n") == 1
    assert "INPUT.FORMAT is 'BGR', not 'RGB'" in err
    assert run(*arguments, "--trust-config", *keys)[0] == 0 and output.exists()


@pytest.mark.parametrize("formula", ["none", "gn"])
def test_transposed_convolution(formula):
    """Its filters are the second dimension of its weight, within groups."""
    source = nn.ConvTranspose2d(8, 12, 2, 2, groups=2, bias=False).double()
    model = nn.Module()
    model.deconv = WSConvTranspose2d(8, 12, 2, 2, groups=2, bias=False).double()
    checkpoint = {"stem.conv1.weight": torch.zeros(1), "deconv.weight": source.weight.detach()}
    state, _ = convert_state_dict(checkpoint, model, "detectron2", formula, ["stem*"])
    model.load_state_dict(state)
    weight = source.weight.detach()
    filters = weight.unflatten(0, (2, 4)).transpose(1, 2).reshape(12, -1)
    if formula == "gn":
        mean, std = filters.mean(1, keepdim=True), filters.std(1, keepdim=True)
        filters = (filters - mean) / (std + 1e-5)
    expected = filters.view(2, 6, 4, 2, 2).transpose(1, 2).reshape(8, 6, 2, 2)
    torch.testing.assert_close(model.deconv.standardized_weight().detach(), expected)
