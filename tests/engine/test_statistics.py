import copy
import random

import numpy as np
import pytest
import torch
from engine.small_models import TwoLayers, estimates, recalibrated, statistics_of
from torch import nn

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.engine import recalibrate_estimates, synchronize_estimates
from wsbcn_d2.engine.statistics import fixed_estimates, seeded_batches


def some_batches():
    return [torch.randn(1 + i, 3, 9 + i, 14 - i) * (i + 1) + i for i in range(3)]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_recalibration(rounds):
    """Against statistics taken layer by layer; the second layer's inputs are normalized with the
    first layer's estimates of the round before."""
    model, batches = TwoLayers(), some_batches()
    for batch in batches:
        model(batch)
    before = estimates(model)
    expected = recalibrated(model, batches, rounds)
    recalibrate_estimates(model, batches, rounds=rounds)
    for key, value in estimates(model).items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, before[key], rtol=1e-2)


def test_rounds_make_deep_layers_exact():
    """After as many rounds as layers, all have the statistics of what they are really given."""
    model, batches = TwoLayers(), some_batches()
    recalibrate_estimates(model, batches, rounds=2)
    seen = {}
    for name in ("norm1", "norm2"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, x, name=name: seen.setdefault(name, []).append(x[0])
        )
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for name, inputs in seen.items():
        mean, _ = statistics_of(inputs)
        var = statistics_of(inputs, mean)[1]
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-6)


class Noisy(nn.Module):
    """Whatever a forward pass in training mode may leave behind or depend on."""

    def __init__(self):
        super().__init__()
        self.norm = BatchChannelNorm(4, 2)
        self.levels = BatchChannelNorm(4, 2)
        self.levels.set_num_levels(3)
        self.frozen = BatchChannelNorm(4, 2).requires_grad_(False)
        self.unused = BatchChannelNorm(4, 2)
        self.empty = BatchChannelNorm(4, 2)
        self.batch_norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.average = 3.0

    def forward(self, x):
        self.average += float(x.mean())
        y = self.dropout(self.batch_norm(self.norm(self.frozen(x))))
        y = y + np.random.rand() + random.random()
        self.empty(x[:0])
        for level in range(3):
            self.levels(y * 10**level + level)
        return y


def test_recalibration_changes_nothing_else():
    model = Noisy()
    x = [torch.randn(2, 4, 5, 5) * 3 + 1 for _ in range(2)]
    model(x[0])
    model.norm.eval()
    before = copy.deepcopy(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    recalibrate_estimates(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    changed = {
        name
        for (name, new), (_, old) in zip(model.named_buffers(), before.named_buffers())
        if not torch.equal(new, old)
    }
    assert changed == {
        f"{layer}.{name}"
        for layer in ("norm", "levels")
        for name in ("running_mean", "running_var")
    }
    assert model.average == before.average
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())

    # again from the same state, under other random numbers: the same
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    recalibrate_estimates(before, x)
    torch.testing.assert_close(estimates(before), estimates(model), rtol=0, atol=0)
    # levels have those of their own inputs, which are ten times each other, plus one
    std = model.levels.running_var.sqrt()
    torch.testing.assert_close(std[1:], std[:2] * 10, rtol=0.2, atol=0.0)


def test_recalibration_skips_what_is_not_finite():
    layer = BatchChannelNorm(4, 2)
    x = [torch.randn(1, 4, 3, 3) + 5 for _ in range(3)]
    x[1][0, 0, 0, 0] = float("inf")
    recalibrate_estimates(layer, x)
    mean, _ = statistics_of([x[0], x[2]])
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    before = estimates(layer)
    recalibrate_estimates(layer, x[1:2])
    torch.testing.assert_close(estimates(layer), before, rtol=0, atol=0)


def test_recalibration_far_from_zero():
    """A variance of 1 around 10,000, starting from estimates of (0, 1)."""
    x = [torch.randn(2, 4, 20, 20) + 1e4 for _ in range(3)]
    layer = BatchChannelNorm(4, 2)
    recalibrate_estimates(layer, x)
    mean, _ = statistics_of(x)
    torch.testing.assert_close(
        layer.running_var.double(), statistics_of(x, mean)[1], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("rounds,batches", [(0, [torch.zeros(1, 4, 2, 2)]), (2, [])])
def test_recalibration_errors(rounds, batches):
    with pytest.raises(ValueError, match="must not be zero"):
        recalibrate_estimates(BatchChannelNorm(4, 2), batches, rounds=rounds)


def test_seeded_batches_are_the_same_at_every_call():
    def build_loader():
        offset = random.random()
        while True:
            yield torch.rand(2) + np.random.rand() + offset

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = seeded_batches(build_loader, 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert len(first) == 3
    torch.testing.assert_close(seeded_batches(build_loader, 3), first, rtol=0, atol=0)
    assert not torch.equal(seeded_batches(build_loader, 3, seed=1)[0], first[0])


def test_fixed_estimates_are_released_after_an_error():
    model = TwoLayers().train()
    model.norm2.eval()
    before = estimates(model)
    with pytest.raises(RuntimeError, match="stop"):
        with fixed_estimates(model):
            model(torch.randn(1, 3, 8, 8))
            raise RuntimeError("stop")
    torch.testing.assert_close(estimates(model), before, rtol=0, atol=0)
    assert model.norm1.training and not model.norm2.training


def test_synchronization_in_one_process_does_nothing():
    model = TwoLayers()
    model(torch.randn(1, 3, 8, 8))
    before = dict(copy.deepcopy(model).named_buffers())
    synchronize_estimates(model)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
