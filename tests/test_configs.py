"""Every config loads, says what its name says and builds; the small ones train a step."""
import itertools
import re
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import wsbcn_d2

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COCO, DIGITS = CONFIGS / "COCO-InstanceSegmentation", CONFIGS / "Digits-InstanceSegmentation"

# The word in a file's name -> norm option, type of layer, and whether the convs are standardized.
NORMS: Dict[str, Tuple[str, type, bool]] = {
    "gn": ("GN", nn.GroupNorm, False),
    "gn_ws": ("GN+WS", nn.GroupNorm, True),
    "bn": ("BN", nn.BatchNorm2d, False),
    "bn_ws": ("BN+WS", nn.BatchNorm2d, True),
    "syncbn": ("SyncBN", nn.SyncBatchNorm, False),
    "frozenbn": ("FrozenBN", FrozenBatchNorm2d, False),
    "bcn": ("BCN", wsbcn_d2.BatchChannelNorm, False),
    "bcn_ws": ("BCN+WS", wsbcn_d2.BatchChannelNorm, True),
    "batchbcn": ("BatchBCN", wsbcn_d2.BatchChannelNorm, False),
    "batchbcn_ws": ("BatchBCN+WS", wsbcn_d2.BatchChannelNorm, True),
    "cn": ("CN", wsbcn_d2.ChannelNorm, False),
    "cn_ws": ("CN+WS", wsbcn_d2.ChannelNorm, True),
}
NORM_TYPES = tuple({norm_type for _, norm_type, _ in NORMS.values()})

COCO_NAME = re.compile(r"mask_rcnn_R_50_FPN_(?P<norm>\w+)_(?P<schedule>1x|2x)_(?P<images>[12])img")
DIGITS_NAME = re.compile(r"mask_rcnn_R_18_FPN_(?P<norm>\w+)")

# The other configs are in test_model_zoo.py. Digits with other norms are overrides.
COCO_FILES = [path for path in sorted(COCO.glob("*.yaml")) if COCO_NAME.fullmatch(path.stem)]
DIGITS_FILES = [path for path in sorted(DIGITS.glob("*.yaml")) if DIGITS_NAME.fullmatch(path.stem)]
FILES = [*COCO_FILES, *DIGITS_FILES]

