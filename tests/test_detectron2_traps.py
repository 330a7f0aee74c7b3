"""The places where Detectron2 treats norms and convolutions specially, one test or more each."""

import copy
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.layers import (
    ASPP,
    Conv2d,
    CycleBatchNormList,
    DeformConv,
    FrozenBatchNorm2d,
    ShapeSpec,
    get_norm,
)
from detectron2.modeling import FPN, build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from detectron2_models import (
    a_training_image,
    an_image,
    logged,
    modules_of_type,
    randomize_norms,
    small_config,
    small_model,
)
from fvcore.nn.precise_bn import get_bn_modules
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from oracles import channel_norm, estimated_bcn, standardized_weight
from torch import nn

from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d
from wsbcn_d2.layers import WeightStandardized

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # several processes at once, on few cores
OURS, STOCK_CHECKPOINTER = "detectron2.wsbcn_d2", "fvcore.common.checkpoint"


def estimates(model):
    return {
        f"{name}.{key}": getattr(m, key).clone()
        for name, m in modules_of_type(model, BatchChannelNorm).items()
        for key in ("running_mean", "running_var")
    }


def changed(before, after):
    """Names of the layers whose estimates differ."""
    return {key.rpartition(".")[0] for key in before if not torch.equal(before[key], after[key])}


def record_norms(model):
    """Inputs and outputs of each call of a BatchChannelNorm, by name, in order."""
    calls = {name: [] for name in modules_of_type(model, BatchChannelNorm)}
    for name, m in modules_of_type(model, BatchChannelNorm).items():
        m.register_forward_hook(
            lambda m, x, y, calls=calls[name]: calls.append(
                (x[0].detach().clone(), y.detach().clone())
            )
        )
    return calls


def oracle_arguments(norm, mean, var):
    affine = (norm.weight, norm.bias, norm.group_weight, norm.group_bias)
    return [p.detach().double() for p in (*affine, mean, var)]


def train_a_step(model, image=None):
    with EventStorage():
        losses = model.train()([image or a_training_image()])
    sum(losses.values()).backward()
    return losses


def resnet_config(norm, freeze_at=0, **changes):
    return small_config("Base-RCNN-FPN.yaml", norm, BACKBONE__FREEZE_AT=freeze_at, **changes)


def resnet(norm, freeze_at=0, **changes):
    torch.manual_seed(0)
    changes.setdefault("RESNETS__OUT_FEATURES", ["res3"])
    changes["BACKBONE__NAME"] = "build_resnet_backbone"
    return build_backbone(resnet_config(norm, freeze_at, **changes))


# ------------------------------------------------ 1: one function, imported by name (see also
# test_registration.py)


def test_trap01_option_is_a_string_that_a_config_can_dump():
    """A callable as NORM cannot be dumped; the strings can, and get_norm takes them everywhere."""
    cfg = small_config("Base-RCNN-FPN.yaml", "BCN(groups=16)+WS")
    dumped = get_cfg()
    dumped.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
    assert dumped.MODEL.ROI_MASK_HEAD.NORM == "BCN(groups=16)+WS"
    norms = modules_of_type(
        small_model("Base-RCNN-FPN.yaml", dumped.MODEL.FPN.NORM), BatchChannelNorm
    )
    assert norms and all(m.num_groups == 16 for m in norms.values())


# ------------------------------------------------------------------- 2: FPN's plain Python lists


def test_trap02_lists_of_fpn_hold_the_registered_standardized_convs():
    """FPN runs convolutions from plain lists: a replaced module would train without effect."""
    fpn = FPN(resnet("BCN+WS"), ["res3"], 32, norm="BCN+WS")
    assert fpn.lateral_convs == [fpn.fpn_lateral3] and fpn.output_convs == [fpn.fpn_output3]
    assert type(fpn.fpn_lateral3) is WSConv2d and type(fpn.fpn_output3) is WSConv2d
    x = torch.randn(1, 3, 64, 64)
    (fpn(x)["p3"] ** 2 * torch.rand(8)).sum().backward()
    for conv in (fpn.fpn_lateral3, fpn.fpn_output3):
        assert conv.weight.grad.abs().max() > 0
        # Only a standardized weight has gradients without component along 1 and itself.
        g, w = conv.weight.grad.flatten(1), conv.weight.detach().flatten(1)
        assert (g.sum(1) / g.abs().sum(1)).abs().max() < 1e-3
        w = w - w.mean(1, keepdim=True)
        assert (g * w).sum(1).abs().max() < 0.05 * (g.norm(dim=1) * w.norm(dim=1)).max()
    y = fpn.eval()(x)["p3"]
    with torch.no_grad():
        fpn.fpn_lateral3.weight.add_(torch.randn_like(fpn.fpn_lateral3.weight))
    assert not torch.allclose(fpn(x)["p3"], y)


