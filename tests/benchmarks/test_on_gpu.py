"""What the benchmarks do on a GPU only: python -m pytest -m gpu"""

import pytest
import torch

from benchmarks.layers import CONTENDERS, DTYPES, MEMORY_FORMATS, benchmark_layers
from benchmarks.measure import KernelClock, copy_bandwidth
from benchmarks.train import Trainee, benchmark_train, config, fixed_heads, make_batch

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SMALL = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30"]


def test_clock():
    x = torch.ones(1000, device=GPU)
    result, elapsed, host = KernelClock(GPU)(lambda: x + 1)
    assert result.eq(2).all() and elapsed > 0 and host > 0
    assert copy_bandwidth(GPU, mebibytes=64, repetitions=3) > 0


def test_layers():
    results = benchmark_layers(
        {"a": (1, 64, 20, 30), "b": (4, 64, 7, 7)},
        device=GPU,
        repetitions=2,
        warmup=1,
        copy_mebibytes=16,
        progress=False,
    )
    cases = 2 * len(DTYPES) * len(MEMORY_FORMATS)
    assert len(results["rows"]) == cases * (len(CONTENDERS) - 1)  # all but the compiled one
    assert all(row["peak_bytes"] > 0 for row in results["rows"])


@pytest.mark.parametrize("options", [{}, {"amp": "float16"}, {"channels_last": True}])
def test_steps(options):
    rows = benchmark_train(
        "R-18-FPN",
        ["GN", "BCN+WS"],
        device=GPU,
        sizes=[(64, 64)],
        opts=SMALL,
        repetitions=2,
        warmup=1,
        progress=False,
        **options,
    )["rows"]
    for row in rows:
        assert 0 < row["kernels_ms"] and 0 < row["saved_bytes"] < row["peak_bytes"]


def test_memory_is_that_of_the_allocator():
    batch = make_batch(1, (64, 64), GPU)
    it = Trainee(config("R-18-FPN", "GN", GPU, SMALL))
    with fixed_heads(it.model, [batch]):
        it.step(batch)
        memory = it.memory(batch)
    assert memory["peak_bytes"] > it.state_bytes() + memory["saved_bytes"] * 0.9