# Images seen at the decays and at the end, in units of 16 x 1000 (Detectron2's iterations).
SCHEDULES = {"1x": (60, 80, 90), "2x": (150, 170, 180)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are small: a second thread gains nothing and, on a busy machine, costs much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(path: Path) -> CfgNode:
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def build(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    return build_model(cfg)


def digits(norm: str) -> CfgNode:
    """The config of the digits with a norm, by its file or as an override of another one."""
    path = DIGITS / f"mask_rcnn_R_18_FPN_{norm}.yaml"
    if path.exists():
        return load(path)
    cfg = load(DIGITS / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[part].NORM = NORMS[norm][0]
    return cfg


def norm_of(path: Path) -> str:
    pattern = COCO_NAME if path.parent == COCO else DIGITS_NAME
    return pattern.fullmatch(path.stem)["norm"]


def ids(path: Path) -> str:
    return path.stem


def norm_layers(module: nn.Module) -> List[nn.Module]:
    return [m for m in module.modules() if isinstance(m, NORM_TYPES)]


def is_type(layer: nn.Module, norm_type: type) -> bool:
    """Whether the layer is of this type, and not one of ours derived from GroupNorm."""
    ours = (wsbcn_d2.BatchChannelNorm, wsbcn_d2.ChannelNorm)
    if norm_type is nn.GroupNorm and isinstance(layer, ours):
        return False
    return isinstance(layer, norm_type)


def check_layers(model: nn.Module, cfg: CfgNode, norm: str, n_backbone: int, n_frozen: int) -> None:
    """The norm and convolution layers of a Mask R-CNN whose number of layers is known by hand."""
    _, norm_type, standardized = NORMS[norm]
    new_norms = 0 if cfg.MODEL.FPN.NORM == "" else 16  # 4 lateral + 4 output, 4 box, 4 mask

    layers = norm_layers(model)
    assert len(layers) == n_backbone + new_norms
    if norm_type in (nn.BatchNorm2d, nn.SyncBatchNorm):
        # Freezing makes fixed ones of these.
        frozen = [m for m in layers if isinstance(m, FrozenBatchNorm2d)]
        assert len(frozen) == n_frozen
        layers = [m for m in layers if not isinstance(m, FrozenBatchNorm2d)]
    else:
        fixed = [
            m
            for m in layers
            if list(m.parameters()) and not any(p.requires_grad for p in m.parameters())
        ]
        assert len(fixed) == (0 if norm_type is FrozenBatchNorm2d else n_frozen)
    assert all(is_type(m, norm_type) for m in layers), {type(m) for m in layers}

    convs = {k: m for k, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    normed = {k for k, m in convs.items() if getattr(m, "norm", None) is not None}
    assert len(normed) == n_backbone + new_norms
    ws = {k for k, m in convs.items() if isinstance(m, wsbcn_d2.WSConv2d)}
    assert ws == (normed if standardized else set())

    # What predicts is never standardized, and is present under the names this test knows.
    predictors = {
        "proposal_generator.rpn_head.conv",
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_head.deconv",
        "roi_heads.mask_head.predictor",
    }
    modules = dict(model.named_modules())
    assert not any(isinstance(modules[k], wsbcn_d2.WSConv2d) for k in predictors)

    # 4conv1fc
    assert len([k for k in convs if k.startswith("roi_heads.box_head.")]) == 4
    box_head = modules["roi_heads.box_head"]
    assert sum(isinstance(m, nn.Linear) for m in box_head.modules()) == 1


def sample(
    height: int, width: int, num_classes: int, with_objects: bool = True
) -> Dict[str, object]:
    """One image of noise with rectangles of 24 to 40 pixels for objects."""
    corners = [[4, 6, 28, 40], [40, 20, 80, 60], [10, 50, 34, 90]] if with_objects else []
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(len(boxes)) % num_classes
    instances.gt_masks = BitMasks(masks)
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    return {"image": image, "height": height, "width": width, "instances": instances}


def test_every_combination_is_there():
    coco = {COCO_NAME.fullmatch(path.stem).groups() for path in COCO_FILES}
    coco_norms = ("gn", "gn_ws", "bn", "syncbn", "frozenbn", "bcn", "bcn_ws")
    assert coco == set(itertools.product(coco_norms, ("1x", "2x"), ("1", "2")))
    assert {norm_of(path) for path in DIGITS_FILES} == {"bn", "gn", "gn_ws", "bcn", "bcn_ws"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_norm_is_what_the_name_says(path: Path):
    cfg = load(path)
    norm = norm_of(path)
    string = NORMS[norm][0]
    heads = (cfg.MODEL.FPN.NORM, cfg.MODEL.ROI_BOX_HEAD.NORM, cfg.MODEL.ROI_MASK_HEAD.NORM)
    assert cfg.MODEL.RESNETS.NORM == string
    if norm == "frozenbn" and path.parent == COCO:
        assert heads == ("", "", "")
    else:
        assert heads == (string, string, string)
    ours = "WS" in string or "CN" in string
    backbone = "build_wsbcn_resnet_fpn_backbone" if ours else "build_resnet_fpn_backbone"
    assert cfg.MODEL.BACKBONE.NAME == backbone
    assert cfg.MODEL.MASK_ON
    # The tools choose the device; a config that names one would not run elsewhere.
    assert cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_input_format_fits_the_weights(path: Path):
    cfg = load(path)
    weights = cfg.MODEL.WEIGHTS
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if "FAIR" in weights:  # Caffe2
        assert cfg.INPUT.FORMAT == "BGR" and mean[0] < mean[2] and set(std) == {1.0}
    else:
        assert cfg.INPUT.FORMAT == "RGB" and mean[0] > mean[2] and min(std) > 57
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    standardized = NORMS[norm_of(path)][2]
    # Weights made without WS must not be loaded into standardized convolutions, and what has no
    # weights must not be frozen.
    assert (weights == "") == (standardized or path.parent == DIGITS)
    assert weights or cfg.MODEL.BACKBONE.FREEZE_AT == 0


@pytest.mark.parametrize("path", COCO_FILES, ids=ids)
def test_coco_schedule(path: Path):
    solver = load(path).SOLVER
    name = COCO_NAME.fullmatch(path.stem)
    assert solver.IMS_PER_BATCH == 8 * int(name["images"])
    assert solver.BASE_LR == pytest.approx(0.02 * solver.IMS_PER_BATCH / 16)
    assert list(solver.STEPS) == sorted(solver.STEPS) and solver.STEPS[-1] < solver.MAX_ITER
    seen = [i * solver.IMS_PER_BATCH for i in (*solver.STEPS, solver.MAX_ITER)]
    assert seen == [16000 * i for i in SCHEDULES[name["schedule"]]]


@pytest.mark.parametrize("path", COCO_FILES, ids=ids)
def test_coco_data(path: Path):
    cfg = load(path)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


@pytest.mark.parametrize("norm", sorted({norm_of(path) for path in COCO_FILES}))
def test_coco_models(norm: str):
    # The four schedules share one model, which is then built once.
    cfgs = [load(path) for path in COCO_FILES if norm_of(path) == norm]
    assert len({cfg.MODEL.dump() for cfg in cfgs}) == 1
    model = build(cfgs[0])
    # stem, 3 per block, 4 shortcuts. Frozen: stem and the 3 blocks and shortcut of res2.
    n_frozen = 0 if norm in ("bcn", "gn_ws", "bcn_ws") else 1 + 3 * 3 + 1
    check_layers(model, cfgs[0], norm, n_backbone=1 + 3 * 16 + 4, n_frozen=n_frozen)


@pytest.mark.parametrize("path", DIGITS_FILES, ids=ids)
def test_digits_data_and_schedule(path: Path):
    cfg = load(path)
    assert cfg.DATASETS.TRAIN == ("digits_train",) and cfg.DATASETS.TEST == ("digits_val",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    assert cfg.INPUT.RANDOM_FLIP == "none"
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    assert cfg.SOLVER.IMS_PER_BATCH == 1
    assert cfg.SOLVER.WARMUP_ITERS < cfg.SOLVER.STEPS[0] < cfg.SOLVER.STEPS[-1]
    assert cfg.SOLVER.STEPS[-1] < cfg.SOLVER.MAX_ITER


def test_digits_configs_differ_in_the_norm_alone():
    def without_norm(path: Path) -> str:
        cfg = load(path)
        cfg.MODEL.BACKBONE.NAME = ""
        for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
            cfg.MODEL[key].NORM = ""
        return cfg.dump()

    assert len({without_norm(path) for path in DIGITS_FILES}) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_digits_models_train_and_predict(norm: str):
    cfg = digits(norm)
    model = build(cfg)
    # stem, 2 per block, 3 shortcuts (res2 keeps its input's size).
    check_layers(model, cfg, norm, n_backbone=1 + 2 * 8 + 3, n_frozen=0)

    optimizer = build_optimizer(cfg, model)
    model.train()
    batches = [[sample(96, 96, 10)], [sample(96, 96, 10, with_objects=False)]]
    if norm == "syncbn":
        batches.pop()  # Detectron2 refuses the mask head's empty input for SyncBN
    for batch in batches:
        with EventStorage():
            losses = model(batch)
        assert set(losses) == {
            "loss_cls",
            "loss_box_reg",
            "loss_mask",
            "loss_rpn_cls",
            "loss_rpn_loc",
        }
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            # A layer left out of the graph (FPN keeps its convolutions in plain lists) has None.
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()

    model.eval()
    with torch.no_grad():
        (output,) = model([sample(96, 128, 10)])
    assert output["instances"].has("pred_masks")


@pytest.mark.parametrize("norm", NORMS)
def test_standardization_reaches_the_features(norm: str):
    """Adding a constant to a filter changes what it computes, unless the filter is standardized."""
    model = build(digits(norm)).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.backbone(image)
        for module in model.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.add_(0.05)
        after = model.backbone(image)
    changed = max(float((after[k] - before[k]).abs().max() / before[k].abs().max()) for k in before)
    if NORMS[norm][2]:
        assert changed < 1e-2
    else:
        assert changed > 1e-1