def test_trap02_conv_with_lists_of_mask_and_box_heads():
    """The heads keep ``conv_norm_relus`` lists of the same kind."""
    box = FastRCNNConvFCHead(
        ShapeSpec(channels=32, height=4, width=4), conv_dims=[32], fc_dims=[], conv_norm="GN+WS"
    )
    mask = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=32), num_classes=2, conv_dims=[32, 32], conv_norm="GN+WS"
    )
    assert box.conv_norm_relus == [box.conv1] and type(box.conv1) is WSConv2d
    assert mask.conv_norm_relus == [mask.mask_fcn1] and type(mask.mask_fcn1) is WSConv2d


# -------------------------------------------------------------------------------- 3: FREEZE_AT


@pytest.mark.parametrize("norm", ["BCN+WS", "BatchBCN", "SyncBCN+WS"])
def test_trap03_freeze_at_stops_the_estimates_and_keeps_the_layer(norm):
    """FREEZE_AT=2 runs FrozenBatchNorm2d.convert_frozen_batchnorm over stem and res2, which would
    replace a BatchNorm and drop the channel norm, and let any other module keep updating."""
    model = randomize_norms(resnet(norm, freeze_at=2)).train()
    before = estimates(model)
    assert not modules_of_type(model, FrozenBatchNorm2d)
    calls = record_norms(model)
    model(torch.randn(2, 3, 64, 64))["res3"].sum().backward()
    updated = changed(before, estimates(model))
    assert updated == {name for name in calls if name.startswith("res3")}
    for name, m in modules_of_type(model, BatchChannelNorm).items():
        ((x, y),) = calls[name]
        m.eval()
        if name in updated:
            continue
        torch.testing.assert_close(y, m(x))
        arguments = oracle_arguments(m, m.running_mean, m.running_var)
        expected = estimated_bcn(x.double(), *arguments, rate=None).y
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("res3"))


@pytest.mark.parametrize(
    "convert", [FrozenBatchNorm2d.convert_frozen_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm]
)
@pytest.mark.parametrize("norm, kind", [("BCN+WS", BatchChannelNorm), ("CN+WS", ChannelNorm)])
def test_trap03_helpers_that_replace_batchnorm_leave_ours(convert, norm, kind):
    """They test for BatchNorm by class."""
    model = randomize_norms(resnet(norm)).eval()
    norms, x = modules_of_type(model, kind), torch.randn(1, 3, 64, 64)
    expected = model(x)["res3"]
    model = convert(model)
    assert modules_of_type(model, kind) == norms and norms
    torch.testing.assert_close(model(x)["res3"], expected)


def test_trap03_frozen_bn_ws_becomes_frozen_bn_of_a_standardized_conv():
    """The stock replacement of BatchNorm must not undo the standardization of its conv."""
    model = resnet("BN+WS", freeze_at=2)
    assert type(model.stem.conv1) is WSConv2d
    assert type(model.stem.conv1.norm) is FrozenBatchNorm2d
    assert type(model.res3[0].conv1.norm) is nn.BatchNorm2d


# ----------------------------------------------------------------------------- 4: weight decay


@pytest.mark.parametrize(
    "norm, per_layer", [("BCN+WS", 4), ("SyncBCN", 4), ("CN+WS", 2), ("GN+WS", 2)]
)
def test_trap04_norm_parameters_are_not_decayed(norm, per_layer):
    """The solver gives WEIGHT_DECAY_NORM to torch's own norm types only."""
    cfg = small_config("Base-RCNN-FPN.yaml", norm)
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == 0.0 and cfg.SOLVER.WEIGHT_DECAY > 0
    model = small_model("Base-RCNN-FPN.yaml", norm)
    optimizer = build_optimizer(cfg, model)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    norms = modules_of_type(model, nn.GroupNorm).values()
    parameters = [p for m in norms for p in m.parameters()]
    assert len(parameters) == per_layer * len(norms) > 0
    assert all(decay[p] == 0.0 for p in parameters)
    convs = modules_of_type(model, nn.Conv2d).values()
    assert all(decay[m.weight] == cfg.SOLVER.WEIGHT_DECAY for m in convs)
    assert set(decay) == set(model.parameters())


# ------------------------------------------------------------------------ 5: the Conv2d wrapper


