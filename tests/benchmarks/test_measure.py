import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from benchmarks.measure import (
    LiveBytes,
    copy_bandwidth,
    interleaved,
    saved_bytes,
    spread,
    wall_time,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 30])
def test_median_and_quartiles(count):
    values = np.random.default_rng(count).exponential(size=count)
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    result = spread(list(values))
    assert result == pytest.approx({"median": median, "q1": q1, "q3": q3}, rel=1e-12)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_memory_is_kept():
    """Page faults of 40 tensors of 64 MiB, one after the other, in a process of its own."""
    program = """
import resource
import torch
from benchmarks.measure import keep_freed_memory

keep_freed_memory()
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert faults < 20 * 16384  # by default each tensor has so many new pages


def test_contenders_take_turns():
    log = []

    def contender(name):
        def run():
            log.append(name)
            return {"a": len(log), "b": -len(log)}

        return run

    names = ["x", "y", "z"]
    calls = []
    runs = {name: contender(name) for name in names}
    times = interleaved(runs, repetitions=6, warmup=2, on_run=lambda: calls.append(0))
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 8 and all(sorted(r) == names for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # not always in the same order
    assert len(calls) == len(log)
    for name in names:  # every time belongs to its contender and, of the last 6 rounds, in order
        expected = [i + 1 for i, n in enumerate(log) if n == name][2:]
        assert times[name] == {"a": expected, "b": [-i for i in expected]}

    again = log.copy()
    log.clear()
    interleaved(runs, repetitions=6, warmup=2)
    assert log == again


def test_the_time_is_that_of_the_call(monkeypatch):
    ticks = iter([10.0, 10.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    assert wall_time(lambda: "result", CPU) == ("result", 500.0)


def test_copy_bandwidth(monkeypatch):
    class Clock:
        times = iter([100.0, 100.0, 4.0, 1.0, 2.0])  # milliseconds, two of them for warming up

        def __init__(self, device):
            pass

        def __call__(self, function):
            copied = function()
            assert copied.numel() * copied.element_size() == 3 * 2**20 and copied.min() == 1
            return copied, next(self.times), 0.0

    monkeypatch.setattr(measure, "KernelClock", Clock)
    # 3 MiB are read and 3 MiB are written in 2 ms
    assert copy_bandwidth(CPU, mebibytes=3, repetitions=3) == 6 * 2**20 / 0.002


class TestSavedBytes:
    def test_by_hand(self):
        a = torch.ones(10, 100, requires_grad=True)
        b = torch.ones(100, requires_grad=True)
        # mul saves both factors, exp its result
        assert saved_bytes(lambda: (a * b).exp()) == 4 * (1000 + 100 + 1000)
        assert saved_bytes(lambda: (a * b).exp(), parameters=[b]) == 4 * (1000 + 1000)

    def test_a_storage_counts_once_and_in_full(self):
        a = torch.ones(10, 100, requires_grad=True)
        assert saved_bytes(lambda: (a.sin(), a.view(-1).cos())) == 4 * 1000
        assert saved_bytes(lambda: a[0].sin()) == 4 * 1000

    def test_nothing_without_gradients(self):
        a = torch.ones(10)
        assert saved_bytes(lambda: a.sin() * a) == 0

    def test_group_norm(self):
        norm = nn.GroupNorm(32, 64)
        x = torch.randn(2, 64, 5, 7, requires_grad=True)
        # its input, and mean and rstd of each image and group
        expected = 4 * (x.numel() + 2 * 2 * 32)
        assert saved_bytes(lambda: norm(x), norm.parameters()) == expected


class TestLiveBytes:
    def test_by_hand(self):
        before = torch.ones(1000)
        with LiveBytes() as live:
            assert live.current == 0
            a = before + 1
            assert live.current == 4000
            a.mul_(2)
            view = a.view(10, 100)[3:]
            before.add_(1)
            other = before.view(-1)
            assert live.current == 4000
            b = a.double()
            assert live.current == live.peak == 12000
            del a
            assert live.current == 12000  # its memory is also that of the view
            del view
            assert live.current == 8000
            del b, other
            assert (live.current, live.peak) == (0, 12000)

    def test_what_only_autograd_holds(self):
        x = torch.ones(1000, requires_grad=True)
        with LiveBytes() as live:
            y = x.exp().sin().sum()
            # exp's result, which is also the input of sin, and the sum
            assert live.current == 4004
            y.backward()
            del y
            assert live.current == 4000  # the gradient
            assert live.peak >= 8004  # with what it came from
        x.grad = None
        assert live.current == 0

    def test_checkpointing(self):
        x = torch.ones(1000, requires_grad=True)
        with LiveBytes() as live:
            y = checkpoint(lambda x: (x.exp().sin() * 2).cos(), x * 1, use_reentrant=False)
            assert live.current == 8000  # input and output
            del y
        assert live.current == 0

    def test_convolutions_are_skipped(self):
        convolution = nn.Conv2d(3, 8, 3)
        x = torch.randn(2, 3, 10, 12)
        peaks = []
        for skip in (False, True):
            convolution.zero_grad()
            with LiveBytes(skip_convolutions=skip) as live:
                y = convolution(x).relu()
                y.sum().backward()
            peaks.append((live.peak, live.at_peak()))
            assert convolution.weight.grad.shape == convolution.weight.shape
            assert bool(y.any()) is not skip and bool(convolution.weight.grad.any()) is not skip
        assert peaks[0] == peaks[1]

    def test_what_is_there_at_the_peak(self):
        x = torch.ones(10, 100)
        with LiveBytes() as live:
            kept = [x + i for i in range(3)]
            large = x.repeat(10, 10)
            del large
            kept.append(x.exp())
        expected = {"aten.repeat.default 100x1000": 400000, "aten.add.Tensor 10x100": 12000}
        assert live.at_peak() == expected and sum(expected.values()) == live.peak
        assert live.at_peak(1) == {"aten.repeat.default 100x1000": 400000}
