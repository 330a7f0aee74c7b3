"""A config that is not what weights were trained with: refused, with keys with which it works."""

import pickle
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2_models import randomize_norms
from sources import BLOCKS, Random, bcn_entries, gn_entries, make_resnet50
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import wsbcn_d2
from wsbcn_d2.engine import load_config
from wsbcn_d2.weights import ConversionError, convert_state_dict, read_checkpoint
from wsbcn_d2.weights.training import FAIR_GN, TORCHVISION, differences, trained_with

CONFIGS = Path(__file__).parents[2] / "configs"
BCN_WS = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_bcn_ws_1x_1img.yaml"
GN_WS = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_ws_1x_1img.yaml"
STOCK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
SMALL_HEADS = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_HEADS.NUM_CLASSES", 3),
]
SMALL = [
    *(*SMALL_HEADS, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 32),
]
README = [
    *("MODEL.RESNETS.NORM", "BCN+WS", "MODEL.FPN.NORM", "BCN+WS"),
    *("MODEL.ROI_BOX_HEAD.NORM", "BCN+WS", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_MASK_HEAD.NORM", "BCN+WS"),
]


def stock(config=STOCK, extra=()):
    """A config of Detectron2's model zoo, as users of the README change it."""
    cfg = model_zoo.get_config(config)
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.merge_from_list([*SMALL, *extra])
    return cfg


def from_zoo(config, file, tmp_path):
    """A model of Detectron2's model zoo, and its file, under the name that it has there."""
    model = randomize_norms(build_model(stock(config))).eval()
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path = tmp_path / file
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(content))
    return model, read_checkpoint(str(path))


def keys_in(message):
    """The keys that an error tells to add, as a shell would pass them on."""
    assert "\n" not in message
    return shlex.split(
        re.search(r"With these keys the config fits: (.*?)(?:\. [A-Z-]|$)", message)[1]
    )


def converted(checkpoint, cfg, **options):
    """The model of a config with converted weights."""
    model = build_model(cfg).eval()
    state, report = convert_state_dict(checkpoint, model, **options)
    assert not report.missing and not report.left_over, report
    model.load_state_dict(state, strict=False)
    return model, report


def pixels(model):
    """The input of a model for a fixed image."""
    random = torch.Generator().manual_seed(1)
    rgb = torch.randint(0, 255, (3, 64, 64), generator=random).float()
    return model.preprocess_image([{"image": rgb if model.input_format == "RGB" else rgb.flip(0)}])


@torch.no_grad()
def outputs(model):
    """Of all parts of a Mask R-CNN, for a fixed image and fixed boxes."""
    maps = list(model.backbone(pixels(model).tensor).values())
    heads, boxes = model.roi_heads, [Boxes(torch.tensor([[8.0, 8.0, 48.0, 40.0], [0, 0, 32, 64]]))]
    rpn = [x for level in model.proposal_generator.rpn_head(maps) for x in level]
    box = heads.box_predictor(heads.box_head(heads.box_pooler(maps[:4], boxes)))
    return [*maps, *rpn, *box, heads.mask_head.layers(heads.mask_pooler(maps[:4], boxes))]


def assert_same_outputs(ours, theirs):
    for a, b in zip(outputs(ours), outputs(theirs)):
        assert b.abs().max() > 0 and (a - b).norm() < 1e-3 * b.norm()


# ---------------------------------------------------------------------------- ImageNet models


def test_torchvisions_weights_in_a_stock_config():
    """From pixels to features, torchvision's model is the judge."""
    torch.manual_seed(0)
    theirs = randomize_norms(torchvision.models.resnet50()).eval()
    extra = ["MODEL.RESNETS.NORM", "FrozenBN+WS"]
    cfg = model_zoo.get_config(STOCK)
    cfg.merge_from_list([*SMALL_HEADS, *extra])
    with pytest.raises(ConversionError) as error:
        convert_state_dict(theirs.state_dict(), build_model(cfg))
    message = str(error.value)
    for part in ("INPUT.FORMAT is 'BGR', not 'RGB'", "STD is [1.0, 1.0, 1.0], not [58.395"):
        assert part in message
    assert "STRIDE_IN_1X1 is True, not False" in message and "--trust-config" in message
    cfg.merge_from_list(keys_in(message))
    model, report = converted(theirs.state_dict(), cfg)
    assert "assumed: as ImageNet models with torchvision's names" in str(report)

    nodes = {f"layer{i}": f"res{i + 1}" for i in range(1, 5)}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.randint(0, 255, (3, 64, 64)).float()
    with torch.no_grad():
        x = (image / 255 - mean[:, None, None]) / std[:, None, None]
        expected = create_feature_extractor(theirs, nodes)(x[None])
        given = image if cfg.INPUT.FORMAT == "RGB" else image.flip(0)  # as Detectron2 reads it
        ours = model.backbone.bottom_up(model.preprocess_image([{"image": given}]).tensor)
        for stage, value in expected.items():
            error = (ours[stage] - value).norm() / value.norm()
            assert error < 1e-4, (stage, error)