@pytest.mark.parametrize("groups, stride, dilation", [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_trap05_wrapper_uses_the_standardized_weight(groups, stride, dilation):
    """Conv2d.forward calls F.conv2d itself, past _conv_forward and parametrizations."""
    conv = Conv2d(
        4, 64, 3, stride, dilation, dilation, groups, norm=get_norm("GN+WS", 64), activation=F.relu
    )
    x = torch.randn(2, 4, 9, 9)
    weight = standardized_weight(conv.weight.detach().double())
    y = F.conv2d(x.double(), weight, conv.bias.double(), stride, dilation, dilation, groups)
    expected = F.relu(F.group_norm(y, 32))
    torch.testing.assert_close(conv(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fill", [c2_msra_fill, c2_xavier_fill])
def test_trap05_key_is_weight_and_initializers_work(fill):
    """A parametrization would rename the key and hide the parameter from the initializers."""
    plain = Conv2d(8, 64, 3, bias=False, norm=get_norm("GN", 64))
    conv = Conv2d(8, 64, 3, bias=False, norm=get_norm("GN+WS", 64))
    assert set(conv.state_dict()) == {*plain.state_dict(), "ws_eps"}
    parameter = conv.weight
    torch.manual_seed(1)
    fill(plain)
    torch.manual_seed(1)
    fill(conv)
    assert conv.weight is parameter and torch.equal(conv.weight, plain.weight)


# --------------------------------------------------------------------- 6: deformable convolution


def test_trap06_empty_input_of_a_deformable_convolution():
    """It returns before the norm on empty input, and is no nn.Conv2d (the rest of the trap is in
    test_stock_components.py)."""
    pytest.importorskip("detectron2._C", reason="Detectron2 is installed without compiled ops")
    conv = DeformConv(4, 32, 3, padding=1, norm=get_norm("SyncBCN+WS", 32))
    assert isinstance(conv, WeightStandardized) and not isinstance(conv, nn.Conv2d)
    before = estimates(conv)
    y = conv(torch.zeros(0, 4, 5, 5, requires_grad=True), torch.zeros(0, 18, 5, 5))
    assert y.shape == (0, 32, 5, 5) and not changed(before, estimates(conv))
    assert "weight" in conv._parameters  # also after the early return


# --------------------------------------------------------------------- 7: in-place operations


@pytest.mark.parametrize("norm", ["BCN+WS", "BatchBCN+WS", "CN", "GN+WS"])
def test_trap07_relu_and_sum_in_place_after_the_norm(norm):
    """BottleneckBlock overwrites the outputs of its norms."""
    block = randomize_norms(BottleneckBlock(32, 64, bottleneck_channels=32, norm=norm)).double()
    copied = copy.deepcopy(block)
    x = torch.randn(2, 32, 6, 6, dtype=torch.float64, requires_grad=True)
    out = copied.conv2(copied.conv1(x).relu()).relu()
    expected = (copied.conv3(out) + copied.shortcut(x)).relu()
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, *copied.parameters()), dy)
    y = block(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, (x, *block.parameters()), dy), gradients)


# ------------------------------------------------------- 8: heads shared by the feature levels


def dense_head(kind, norm, channels=32):
    torch.manual_seed(0)
    arguments = {} if kind is FCOSHead else {"num_anchors": 2}
    shapes = [ShapeSpec(channels=channels)] * 5
    return kind(input_shape=shapes, num_classes=3, conv_dims=[channels] * 2, norm=norm, **arguments)


def levels(channels=32):
    """Five feature maps with unlike statistics."""
    return [torch.randn(2, channels, 32 >> i, 32 >> i) * (i + 1) + 2 * i for i in range(5)]


HEADS = pytest.mark.parametrize("kind", [RetinaNetHead, FCOSHead])


@HEADS
@pytest.mark.parametrize("norm", ["BCN", "BCN+WS", "BCN(groups=16, update_rate=0.3)+WS"])
def test_trap08_each_level_has_its_own_estimates(kind, norm):
    """Detectron2 does it for the literal options "BN" and "SyncBN" only."""
    head = dense_head(kind, norm)
    rate = 0.3 if "0.3" in norm else 0.1
    features = levels()
    calls = record_norms(head)
    start = estimates(head)
    for _ in range(2):
        head(features)
    for name, norm in modules_of_type(head, BatchChannelNorm).items():
        assert norm.num_levels == 5 and len(calls[name]) == 10
        for level in range(5):
            mean, var = (start[f"{name}.running_{s}"][level].double() for s in ("mean", "var"))
            for call in (level, level + 5):
                x, y = calls[name][call]
                result = estimated_bcn(x.double(), *oracle_arguments(norm, mean, var), rate=rate)
                torch.testing.assert_close(y.double(), result.y, rtol=1e-3, atol=1e-4)
                mean, var = result.running_mean, result.running_var
            torch.testing.assert_close(
                norm.running_mean[level].double(), mean, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(norm.running_var[level].double(), var, rtol=1e-4, atol=1e-5)
    # They are used in evaluation as well.
    head.eval()
    for recorded in calls.values():
        recorded.clear()
    head(features)
    for name, norm in modules_of_type(head, BatchChannelNorm).items():
        for level, (x, y) in enumerate(calls[name]):
            arguments = oracle_arguments(norm, norm.running_mean[level], norm.running_var[level])
            expected = estimated_bcn(x.double(), *arguments, rate=None).y
            torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


@HEADS
def test_trap08_pass_that_fails_halfway_does_not_shift_the_levels(kind):
    """The level is counted per call, so an interrupted pass leaves the counter anywhere."""
    # With one channel a group, the channel norm would hide the estimates.
    head = randomize_norms(dense_head(kind, "BCN(groups=8)+WS")).eval()
    features = levels()
    expected = head(features)
    with pytest.raises((ValueError, RuntimeError)):
        head([*features[:2], torch.randn(1, 7, 4, 4), *features[3:]])
    for outputs, expected_outputs in zip(head(features), expected):
        torch.testing.assert_close(outputs, expected_outputs)


@HEADS
@pytest.mark.parametrize("norm, bn", [("BN+WS", nn.BatchNorm2d), ("SyncBN+WS", nn.SyncBatchNorm)])
def test_trap08_bn_and_sync_bn_with_ws_are_as_separate_as_without(kind, norm, bn):
    head, stock = dense_head(kind, norm), dense_head(kind, norm[: -len("+WS")])
    lists = modules_of_type(stock, CycleBatchNormList)
    assert set(modules_of_type(head, CycleBatchNormList)) == set(lists) and len(lists) == 4
    for name in lists:
        assert [type(m) for m in head.get_submodule(name)] == [bn] * 5
    stock.load_state_dict({k: v for k, v in head.state_dict().items() if "ws_eps" not in k})
    for name, conv in modules_of_type(head, WSConv2d).items():
        stock.get_submodule(name).weight.data = standardized_weight(conv.weight.detach())
    features = levels()
    for outputs, expected in zip(head(features), stock(features)):
        torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4)
    for name in lists:
        torch.testing.assert_close(
            head.get_submodule(name).state_dict(),
            stock.get_submodule(name).state_dict(),
            rtol=1e-3,
            atol=1e-4,
        )


@HEADS
def test_trap08_checkpoint_of_a_stock_bn_head_loads_into_bcn(kind, tmp_path):
    """CycleBatchNormList saves its estimates under one key per level."""
    stock, head = randomize_norms(dense_head(kind, "BN")), dense_head(kind, "BCN(groups=16)")
    stock(levels())
    DetectionCheckpointer(stock, str(tmp_path)).save("stock")
    with logged(STOCK_CHECKPOINTER, OURS) as messages:
        DetectionCheckpointer(head).load(str(tmp_path / "stock.pth"))
    text = "".join(messages)
    assert "group_weight" in text and "not used by the model" not in text
    assert "running" not in text and "incompatible" not in text
    calls = record_norms(head.eval())
    head(levels())
    for name, recorded in calls.items():
        bn, norm = stock.get_submodule(name), head.get_submodule(name)
        for level, (x, y) in enumerate(recorded):
            bn._pos = level
            expected = channel_norm(bn.eval()(x), norm.group_weight, norm.group_bias, 1e-5)
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


@HEADS
def test_trap08_own_checkpoint_of_a_head_round_trips(kind, tmp_path):
    head, other = dense_head(kind, "BCN+WS"), randomize_norms(dense_head(kind, "BCN+WS"))
    head(levels())
    DetectionCheckpointer(head, str(tmp_path)).save("head")
    with logged(STOCK_CHECKPOINTER, OURS) as messages:
        DetectionCheckpointer(other).load(str(tmp_path / "head.pth"))
    assert not [m for m in messages if "Loading from" not in m]
    torch.testing.assert_close(other.state_dict(), head.state_dict())


def test_trap08_any_number_of_groups_that_divides_the_channels():
    """RetinaNetHead builds a norm of 32 channels to look at its type, whatever its own width."""
    for norm in ("BCN(groups=64)+WS", "GN(groups=24)"):
        channels = 128 if "64" in norm else 96
        head = dense_head(RetinaNetHead, norm, channels)
        groups = {m.num_groups for m in modules_of_type(head, nn.GroupNorm).values()}
        assert groups == {64 if "64" in norm else 24}


# --------------------------------------------------------------------------------- 9: biases


@pytest.mark.parametrize("norm", ["BCN", "BCN+WS", "GN+WS", "FrozenBN+WS"])
def test_trap09_bias_is_absent_where_stock_has_none_with_a_norm(norm):
    """FPN, ASPP and others decide on the bias by ``norm == ""``; the heads by ``not norm``."""

    def biases(norm):
        models = (
            small_model("Base-RCNN-FPN.yaml", norm),
            ASPP(32, 32, [1, 2, 3], norm=norm, activation=F.relu),
            dense_head(RetinaNetHead, norm),
        )
        return [
            {n for n, m in modules_of_type(model, nn.Conv2d).items() if m.bias is not None}
            for model in models
        ]

    with_norm, without = biases("GN"), biases("")
    assert biases(norm) == with_norm
    assert with_norm[0] < without[0] and with_norm[1] < without[1]


# ----------------------------------------------------------------------------- 10: PreciseBN


class HeadOnBackbone(nn.Module):
    """BatchNorm below, BCN shared by five levels above."""

    def __init__(self):
        super().__init__()
        self.conv = Conv2d(3, 32, 3, padding=1, norm=get_norm("BN+WS", 32))
        self.head = dense_head(RetinaNetHead, "BCN+WS")

    def forward(self, x):
        x = self.conv(x)
        return self.head([F.avg_pool2d(x, 2**i) for i in range(5)])


def test_trap10_precise_bn_is_disabled_by_bcn_alone():
    """It knows the BatchNorm types only."""
    model = resnet("BCN+WS").train()
    assert get_bn_modules(model) == []
    before = estimates(model)
    with logged("detectron2.engine.hooks") as messages:
        hook = PreciseBN(1, model, itertools.repeat(torch.randn(1, 3, 32, 32)), 3)
    assert "PreciseBN is disabled" in "".join(messages)
    hook.update_stats()
    assert not changed(before, estimates(model))


def test_trap10_precise_bn_beside_bcn():
    """It asserts that none of its layers is used twice in a pass, and rebinds their buffers."""
    model = HeadOnBackbone().train()
    norms = modules_of_type(model, BatchChannelNorm)
    buffers = {name: (m.running_mean, m.running_var) for name, m in norms.items()}
    assert get_bn_modules(model) == [model.conv.norm]
    data = [torch.randn(2, 3, 32, 32) * (i + 1) for i in range(3)]
    reference = copy.deepcopy(model)
    means = []
    reference.conv.norm.register_forward_pre_hook(lambda m, x: means.append(x[0].mean((0, 2, 3))))
    with torch.no_grad():
        for x in data:
            reference(x)
    PreciseBN(1, model, data, 3).update_stats()
    torch.testing.assert_close(model.conv.norm.running_mean, torch.stack(means).mean(0))
    for name, m in norms.items():
        assert m.running_mean is buffers[name][0] and m.running_var is buffers[name][1]
        # Its passes are training passes, so the estimates go on as in any other.
        torch.testing.assert_close(m.running_mean, reference.get_submodule(name).running_mean)


# ------------------------------------------------------------------- 11: names in checkpoints


def test_trap11_short_names_of_a_bn_backbone_fill_all_four_values(tmp_path):
    """ImageNet weights are matched by the ends of names: ``norm.running_mean`` matches, a nested
    ``norm.bn.running_mean`` would not."""
    source = randomize_norms(resnet("BN"))
    state = {k: v.numpy() for k, v in source.state_dict().items() if "tracked" not in k}
    path = tmp_path / "R-50.pkl"  # as Detectron2's converter from torchvision writes it
    content = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    model = small_model("Base-RCNN-FPN.yaml", "BCN")
    DetectionCheckpointer(model).load(str(path))
    bottom_up = model.backbone.bottom_up
    assert len(modules_of_type(source, nn.BatchNorm2d)) > 10
    for name, bn in modules_of_type(source, nn.BatchNorm2d).items():
        norm = bottom_up.get_submodule(name)
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(norm, key), getattr(bn, key)), (name, key)
    for name, conv in modules_of_type(source, nn.Conv2d).items():
        assert torch.equal(bottom_up.get_submodule(name).weight, conv.weight)


