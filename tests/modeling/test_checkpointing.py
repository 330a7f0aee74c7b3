"""Activation checkpointing of whole models changes nothing but memory and time."""

import copy
import io
import math
import weakref

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage
from detectron2_models import a_training_image, small_config, small_model
from test_model_families import lazy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wsbcn_d2 import add_wsbcn_config, checkpoint_activations_, convert, fold, summarize
from wsbcn_d2.modeling import checkpointing
from wsbcn_d2.modeling.checkpointing import _Part

MASK, KEYPOINT, PANOPTIC = (
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
)
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
SMALL_RESNET = {"RESNETS__DEPTH": 18, "RESNETS__RES2_OUT_CHANNELS": 64}


def model_of(base, norm, **changes):
    if base != C4:  # whose head has the blocks of deeper ones
        changes = {**SMALL_RESNET, **changes}
    if base == KEYPOINT:
        changes = {"MASK_ON": False, "ROI_KEYPOINT_HEAD__CONV_DIMS": (32, 32), **changes}
        changes["ROI_HEADS__NUM_CLASSES"] = 1
    return small_model(base, norm, **changes)


def registered(norm, what):
    cfg = small_config(MASK, norm, **SMALL_RESNET)
    add_wsbcn_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_wsbcn_resnet_fpn_backbone"
    cfg.MODEL.WSBCN.CHECKPOINT_ACTIVATIONS = what
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that small images have several."""
    monkeypatch.setattr(checkpointing, "_ANCHORS", 200)
    monkeypatch.setattr(checkpointing, "_REGIONS", 3)


def images_of(seed, model):
    """An image with the ground truth of every task, or two."""
    torch.manual_seed(seed)
    if isinstance(model, DenseDetector):
        # Its highest level needs more than one value for its normalization.
        return [a_training_image(192), a_training_image(192)]
    image = a_training_image(64)
    points = torch.cat([10 + 30 * torch.rand(17, 2), torch.full((17, 1), 2.0)], dim=1)
    image["instances"].gt_keypoints = Keypoints(points[None])
    return [image]


BOTH = ((1,), (2, 3))


def trained(model, steps, autocast):
    """Losses, scalars in the log, gradients, buffers and averages of some steps, each with the
    forward passes of some images before one backward pass; gradients accumulate."""
    results = {}
    for step, seeds in enumerate(steps):
        total = 0
        for seed in seeds:
            images = images_of(seed, model)
            with EventStorage() as log, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = model(images)
            scalars = {name: value for name, (value, _) in log.latest().items()}
            scalars.pop("kpts_num_skipped_batches", None)  # of this process
            for name, value in (losses | scalars).items():
                if math.isfinite(value):  # which the log is not where there is no keypoint
                    results[f"{step} {seed} {name}"] = torch.as_tensor(value)
            total = total + sum(losses.values())
        total.backward()
        gradients = {f"{step} grad {n}": p.grad for n, p in model.named_parameters()}
        results.update({name: grad.clone() for name, grad in gradients.items() if grad is not None})
    results.update({f"buffer {name}": buffer for name, buffer in model.named_buffers()})
    if isinstance(model, DenseDetector):
        results["normalizer"] = torch.tensor(model.loss_normalizer)
    for name, module in model.named_modules():
        if isinstance(module, CycleBatchNormList):
            results[f"position {name}"] = torch.tensor(module._pos)
    return {name: value.detach().clone() for name, value in results.items()}


def kinds(model):
    """What is checkpointed, by the class that it has otherwise."""
    return {m.computed_class.__name__ for m in model.modules() if isinstance(m, _Part)}


def assert_same_training(plain, checkpointed, steps=((1,),), autocast=False):
    assert not kinds(plain) and kinds(checkpointed)
    expected, found = trained(plain, steps, autocast), trained(checkpointed, steps, autocast)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-4 * scale + 1e-6, msg=lambda m: f"{name}: {m}"
        )


BLOCKS = {"FusedBasicStem", "FusedBasicBlock"}
FPN_HEADS = {"FPN", "StandardRPNHead", "FusedConvFCHead", "FusedConvUpsampleHead"}


@pytest.mark.parametrize(
    "base,norm,expected",
    [
        (MASK, "BCN+WS", BLOCKS | FPN_HEADS),
        (MASK, "GN+WS", None),
        (MASK, "BN", None),
        (MASK, "FrozenBN", None),
        (
            C4,
            "BCN+WS",
            {"FusedBasicStem", "FusedBottleneckBlock", "StandardRPNHead"}
            | {"FusedConvUpsampleHead"},
        ),
        (RETINANET, "BCN+WS", BLOCKS | {"FPN", "Sequential", "RetinaNet"}),
        (RETINANET, "BN", {"BasicStem", "BasicBlock", "FPN", "Sequential", "RetinaNet"}),
        (
            KEYPOINT,
            "BCN+WS",
            BLOCKS | {"FPN", "StandardRPNHead", "FusedConvFCHead", "KRCNNConvDeconvUpsampleHead"},
        ),
        (PANOPTIC, "BCN+WS", BLOCKS | FPN_HEADS | {"Sequential"}),
    ],
)
def test_everything(base, norm, expected):
    plain = model_of(base, norm)
    model = copy.deepcopy(plain)
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    checkpoint_activations_(model)
    assert expected is None or kinds(model) == expected
    assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    # Several calls before a backward pass are a matter of the norm, not of the part.
    assert_same_training(
        plain, model, BOTH if norm in ("BCN+WS", "BN") and base in (MASK, RETINANET) else ((1,),)
    )


def test_fcos():
    build, _ = lazy("fcos_R_50_FPN_1x.py")
    plain = build()
    model = copy.deepcopy(plain)
    checkpoint_activations_(model)
    assert kinds(model) >= {"FPN", "Sequential", "FCOS"}
    assert_same_training(plain, model)


def test_levels_with_constant_statistics():
    """Those of the level of the call, though the backward pass begins with the last level."""
    plain = model_of(RETINANET, "BN")
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.running_var.uniform_(0.1, 2.0)
    model = copy.deepcopy(plain)
    checkpoint_activations_(model)
    assert_same_training(plain, model)


def test_registered_backbone():
    plain, model = registered("BCN+WS", ""), registered("BCN+WS", "all")
    assert kinds(model) == BLOCKS  # without a trainer that does the rest
    assert_same_training(plain, model)


@pytest.mark.parametrize("base", [MASK, RETINANET])
def test_autocast(base):
    plain = model_of(base, "BCN+WS")
    model = copy.deepcopy(plain)
    checkpoint_activations_(model)
    assert_same_training(plain, model, autocast=True)


def test_frozen_parts_run_once():
    """Nothing is saved there."""
    plain = model_of(MASK, "BCN+WS", BACKBONE__FREEZE_AT=3)
    model = copy.deepcopy(plain)
    checkpoint_activations_(model)
    resnet, calls = model.backbone.bottom_up, []
    for name in ("res2", "res3", "res4"):
        resnet.get_submodule(name)[0].conv1.register_forward_hook(
            lambda module, inputs, output, name=name: calls.append(name)
        )
    assert_same_training(plain, model)
    assert [calls.count(name) for name in ("res2", "res3", "res4")] == [1, 1, 2]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in the context and still there."""

    live = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in known:
                storage = tensor.untyped_storage()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, size):
        self.live -= size