def test_trusted_config():
    """Weights of somebody who has trained with other inputs than the authors."""
    random = Random()
    make_resnet50(random, bcn_entries)
    cfg = load_config(str(BCN_WS), [*SMALL, "INPUT.FORMAT", "BGR"], needs=())
    model = build_model(cfg)
    with pytest.raises(ConversionError, match=r"ImageNet models\): INPUT.FORMAT is 'BGR', not"):
        convert_state_dict(random.sd, model)
    _, report = convert_state_dict(random.sd, model, trust_model=True)
    assert not report.missing and "with the inputs and the stride of the model" in str(report)


def test_every_config_has_the_inputs_of_its_weights():
    seen = 0
    for path in CONFIGS.glob("*/*_*img.yaml"):
        if path.parent.name == "Cityscapes" and "deeplab" in path.name or "pointrend" in path.name:
            continue  # with keys of other projects; their base files are those of the rest
        cfg = load_config(str(path), ["MODEL.WEIGHTS", ""], needs=())
        expected = FAIR_GN if cfg.MODEL.RESNETS.NORM == "GN" else TORCHVISION
        values = {key: value(cfg, key) for key in expected}
        assert differences(expected, values) == {}, path
        seen += 1
    assert seen > 50


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def caffe2_blobs(norm, groups=1):
    random = Random()
    make_resnet50(random, gn_entries, groups=groups)
    blobs = {"conv1_w": random.sd["conv1.weight"], f"res_conv1_{norm}_s": random.sd["bn1.weight"]}
    for stage, blocks in enumerate(BLOCKS):
        for block in range(blocks):
            for i, branch in enumerate("abc"):
                name = f"res{stage + 2}_{block}_branch2{branch}"
                blobs[f"{name}_w"] = random.sd[f"layer{stage + 1}.{block}.conv{i + 1}.weight"]
                blobs[f"{name}_{norm}_s"] = random.sd[f"layer{stage + 1}.{block}.bn{i + 1}.weight"]
    return {name: value.numpy() for name, value in blobs.items()}


@pytest.mark.parametrize(
    "blobs, config",
    [
        (("bn",), STOCK),
        (("gn",), "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml"),
        (("bn", 32), "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"),
    ],
)
def test_caffe2s_models(blobs, config, tmp_path):
    """Detectron2's own configs for these files are the judge."""
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"blobs": caffe2_blobs(*blobs)}))
    keys, _ = trained_with(read_checkpoint(str(path)), "detectron2")
    cfg = model_zoo.get_config(config)
    assert keys == {key: value(cfg, key) for key in keys} and len(keys) == 4


MM = "model = dict(backbone=dict(style={!r}, norm_cfg=1))\nnorm = dict(mean={}, std={}, {}={})"


@pytest.mark.parametrize(
    "config, expected",
    [
        (MM.format("caffe", [1.5, 2, 3], [1.0, 1, 1], "to_rgb", False), ("BGR", [1.5, 2, 3], True)),
        (MM.format("pytorch", [4, 5, 6], [1, 1, 1], "bgr_to_rgb", True), ("RGB", [4, 5, 6], False)),
        ("no inputs", ("RGB", [123.675, 116.28, 103.53], False)),
        (
            "a = dict(style={[]: 1})\nb = dict(mean=5.0, std=1.0, to_rgb=False)",
            ("RGB", [123.675, 116.28, 103.53], False),
        ),
    ],
)
def test_configs_of_mmdetection(config, expected, tmp_path):
    content = {"state_dict": {"a": torch.ones(1)}, "meta": {"config": config, "epoch": 2}}
    torch.save(content, tmp_path / "a.pth")
    keys, _ = trained_with(read_checkpoint(str(tmp_path / "a.pth")), "mmdetection")
    names = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.RESNETS.STRIDE_IN_1X1")
    assert tuple(keys[name] for name in names) == expected