def test_trap11_caffe2_names_fill_weight_and_bias(tmp_path):
    """The MSRA models have the scale and the shift of a folded BatchNorm, and other names."""
    weight, bias = np.random.rand(32).astype("float32"), np.random.rand(32).astype("float32")
    path = tmp_path / "msra.pkl"
    path.write_bytes(pickle.dumps({"res2_0_branch2a_bn_s": weight, "res2_0_branch2a_bn_b": bias}))
    model = small_model("Base-RCNN-FPN.yaml", "BCN+WS")
    DetectionCheckpointer(model).load(str(path))
    norm = model.backbone.bottom_up.res2[0].conv1.norm
    np.testing.assert_array_equal(norm.weight.detach(), weight)
    np.testing.assert_array_equal(norm.bias.detach(), bias)


def test_trap11_own_checkpoint_loads_in_silence(tmp_path):
    """fvcore refuses non-tensor state and reports every key that is missing or left over."""
    source = randomize_norms(small_model("Base-RCNN-FPN.yaml", "BCN+WS"))
    DetectionCheckpointer(source, str(tmp_path)).save("model")
    torch.manual_seed(1)
    model = small_model("Base-RCNN-FPN.yaml", "BCN+WS")
    with logged(STOCK_CHECKPOINTER, OURS) as messages:
        DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert not [m for m in messages if "Loading from" not in m]
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_trap11_weights_trained_without_standardization_are_noticed_once(tmp_path):
    """Nothing in a plain checkpoint says so; the mark that ours have is missing."""
    source, model = small_model("Base-RCNN-FPN.yaml", "GN"), small_model(
        "Base-RCNN-FPN.yaml", "GN+WS"
    )
    DetectionCheckpointer(source, str(tmp_path)).save("plain")
    for _ in range(2):  # each load says it
        with logged(OURS) as warnings, logged(STOCK_CHECKPOINTER) as messages:
            DetectionCheckpointer(model).load(str(tmp_path / "plain.pth"))
        (warning,) = warnings
        assert "weight standardization" in warning
        (missing,) = [m for m in messages if "not found in the checkpoint" in m]
        assert missing.count("ws_eps") == len(modules_of_type(model, WSConv2d))
    with logged(OURS, STOCK_CHECKPOINTER) as messages:
        DetectionCheckpointer(source).load(str(tmp_path / "plain.pth"))
    assert not [m for m in messages if "Loading from" not in m]


