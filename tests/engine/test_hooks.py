import json
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase, SimpleTrainer
from detectron2_models import logged
from engine.small_models import TwoLayers, estimates, tiny_config
from torch import nn

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.engine import Trainer, accumulate_gradients, build_hooks, recalibrate_estimates
from wsbcn_d2.engine.hooks import StopOnSkippedUpdates, UpdateRateSchedule
from wsbcn_d2.engine.statistics import seeded_batches


class TinyTrainer(Trainer):
    """Our trainer on a model of milliseconds, whose data is a function of its place in the run."""

    first_batch = 0

    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(0)
        return TwoLayers()

    @classmethod
    def build_train_loader(cls, cfg):
        index = cls.first_batch
        while True:
            generator = torch.Generator().manual_seed(index)
            yield torch.randn(1, 3, 9, 9, generator=generator) * 2 + 1
            index += 1


class Record(HookBase):
    def __init__(self):
        self.rates, self.estimates = [], []

    def after_step(self):
        model = self.trainer.model
        self.rates.append((model.norm1.update_rate, model.norm2.update_rate))
        self.estimates.append(estimates(model))


def run(cfg, resume=False, first_batch=0):
    TinyTrainer.first_batch = first_batch
    trainer = TinyTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    record = Record()
    trainer.register_hooks([record])
    trainer.train()
    return trainer, record


@pytest.mark.parametrize(
    "schedule,warmup,expected",
    [
        # learning rate: linearly from 0.001 of the base to all of it in 2 iterations, then a tenth
        ("constant", False, [0.1, 0.1, 0.1, 0.1]),
        ("constant", True, [1.0, 0.5, 1 / 3, 0.25]),
        ("lr", False, [0.1 * 0.001, 0.1 * 0.5005, 0.1, 0.01]),
        ("lr", True, [1.0, 0.5, 1 / 3, 0.25]),
    ],
)
def test_update_rate_and_resume(tmp_path, schedule, warmup, expected):
    opts = ["MODEL.WSBCN.UPDATE_RATE_SCHEDULE", schedule]
    opts += ["MODEL.WSBCN.UPDATE_RATE_WARMUP", str(warmup)]
    trainer, whole = run(tiny_config(tmp_path / "whole", *opts))
    assert [rate for rate, _ in whole.rates] == pytest.approx(expected)
    assert trainer.model.norm1.update_rate == 0.1  # as before
    last = json.loads((tmp_path / "whole" / "metrics.json").read_text().splitlines()[-1])
    assert last["bcn_update_rate"] == pytest.approx(expected[-1])

    cfg = tiny_config(tmp_path / "parts", *opts)
    # stopped after 2 iterations; the checkpoint knows nothing of how long the run should be
    cfg.SOLVER.MAX_ITER = 2
    _, first = run(cfg)
    cfg.SOLVER.MAX_ITER = 4
    _, second = run(cfg, resume=True, first_batch=2)
    assert first.rates + second.rates == whole.rates
    parts = first.estimates + second.estimates
    torch.testing.assert_close(parts, whole.estimates, rtol=0, atol=0)


def test_rate_that_follows_a_learning_rate_of_0(tmp_path):
    """It is the rate of the layer, as it is wherever the learning rate is that of the config."""
    opts = ["MODEL.WSBCN.UPDATE_RATE_SCHEDULE", "lr", "SOLVER.BASE_LR", "0.0"]
    _, record = run(tiny_config(tmp_path, *opts))
    assert [rate for rate, _ in record.rates] == [0.1] * 4