def test_each_setting_keeps_less():
    """When the backward pass begins. ``benchmarks.memory`` measures the peaks at full width."""
    model = model_of(MASK, "BCN+WS")
    kept = []
    for what in ("", "backbone", "all"):
        checkpoint_activations_(model, what)
        images = images_of(1, model)
        with LiveBytes() as tensors, EventStorage():
            losses = model(images)
        kept.append(tensors.live)
        del losses
    assert kept[1] < 0.8 * kept[0] and kept[2] < 0.8 * kept[1], kept


def test_choosing_again_replaces():
    model = model_of(MASK, "BCN+WS")
    classes = [type(m) for m in model.modules()]
    checkpoint_activations_(model, "all")
    everything = [type(m) for m in model.modules()]
    checkpoint_activations_(model, "all")
    assert [type(m) for m in model.modules()] == everything != classes
    checkpoint_activations_(model, "backbone")
    assert kinds(model) == BLOCKS
    checkpoint_activations_(model, "")
    assert [type(m) for m in model.modules()] == classes


class OtherLosses(RetinaNet):
    def losses(self, *args):
        return {"loss": super().losses(*args)["loss_cls"] ** 2}


def test_losses_that_may_be_no_sums_are_left_alone():
    model = model_of(RETINANET, "BCN+WS")
    model.__class__ = OtherLosses
    checkpoint_activations_(model)
    assert type(model) is OtherLosses and kinds(model) == BLOCKS | {"FPN", "Sequential"}


@pytest.mark.parametrize(
    "model,what,message",
    [
        (nn.Linear(1, 1), "heads", "'heads' is not one of '', 'backbone', 'all'"),
        (nn.Linear(1, 1), "all", "Linear has no part .* 'all': no ResNet, and none of .* heads"),
    ],
)
def test_errors(model, what, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_activations_(model, what)


def test_pickle_and_deepcopy():
    model = model_of(MASK, "BCN+WS")
    checkpoint_activations_(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert other.backbone.lateral_convs[-1] is other.backbone.fpn_lateral2
    plain = copy.deepcopy(model)
    checkpoint_activations_(plain, "")
    assert_same_training(plain, loaded)


def test_conversion_summary_and_fold():
    plain = model_of(MASK, "GN")
    model = copy.deepcopy(plain)
    checkpoint_activations_(model)
    for m in (plain, model):
        convert(m, "BCN+WS")
    assert kinds(model) == BLOCKS | FPN_HEADS  # with what is fused for BCN
    assert summarize(model) == summarize(plain)
    folded, expected = fold(model), fold(plain)
    assert [type(m) for m in folded.modules()] == [type(m) for m in expected.modules()]
    assert kinds(model) == BLOCKS | FPN_HEADS
    assert_same_training(plain, model)


def test_trace_of_evaluation():
    model = nn.Sequential(BottleneckBlock(64, 64, bottleneck_channels=32, norm="BCN+WS")).eval()
    checkpoint_activations_(model, "backbone")
    x = torch.randn(2, 64, 12, 10)
    traced = torch.jit.trace(model, torch.randn(1, 64, 8, 8), check_trace=False)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