def test_trap11_epsilon_survives_half_precision_and_a_round_trip(tmp_path):
    """float16 cannot hold 1e-5 exactly."""
    source = Conv2d(4, 32, 3, norm=get_norm("GN+WS", 32))
    source.eps = 1.25e-5
    DetectionCheckpointer(source.half(), str(tmp_path)).save("half")
    assert source.state_dict()["ws_eps"].item() == source.eps == 1.25e-5
    model = Conv2d(4, 32, 3, norm=get_norm("GN+WS", 32))
    DetectionCheckpointer(model).load(str(tmp_path / "half.pth"))
    assert model.eps == 1.25e-5 and model.weight.dtype == torch.float32
    torch.testing.assert_close(
        model.standardized_weight(), standardized_weight(source.weight.detach().float(), 1.25e-5)
    )


# ------------------------------------------------------------- 12: model.train() on everything


class Nothing(DatasetEvaluator):
    def evaluate(self):
        return {}


def test_trap12_frozen_blocks_stay_frozen_after_evaluation():
    """Evaluation ends with model.train(), which reaches frozen blocks too."""
    model = small_model("Base-RCNN-FPN.yaml", "BCN+WS", BACKBONE__FREEZE_AT=2).train()
    bottom_up = model.backbone.bottom_up
    before = estimates(model)
    inference_on_dataset(model, [[an_image()]], Nothing())
    assert bottom_up.stem.conv1.norm.training and not changed(before, estimates(model))
    train_a_step(model)
    updated = changed(before, estimates(model))
    assert not [
        n for n in updated if n.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2"))
    ]
    assert [n for n in updated if n.startswith("backbone.bottom_up.res3")]


