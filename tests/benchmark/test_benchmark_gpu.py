"""What the benchmarks do on a GPU only: python -m pytest -m gpu"""

import pytest
import torch
from detectron2_models import small_config

from wsbcn_d2 import add_wsbcn_config
from wsbcn_d2.benchmark.measure import KernelClock, copy_bandwidth
from wsbcn_d2.benchmark.norms import CONTENDERS, benchmark_norms
from wsbcn_d2.benchmark.train import Trainee, _largest_batch, fixed_heads, make_batch

pytestmark = pytest.mark.gpu
BASE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def trainee(norm, **options):
    cfg = small_config(BASE, norm, DEVICE="cuda", ROI_HEADS__NUM_CLASSES=80)
    add_wsbcn_config(cfg)
    cfg.SOLVER.BASE_LR = 0.0
    return Trainee(cfg, torch.device("cuda"), **options)


def test_clock():
    device = torch.device("cuda")
    x = torch.ones(1000, device=device)
    result, elapsed, host = KernelClock(device)(lambda: x + 1)
    assert result.eq(2).all() and elapsed > 0 and host > 0
    assert copy_bandwidth(device, mebibytes=64, repetitions=3) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms(dtype):
    contenders = [name for name in CONTENDERS if name != "reference, compiled"]  # minutes
    results = benchmark_norms(
        {"a": (1, 64, 20, 30), "b": (4, 64, 7, 7)},
        device=torch.device("cuda"),
        dtypes=[dtype],
        memory_formats=["nchw", "channels_last"],
        contenders=contenders,
        repetitions=2,
        warmup=1,
        copy_mebibytes=16,
        progress=False,
    )
    measured = {row["contender"] for row in results["rows"]}
    assert measured >= set(contenders) - {"Liger GroupNorm"}, results["skipped"]
    assert all(row["peak_bytes"] > 0 for row in results["rows"])


@pytest.mark.parametrize("options", [{}, {"amp": "float16"}, {"channels_last": True}])
def test_memory_of_a_step(options):
    batch = make_batch(1, (64, 64), torch.device("cuda"))
    saved = {}
    for norm in ("GN", "GN+WS"):
        it = trainee(norm, **options)
        with fixed_heads(it.model, batch):
            it.step(batch)
            memory = it.memory(batch)
            profiled = it.kernels(batch)
        saved[norm] = memory["saved_bytes"]
        assert memory["peak_bytes"] > it.state_bytes() + memory["saved_bytes"] * 0.9
        assert profiled["kernels"] > 100 and profiled["kernels_ms"] > 0
    filters = sum(c.weight.numel() for c in it.standardized_convolutions())
    assert it.standardize() > 0
    if "amp" not in options:  # the standardized filters are made again as they are needed
        assert 0 <= saved["GN+WS"] - saved["GN"] <= 0.05 * 4 * filters


def test_largest_batch():
    device = torch.device("cuda")
    found = [
        _largest_batch(lambda: trainee("GN"), (256, 256), gib, "GN", progress=False)
        for gib in (0.3, 0.6)
    ]
    assert found[0] < found[1]
    torch.empty(2**30, dtype=torch.uint8, device=device)  # the limit is gone