def test_detectron2s_checkpoints_tell_what_they_have():
    model = build_model(stock())
    state = {**model.state_dict(), "pixel_mean": torch.tensor([1.0, 2, 3]).view(3, 1, 1)}
    with pytest.raises(ConversionError, match=r"PIXEL_MEAN is \[103.*, not \[1.0, 2.0, 3.0\]"):
        convert_state_dict(state, model)
    _, report = convert_state_dict(model.state_dict(), model)
    assert "(the file does not say; assumed: INPUT.FORMAT and" in str(report)


# -------------------------------------------------------------------------------- detectors


@pytest.mark.parametrize("target", ["README", "repository"])
def test_stock_mask_rcnn(target, tmp_path):
    """FrozenBN, FPN without norms and 2 fully connected layers: only the ResNet gets a norm."""
    theirs, checkpoint = from_zoo(STOCK, "model_final_f10217.pkl", tmp_path)
    assert not [n for n in checkpoint.tensors if n.startswith("backbone.fpn") and ".norm" in n]
    if target == "README":
        cfg = stock(extra=README)
    else:
        cfg = load_config(str(BCN_WS), SMALL, needs=())
    with pytest.raises(ConversionError, match="no place for 14 weights") as error:
        convert_state_dict(checkpoint, build_model(cfg))
    keys = keys_in(str(error.value))
    assert ("INPUT.FORMAT" in keys) == (target == "repository")
    if target == "README":  # which once led into a dead end
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        options = {"leave_out": ["*.bias", "*fc2*"]}
        _, report = convert_state_dict(checkpoint, build_model(cfg), **options)
        assert report.missing and report.fitting == dict(zip(keys[:-2:2], ["", "", 0, 2, ""]))
        assert keys[-2:] == ["MODEL.BACKBONE.FREEZE_AT", "0"]
    cfg.merge_from_list(keys)
    assert cfg.MODEL.RESNETS.NORM == "BCN+WS"
    converted(checkpoint, cfg)
    # The same with norms of the same function.
    cfg.MODEL.RESNETS.NORM = "FrozenBN+WS"
    model, report = converted(checkpoint, cfg)
    assert f"Detectron2's {STOCK}" in str(report)
    assert_same_outputs(model, theirs)


@pytest.mark.parametrize(
    "config, file, target, norm",
    [
        ("mask_rcnn_R_50_FPN_3x_gn", "model_final_dc5d9e.pkl", GN_WS, "GN+WS"),
        ("mask_rcnn_R_50_FPN_3x_syncbn", "model_final_3b3c51.pkl", BCN_WS, "BN+WS"),
    ],
)
def test_normed_mask_rcnn(config, file, target, norm, tmp_path):
    """With norms everywhere, so may be the model."""
    source = f"Misc/{config}.yaml"
    theirs, checkpoint = from_zoo(source, file, tmp_path)
    cfg = load_config(str(target), SMALL, needs=())
    with pytest.raises(ConversionError, match=f"were trained with .Detectron2's {source}") as error:
        convert_state_dict(checkpoint, build_model(cfg))
    cfg.merge_from_list(keys_in(str(error.value)))
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 == ("syncbn" in config)
    converted(checkpoint, cfg)
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[part].NORM = norm
    model, _ = converted(checkpoint, cfg)
    assert_same_outputs(model, theirs)


def test_batch_norm_into_group_norm():
    """Refused, with the nearest norm that has a place for BN."""
    random = Random()
    make_resnet50(random, lambda r, name, channels: r.statistics(name, channels))
    cfg = load_config(str(GN_WS), SMALL, needs=())
    with pytest.raises(ConversionError, match="no place for 106 weights") as error:
        convert_state_dict(random.sd, build_model(cfg))
    assert keys_in(str(error.value)) == ["MODEL.RESNETS.NORM", "BCN+WS"]
    options = re.findall(r"--leave-out '(\S+)'", str(error.value))
    convert_state_dict(random.sd, build_model(cfg), leave_out=options)
    cfg.merge_from_list(keys_in(str(error.value)))
    converted(random.sd, cfg)


def test_other_classes():
    source = build_model(stock(extra=["MODEL.ROI_HEADS.NUM_CLASSES", 7]))
    with pytest.raises(ConversionError, match="of another model.*NUM_CLASSES 7"):
        convert_state_dict(source.state_dict(), build_model(stock()))


def test_what_is_no_checkpoint():
    model = nn.Conv2d(3, 4, 1)
    for wrong in (model, [1], "model.pth"):
        with pytest.raises(TypeError, match=f"a state dict; got a {type(wrong).__name__}"):
            convert_state_dict(wrong, model)