# --------------------------------------------- 13: buffers are updated before the loss is checked


def test_trap13_image_with_nan_leaves_the_estimates():
    """The trainer finds out that a loss is not finite when all buffers have been updated."""
    model = small_model("Base-RetinaNet.yaml", "BCN+WS", FPN__OUT_CHANNELS=64)
    train_a_step(model)
    before = estimates(model)
    bad = a_training_image()
    bad["image"][0, 30, 30] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    trainer = SimpleTrainer(model, [[bad]], optimizer)
    with EventStorage() as trainer.storage, pytest.raises(FloatingPointError):
        trainer.run_step()
    assert not changed(before, estimates(model))
    skipped = [
        m.skipped_updates for m in modules_of_type(model.backbone, BatchChannelNorm).values()
    ]
    assert min(skipped) == 1
    assert all(torch.isfinite(value).all() for value in estimates(model).values())


# ------------------------------------------------------------------- 14: heads and empty inputs


def test_trap14_c4_head_without_proposals():
    """res5 runs on regions there, of which there may be none."""
    model = small_model("Base-RCNN-C4.yaml", "BCN+WS").train()
    heads = model.roi_heads
    assert standardized_convs(heads.res5) == {
        f"{i}.{conv}"
        for i in range(3)
        for conv in ("conv1", "conv2", "conv3", *(["shortcut"] if i == 0 else []))
    }
    before = estimates(heads)
    features = torch.randn(1, 256, 4, 4, requires_grad=True)
    x = heads._shared_roi_transform([features], [Boxes(torch.zeros(0, 4))])
    assert x.shape == (0, 512, 7, 7)
    scores, _ = heads.box_predictor(x.mean(dim=[2, 3]))
    scores.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in heads.res5.parameters())
    assert not features.grad.any() and not changed(before, estimates(heads))
    assert not any(m.skipped_updates for m in modules_of_type(heads, BatchChannelNorm).values())
    x = heads._shared_roi_transform([features], [Boxes(torch.tensor([[0.0, 0.0, 40.0, 40.0]]))])
    assert len(changed(before, estimates(heads))) == 10


