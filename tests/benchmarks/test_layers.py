import json

import oracles
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from benchmarks.layers import (
    CONTENDERS,
    SHAPES,
    ReferenceBatchChannelNorm,
    benchmark_layers,
    floor_ms,
)
from wsbcn_d2 import model_zoo

CPU = torch.device("cpu")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_reference_is_the_formula(training, memory_format):
    norm = ReferenceBatchChannelNorm(64, 16, update_rate=0.3).double().train(training)
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            tensor.uniform_(0.5, 1.5)
    affine = [p.detach().clone().requires_grad_() for p in norm.parameters()]
    x = (torch.randn(2, 64, 5, 7).double() * 3 + 2).contiguous(memory_format=memory_format)
    ours, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    rate = 0.3 if training else None
    expected = oracles.estimated_bcn(exact, *affine, mean, var, rate)
    grad = torch.randn(x.shape).double()
    expected.y.backward(grad)

    y = norm(ours)
    y.backward(grad)
    torch.testing.assert_close(y, expected.y)
    torch.testing.assert_close(ours.grad, exact.grad)
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    for parameter, reference in zip(norm.parameters(), affine):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_contenders_that_compute_the_same():
    x = torch.randn(2, 64, 5, 7) * 3 + 2
    first, second = (CONTENDERS[name](64, 16) for name in ("BCN", "reference"))
    for _ in range(2):  # with the estimates of the first
        torch.testing.assert_close(first(x), second(x))


def test_shapes_are_those_of_the_detector():
    cfg = get_cfg()
    cfg.set_new_allowed(True)  # MODEL.WSBCN
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_1x_1img.yaml"
    cfg.merge_from_file(model_zoo.get_config_file(name))
    backbone = build_backbone(cfg).to("meta")
    seen = set()
    for module in backbone.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda m, inputs: seen.add(tuple(inputs[0].shape)))
    pixels = backbone.size_divisibility
    width = -(-1333 // pixels) * pixels
    p6 = backbone(torch.empty(1, 3, 800, width, device="meta"))["p6"]
    heads = {
        (cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, 256, 7, 7),
        (int(512 * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION), 256, 14, 14),
    }
    assert set(SHAPES.values()) == seen | heads | {tuple(p6.shape)}
    assert len(set(SHAPES.values())) == len(SHAPES)


def test_floor():
    # 1000 values of 2 bytes at 1 GB/s: 2 microseconds for each time they are moved
    floor = floor_ms((1, 10, 10, 10), "float16", 1e9)
    assert floor == pytest.approx({"forward": 0.006, "backward": 0.010, "total": 0.016})


def test_results():
    results = benchmark_layers(
        {"a": (1, 64, 6, 5), "b": (3, 48, 2, 2)},
        device=CPU,
        dtypes=["float32", "bfloat16"],
        contenders=["BatchNorm2d"],
        repetitions=3,
        warmup=1,
        copy_mebibytes=1,
        progress=False,
    )
    assert json.loads(json.dumps(results)) == results
    rows = results["rows"]
    keys = ("layer", "dtype", "memory_format", "contender")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows) == 2 * 2 * 2 * 4
    for row in rows:
        assert 0 < row["forward"]["q1"] <= row["forward"]["median"] <= row["forward"]["q3"]
        for key in ("q1", "median", "q3"):
            assert row["total"][key] > max(row["forward"][key], row["backward"][key])
    saved = {tuple(row[key] for key in keys): row["saved_bytes"] for row in rows}
    x = 64 * 6 * 5
    assert saved["a", "float32", "nchw", "GroupNorm"] == 4 * (x + 2 * 32)
    assert saved["a", "bfloat16", "nchw", "GroupNorm"] == 2 * (x + 2 * 32)
    assert 4 * x <= saved["a", "float32", "nchw", "BCN"] <= 4 * (x + 8 * 64)
    assert saved["a", "float32", "nchw", "reference"] >= 3 * 4 * x