@pytest.mark.parametrize("steps", [1, 3])
def test_warmup_is_a_plain_average(steps):
    """Of batches, not of iterations, with accumulation too; until 1 / t is below the rate."""
    norm = BatchChannelNorm(4, 2, update_rate=0.15)
    model = nn.Sequential(norm, nn.Flatten(0), nn.Linear(4 * 9, 1))
    batches = [torch.randn(1, 4, 3, 3) * 2 + 3 for _ in range(12)]
    trainer = nn.Module()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer._trainer = SimpleTrainer(model, iter(batches), optimizer)
    accumulate_gradients(trainer, steps)
    trainer._trainer.register_hooks(
        [UpdateRateSchedule(model, base_lr=0.1, warmup=True, batches_per_step=steps)]
    )
    trainer._trainer.train(0, 6 // steps)
    seen = torch.stack([b.double() for b in batches[:6]])
    mean = seen.mean((0, 1, 3, 4))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    # each variance is taken around the mean of the batches before, the first around 0
    around = torch.stack([seen[:t].sum((0, 1, 3, 4)) / (9 * max(t, 1)) for t in range(6)])
    var = (seen - around[:, None, :, None, None]).square().mean((0, 1, 3, 4))
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert norm.update_rate == 0.15 and not model._forward_pre_hooks
    # the seventh has a weight of 0.15, more than 1/7
    trainer._trainer.register_hooks([rates := _Rates(norm)])
    trainer._trainer.train(6 // steps, 6 // steps + 1)
    assert rates.values == [pytest.approx(0.15)]


class _Rates(HookBase):
    def __init__(self, norm):
        self.norm, self.values = norm, []

    def after_step(self):
        self.values.append(self.norm.update_rate)


def test_rate_follows_the_learning_rate_of_most_parameters(tmp_path):
    """Biases may have a higher one."""
    cfg = tiny_config(tmp_path, "MODEL.WSBCN.UPDATE_RATE_SCHEDULE", "lr")
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    _, record = run(cfg)
    assert [rate for rate, _ in record.rates] == pytest.approx([1e-4, 0.05005, 0.1, 0.01])


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown update rate schedule 'cosine'; allowed are cons"):
        UpdateRateSchedule(TwoLayers(), schedule="cosine", base_lr=1.0)


def test_recalibration_comes_before_saving(tmp_path):
    """With the same weights, the checkpoint has what recalibrating by hand gives."""
    plain, _ = run(tiny_config(tmp_path / "plain"))
    on = ["TEST.PRECISE_BCN.ENABLED", "True", "TEST.PRECISE_BCN.NUM_IMAGES", "5"]
    cfg = tiny_config(tmp_path / "recalibrated", *on, "SOLVER.IMS_PER_BATCH", "2")
    run(cfg)
    saved = torch.load(tmp_path / "recalibrated" / "model_final.pth", weights_only=True)["model"]
    for name, p in plain.model.named_parameters():
        assert torch.equal(p, saved[name])
    batches = seeded_batches(lambda: TinyTrainer.build_train_loader(cfg), 3)  # 5 images, rounded up
    assert not torch.equal(plain.model.norm1.running_mean, saved["norm1.running_mean"])
    recalibrate_estimates(plain.model, batches)
    for name, value in estimates(plain.model).items():
        assert torch.equal(value, saved[name])
    # the period is that of evaluation: the checkpoint of the second iteration is as in training
    other = torch.load(tmp_path / "recalibrated" / "model_0000001.pth", weights_only=True)["model"]
    plain = torch.load(tmp_path / "plain" / "model_0000001.pth", weights_only=True)["model"]
    assert torch.equal(other["norm1.running_mean"], plain["norm1.running_mean"])


class MixedTrainer(TinyTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.norm2 = nn.BatchNorm2d(4)
        return model


def test_precise_bn_leaves_the_estimates(tmp_path):
    saved = []
    for precise in ("False", "True"):
        opts = ("TEST.PRECISE_BN.ENABLED", precise, "TEST.PRECISE_BN.NUM_ITER", "3")
        MixedTrainer.first_batch = 0
        trainer = MixedTrainer(tiny_config(tmp_path / precise, *opts))
        trainer.train()
        assert not any("update_stats" in vars(hook) for hook in trainer._hooks)
        path = tmp_path / precise / "model_final.pth"
        saved.append(torch.load(path, weights_only=True)["model"])
    without, with_precise_bn = saved
    of_batch_norm = {f"norm2.{key}" for key in ("running_mean", "running_var")}
    for name, value in without.items():
        if name != "norm2.num_batches_tracked":
            assert torch.equal(value, with_precise_bn[name]) == (name not in of_batch_norm), name


class Branches(nn.Module):
    """A layer whose bad inputs are seen by nobody else."""

    def __init__(self):
        super().__init__()
        self.good, self.bad, self.worse = (BatchChannelNorm(4, 2) for _ in range(3))

    def forward(self, batch):
        x, broken = batch
        self.bad(x / 0 if broken else x)
        self.worse(x / 0 if broken else x)
        return {"loss": self.good(x).square().mean()}


def train_branches(broken, limit, steps=1):
    model = Branches()
    batches = ((torch.randn(1, 4, 3, 3), b) for b in broken)
    trainer = nn.Module()
    trainer._trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    accumulate_gradients(trainer, steps)
    trainer._trainer.register_hooks([StopOnSkippedUpdates(model, limit)])
    trainer._trainer.train(0, len(broken) // steps)
    return model


@pytest.mark.parametrize("good_before", range(6))
def test_stop_after_skipped_updates_in_a_row(good_before):
    """At the very iteration, wherever the row begins, and not one before."""
    broken = [False] * good_before + [True] * 3
    train_branches(broken, 4)
    train_branches(broken + [False] + broken, 4)
    message = f"input of bad has been .* last 4 iterations, up to iteration {good_before + 3}"
    with pytest.raises(FloatingPointError, match=message):
        train_branches(broken + [True] * 9, 4)


def test_do_not_stop_when_interleaved():
    model = train_branches([True, True, False] * 4, 3)
    assert model.bad.skipped_updates == 8 and model.good.skipped_updates == 0


def test_an_iteration_counts_once_with_accumulation():
    train_branches([True, True, True, False] + [False] * 4 + [True] * 4, 3, steps=4)
    with pytest.raises(FloatingPointError, match="up to iteration 2"):
        train_branches([False, True] * 6, 3, steps=2)


def test_skipped_updates_are_reported_at_the_end():
    with logged("detectron2.wsbcn_d2") as messages:
        train_branches([False, True, True, False], 3)
        train_branches([False] * 3, 3)
    (message,) = messages
    assert re.match(
        "2 of 3 BCN layers have skipped .*first of them is bad, with 2 batches", message
    )


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        StopOnSkippedUpdates(TwoLayers(), 0)


def test_config_without_our_keys(tmp_path):
    """As in a project that imports the package and says no more."""
    trainer, _ = run(tiny_config(tmp_path))
    with pytest.raises(KeyError, match=r"call wsbcn_d2.add_wsbcn_config\(cfg\) after get_cfg"):
        build_hooks(get_cfg(), trainer)