def standardized_convs(model):
    return set(modules_of_type(model, WeightStandardized))


@pytest.mark.parametrize("norm", ["BCN+WS", "SyncBCN+WS", "BatchBCN+WS"])
def test_trap14_box_and_mask_heads_without_proposals(norm):
    model = small_model("Base-RCNN-FPN.yaml", norm).train()
    heads = model.roi_heads
    before = estimates(heads)
    box = torch.zeros(0, 32, 7, 7, requires_grad=True)
    mask = torch.zeros(0, 32, 14, 14, requires_grad=True)
    (heads.box_head(box).sum() + heads.mask_head.layers(mask).sum()).backward()
    parameters = [*heads.box_head.parameters(), *heads.mask_head.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in parameters)
    assert not changed(before, estimates(heads))


def test_trap14_deconvolution_and_predictor_of_the_mask_head_stay_plain():
    model = small_model("Base-RCNN-FPN.yaml", "BCN+WS", KEYPOINT_ON=True)
    heads = model.roi_heads
    assert standardized_convs(heads) == {"box_head.conv1", "mask_head.mask_fcn1"}
    assert type(heads.mask_head.deconv) is nn.ConvTranspose2d
    assert type(heads.mask_head.predictor) is Conv2d
    assert len(modules_of_type(heads.keypoint_head, Conv2d)) == 8  # it takes no norm


# ----------------------------------------------- 15: whoever builds it, WS takes effect or it fails

PREDICT = """
import sys, torch
{first}
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file({config!r})
predictor = DefaultPredictor(cfg)
image = torch.load({image!r})
instances = predictor(image.permute(1, 2, 0).numpy())["instances"]
torch.save({{k: getattr(v, "tensor", v) for k, v in instances.get_fields().items()}}, {out!r})
"""


def test_trap15_default_predictor_in_a_fresh_process(tmp_path):
    """DefaultPredictor builds from the config alone. The same model must come out, or an error."""
    cfg = small_config("Base-RCNN-FPN.yaml", "BCN+WS", ROI_HEADS__SCORE_THRESH_TEST=0.0)
    model = small_model("Base-RCNN-FPN.yaml", "BCN+WS", ROI_HEADS__SCORE_THRESH_TEST=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        train_a_step(model)
        optimizer.step()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    config, image, out = (str(tmp_path / name) for name in ("config.yaml", "image.pt", "out.pt"))
    with open(config, "w") as f:
        f.write(cfg.dump())
    x = (torch.rand(3, 64, 64) * 255).byte()
    torch.save(x, image)
    scripts = [
        PREDICT.format(first=first, config=config, image=image, out=out)
        for first in ("import wsbcn_d2", "")
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", s],
            env=ONE_THREAD,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for s in scripts
    ]
    with torch.no_grad():
        instances = model.eval()([{"image": x.float(), "height": 64, "width": 64}])[0]["instances"]
    (_, error), (_, error_without) = [p.communicate(timeout=200) for p in processes]
    assert processes[0].returncode == 0, error.decode()
    assert len(instances) == 5
    for key, value in torch.load(out).items():
        expected = getattr(instances, key)
        torch.testing.assert_close(
            value, getattr(expected, "tensor", expected), rtol=1e-4, atol=1e-4
        )
    # Without the package, the config must not build a model without WS in silence.
    assert processes[1].returncode != 0 and b"KeyError: 'BCN+WS'" in error_without


def test_trap15_lazy_config():
    """LazyConfig calls the constructors itself."""
    source = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    stages = source.backbone.bottom_up.stages
    stages.depth, stages.norm = 18, "BCN+WS"
    del stages.stride_in_1x1  # R-18 has none
    source.backbone.bottom_up.stem.norm = source.backbone.norm = "BCN+WS"
    source.roi_heads.box_head.update(conv_dims=[64], fc_dims=[8], conv_norm="BCN(groups=16)+WS")
    source.roi_heads.box_predictor.input_shape = ShapeSpec(channels=8)
    source.roi_heads.mask_head.conv_norm = "GN+WS"
    model = instantiate(source)
    assert standardized_convs(model) == {
        n for n, m in modules_of_type(model, nn.Conv2d).items() if getattr(m, "norm", None)
    }
    assert len(standardized_convs(model)) == 1 + 16 + 3 + 8 + 1 + 4
    assert model.roi_heads.box_head.conv1.norm.num_groups == 16
    assert type(model.roi_heads.mask_head.mask_fcn1.norm) is nn.GroupNorm
    assert type(model.backbone.bottom_up.stem.conv1.norm) is BatchChannelNorm


def test_trap15_lazy_config_file_keeps_the_option(tmp_path):
    path = tmp_path / "fcos.yaml"
    lazy = model_zoo.get_config("common/models/fcos.py").model
    lazy.head.update(norm="BCN(groups=16, update_rate=0.01)+WS", conv_dims=[32], num_classes=2)
    LazyConfig.save(lazy, str(path))
    head = instantiate(LazyConfig.load(str(path)).head)
    assert standardized_convs(head) == {"cls_subnet.0", "bbox_subnet.0"}
    norm = head.cls_subnet[1]
    assert (norm.num_groups, norm.update_rate, norm.num_levels) == (16, 0.01, 5)


def test_trap15_third_party_module_built_by_hand():
    """Code that puts the pieces together in its own way."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Conv2d(3, 3, 1)
            self.down = nn.Conv2d(3, 64, 3)
            self.down_norm = get_norm("BCN+WS", 64)
            self.up = nn.Sequential()
            self.up.append(nn.ConvTranspose2d(64, 32, 2, 2))
            self.up.append(get_norm("BCN+WS", 32))
            self.out = nn.ModuleList([Conv2d(32, 32, 1), nn.Conv2d(32, 2, 1)])
            self.out[0].norm = get_norm("GN+WS", 32)

    assert standardized_convs(Block()) == {"down", "up.0", "out.0"}


# -------------------------------------------------------- 17 and 18: several processes, and CPUs


def test_trap17_sync_mode_in_a_single_process_is_batch_mode():
    """No process group is needed, nor a GPU."""
    x = torch.randn(2, 3, 8, 8)
    sync, batch = (Conv2d(3, 32, 3, norm=get_norm(n, 32)) for n in ("SyncBCN+WS", "BatchBCN+WS"))
    batch.load_state_dict(sync.state_dict())
    torch.testing.assert_close(sync(x), batch(x))
    torch.testing.assert_close(sync.norm.running_mean, batch.norm.running_mean)


TWO_PROCESSES = """
import torch, torch.distributed as dist
import wsbcn_d2
from detectron2.config import get_cfg
from detectron2.engine import create_ddp_model, launch
from detectron2.layers import Conv2d, get_norm
from detectron2.utils import comm
from wsbcn_d2.engine import Trainer

class Batches(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return iter(torch.load({data!r}, weights_only=False)[comm.get_rank()])

def main():
    torch.set_num_threads(1)
    try:
        create_ddp_model(torch.nn.Linear(1, 1))
        raise SystemExit("stock create_ddp_model takes a CPU model")
    except ValueError as error:
        assert "device_ids" in str(error)
    x = torch.randn(2, 3, 8, 8)
    stock = Conv2d(3, 32, 3, norm=get_norm("SyncBN+WS", 32))
    try:
        stock(x)
        raise SystemExit("torch's SyncBatchNorm takes CPU tensors")
    except ValueError as error:
        assert "GPU" in str(error)
    assert torch.isfinite(stock.eval()(x)).all()
    cfg = get_cfg()
    wsbcn_d2.add_wsbcn_config(cfg)
    cfg.merge_from_file({config!r})
    cfg.MODEL.WSBCN.SYNC_PERIOD = 0  # the layers alone must keep the estimates equal
    trainer = Batches(cfg)
    assert isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel)
    trainer.train()
    state = trainer.model.module.state_dict()
    for key in sorted(state):
        values = [torch.empty_like(state[key]) for _ in range(2)]
        dist.all_gather(values, state[key])
        assert torch.equal(*values), key
    if comm.is_main_process():
        torch.save(state, {out!r})

if __name__ == "__main__":
    launch(main, 2, dist_url="auto")
"""


def test_trap17_and_18_two_processes_train_on_cpu(tmp_path):
    """torch's SyncBatchNorm refuses CPU tensors, and create_ddp_model asks for a GPU. With SyncBCN
    both ranks have the statistics of both."""
    cfg = small_config("Base-RetinaNet.yaml", "", RESNETS__DEPTH=18, RESNETS__RES2_OUT_CHANNELS=64)
    cfg.MODEL.RESNETS.NORM = "SyncBCN+WS"
    cfg.MODEL.RETINANET.NORM = cfg.MODEL.FPN.NORM = ""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.DATASETS.TEST = 2, 2, ()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    names = ("config.yaml", "data.pt", "out.pt", "script.py")
    config, data, out, script = (str(tmp_path / name) for name in names)
    images = [[[a_training_image()] for _ in range(2)] for _ in range(2)]
    torch.save(images, data)
    with open(config, "w") as f:
        f.write(cfg.dump())
    with open(script, "w") as f:
        f.write(TWO_PROCESSES.format(config=config, data=data, out=out))
    done = subprocess.run(
        [sys.executable, script], env=ONE_THREAD, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(out)
    assert state["backbone.bottom_up.stem.conv1.norm.running_mean"].abs().min() > 0
