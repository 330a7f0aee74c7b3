"""Gradient accumulation against one step with all images at once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from detectron2_models import a_training_image, small_config, small_model
from engine.small_models import TwoLayers, estimates, tiny_config
from torch import nn

from wsbcn_d2.engine import accumulate_gradients
from wsbcn_d2.engine.hooks import StopOnSkippedUpdates


class Delegating:
    """All that a trainer needs here: it has its steps done by another."""

    def __init__(self, trainer):
        self._trainer = trainer


def accumulating(trainer, steps):
    accumulate_gradients(Delegating(trainer), steps)
    return trainer


def group_norm(channels):
    return nn.GroupNorm(2, channels)


class Losses(HookBase):
    """What has been logged of them. (Other scalars that a model logs are its last batch's.)"""

    def __init__(self, *also):
        self.also, self.values = also, []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.values.append({k: v for k, (v, _) in latest.items() if "loss" in k or k in self.also})


def compare(model, batches, whole, make_optimizer, iterations, **close):
    """`iterations` steps with one of `whole` each, and with all of `batches` in equal parts."""
    runs = []
    for data in (whole, batches):
        m = copy.deepcopy(model)
        trainer = SimpleTrainer(m, iter(data), make_optimizer(m))
        accumulating(trainer, len(data) // iterations)
        losses = Losses()
        trainer.register_hooks([losses])
        torch.manual_seed(0)
        trainer.train(0, iterations)
        runs.append((dict(m.named_parameters()), losses.values))
    assert len(runs[0][1]) == iterations and len(runs[0][1][0]) > 2  # the total and its parts
    torch.testing.assert_close(runs[1], runs[0], **close)
    moved = [not torch.equal(p, q) for p, q in zip(m.parameters(), model.parameters())]
    assert any(moved)


@pytest.mark.parametrize("clip", [None, "value", "norm"])
def test_same_step_as_all_images_at_once(clip, tmp_path):
    """Gradients are clipped once for each step, not for each batch."""
    cfg = tiny_config(tmp_path)
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    clipping.ENABLED, clipping.CLIP_TYPE = clip is not None, clip or "value"
    clipping.CLIP_VALUE = 0.02  # less than what there is
    images = torch.randn(6, 1, 3, 9, 9) * torch.arange(1, 7).view(6, 1, 1, 1, 1)
    whole = [images[:3].flatten(0, 1), images[3:].flatten(0, 1)]
    model = TwoLayers(group_norm)

    def make_optimizer(m):
        return build_optimizer(cfg, m)

    compare(model, images, whole, make_optimizer, 2, rtol=2e-6, atol=1e-6)


def test_mask_rcnn(monkeypatch):
    """As the docstring says: with as many samples, and as many of them foreground, in each image.

    All anchors and all proposals are samples, so none is drawn at random, and only the object
    itself, which is appended to the proposals, is close enough to the object to be foreground.
    Activations are smooth: at the kink of a ReLU the order of summation would choose between two
    gradients.
    """
    monkeypatch.setattr(F, "relu_", F.gelu)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.gelu(x))
    model = small_model(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "GN",
        RPN__BATCH_SIZE_PER_IMAGE=100000,
        ROI_HEADS__BATCH_SIZE_PER_IMAGE=512,
        ROI_HEADS__POSITIVE_FRACTION=0.9,
        ROI_HEADS__IOU_THRESHOLDS=[0.999],
        RPN__POST_NMS_TOPK_TRAIN=10,
    )
    images = [a_training_image() for _ in range(3)]

    def make_optimizer(m):
        return torch.optim.SGD(m.parameters(), 1.0)

    compare(model, [[i] for i in images], [images], make_optimizer, 1, rtol=1e-4, atol=2e-5)


def test_estimates_move_with_every_batch():
    model = TwoLayers()
    other = copy.deepcopy(model)
    images = torch.randn(3, 1, 3, 9, 9)
    trainer = SimpleTrainer(model, iter(images), torch.optim.SGD(model.parameters(), 0.1))
    accumulating(trainer, 3).train(0, 1)
    for image in images:
        other(image)
    torch.testing.assert_close(estimates(model), estimates(other), rtol=0, atol=0)


class StockTrainer(DefaultTrainer):
    """Somebody else's."""

    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(0)
        return TwoLayers(group_norm)

    @classmethod
    def build_train_loader(cls, cfg):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(1, 3, 9, 9, generator=generator)


def test_default_trainer_counts_steps(tmp_path):
    """The schedule, the checkpoints and what is drawn from the loader."""
    cfg = tiny_config(tmp_path, "SOLVER.STEPS", "(2,)", "SOLVER.WARMUP_ITERS", "0")
    rates = {}
    for steps in (1, 3):
        cfg.OUTPUT_DIR = str(tmp_path / str(steps))
        trainer = StockTrainer(cfg)
        accumulate_gradients(trainer, steps)
        losses = Losses("lr")
        trainer.register_hooks([losses])
        trainer.train()
        rates[steps] = [values["lr"] for values in losses.values]
        assert (tmp_path / str(steps) / "model_0000001.pth").exists()
    assert rates[3] == rates[1] == pytest.approx([0.02, 0.02, 0.002, 0.002])
    left = next(trainer._trainer._data_loader_iter)
    loader = StockTrainer.build_train_loader(cfg)
    drawn = [next(loader) for _ in range(13)]
    assert torch.equal(left, drawn[12])  # 4 steps of 3 batches before it

    # and it resumes
    cfg.SOLVER.MAX_ITER = 5
    trainer = StockTrainer(cfg)
    accumulate_gradients(trainer, 3)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    trainer.train()


def test_a_tensor_as_loss_and_a_loss_that_is_not_always_there():
    class Sometimes(TwoLayers):
        def forward(self, x):
            losses = super().forward(x)
            return losses if x.sum() > 0 else {"loss_first": losses["loss_first"]}

    images = [torch.ones(1, 3, 9, 9), -torch.ones(1, 3, 9, 9)]
    model = Sometimes(group_norm)
    with EventStorage():
        values = [model(x) for x in images]
    trainer = SimpleTrainer(model, iter(images), torch.optim.SGD(model.parameters(), 0.0))
    losses = Losses()
    accumulating(trainer, 2).register_hooks([losses])
    trainer.train(0, 1)
    assert losses.values[0]["loss_first"] == pytest.approx(
        sum(v["loss_first"].item() for v in values) / 2
    )
    assert losses.values[0]["loss_second"] == pytest.approx(values[0]["loss_second"].item() / 2)

    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1), nn.Flatten(0))
    data = torch.randn(2, 1, 3, 1, 1)
    expected = (model(data[0]) + model(data[1])).item() / 2
    mean = nn.Sequential(model, _Mean())
    trainer = SimpleTrainer(mean, iter(data), torch.optim.SGD(mean.parameters(), 0.0))
    losses = Losses()
    accumulating(trainer, 2).register_hooks([losses])
    trainer.train(0, 1)
    assert losses.values[0]["total_loss"] == pytest.approx(expected)


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean()


def amp_trainer(model, data, precision, lr=0.1, gather_metric_period=1, **scaler):
    return AMPTrainer(
        model,
        iter(data),
        torch.optim.SGD(model.parameters(), lr),
        gather_metric_period=gather_metric_period,
        grad_scaler=torch.amp.GradScaler("cpu", **scaler),
        precision=precision,
    )


@pytest.mark.parametrize("precision,scale", [(torch.bfloat16, 1.0), (torch.float16, 64.0)])
def test_mixed_precision(precision, scale):
    """The step is that of the same losses in mixed precision, scaled and summed by hand."""
    model = TwoLayers(group_norm)
    other = copy.deepcopy(model)
    images = torch.randn(2, 1, 3, 9, 9)
    trainer = amp_trainer(model, images, precision, enabled=scale != 1.0, init_scale=scale)
    accumulating(trainer, 2).train(0, 1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for image in images:
        with torch.autocast("cpu", dtype=precision):
            assert other.conv1(image).dtype == precision
            loss = sum(other(image).values())
        (loss * scale / 2).backward()
    for p in other.parameters():
        p.grad /= scale
    optimizer.step()
    torch.testing.assert_close(
        dict(model.named_parameters()), dict(other.named_parameters()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6])
def test_overflow_leaves_weights_and_estimates(value):
    """1e6 is infinity in float16, which the first convolution makes of it."""
    model = TwoLayers()
    good = torch.randn(1, 3, 9, 9)
    bad = good.clone()
    bad[0, 0, 4, 4] = value
    trainer = amp_trainer(model, [good, good, bad, bad, good, good], torch.float16)
    snapshots = []

    class Snapshot(HookBase):
        def after_step(self):
            state = {k: v.clone() for k, v in model.state_dict().items()}
            snapshots.append((state, self.trainer.grad_scaler.get_scale()))

    trainer.register_hooks([Snapshot(), StopOnSkippedUpdates(model, 2)])
    accumulating(trainer, 2).train(0, 3)
    (first, scale), (second, lower), (third, _) = snapshots
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert lower == scale / 2
    assert all(not torch.equal(third[k], first[k]) for k in third)
    assert all(v.isfinite().all() for v in third.values())
    assert [m.skipped_updates.item() for m in (model.norm1, model.norm2)] == [2, 2]
    assert all(e.dtype == torch.float32 for e in estimates(model).values())


def test_stops_naming_the_first_layer_after_overflows_in_a_row():
    model = TwoLayers()
    with torch.no_grad():
        model.conv2.weight.mul_(1e6)  # the first layer is fine
    trainer = amp_trainer(model, torch.randn(20, 1, 3, 9, 9), torch.float16)
    trainer.register_hooks([StopOnSkippedUpdates(model, 3)])
    with pytest.raises(FloatingPointError, match="input of norm2 .*last 3 .*up to iteration 2"):
        accumulating(trainer, 2).train(0, 10)
    assert model.norm1.skipped_updates == 0
    assert model.norm2.skipped_updates == 6


class OverflowingLoss(TwoLayers):
    """Its losses are infinite, its layers' inputs are not, from the third batch to the ``last``."""

    batches, last = 0, 0

    def forward(self, image):
        self.batches += 1
        factor = float("inf") if 3 <= self.batches <= self.last else 1.0
        return {name: loss * factor for name, loss in super().forward(image).items()}


@pytest.mark.parametrize("period", [1, 2, 20])
def test_infinite_losses_are_skipped_and_stop_after_some_in_a_row(period):
    """However seldom Detectron2 looks at the losses. Two batches are a step: AMPTrainer's own step
    refuses to run on the CPU."""
    options = {"init_scale": 64.0, "gather_metric_period": period}
    model = OverflowingLoss()
    model.last = 6
    trainer = amp_trainer(model, torch.randn(12, 1, 3, 9, 9), torch.bfloat16, **options)
    written = trainer._write_metrics
    trainer.register_hooks([StopOnSkippedUpdates(model, 3)])
    accumulating(trainer, 2).train(0, 6)
    assert trainer.grad_scaler.get_scale() == 16  # halved for each
    assert all(p.isfinite().all() for p in model.parameters())
    assert trainer._write_metrics == written  # the hook has left

    model = OverflowingLoss()
    model.last = 99
    trainer = amp_trainer(model, torch.randn(20, 1, 3, 9, 9), torch.bfloat16, **options)
    trainer.register_hooks([StopOnSkippedUpdates(model, 3)])
    with pytest.raises(FloatingPointError, match="loss has been .* last 3 iter.* iteration 3"):
        accumulating(trainer, 2).train(0, 10)
    assert model.batches == 8  # a good step, and three


def test_detectron2_stops_where_nothing_skips_the_step():
    model = OverflowingLoss()
    model.last = 9
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = SimpleTrainer(model, torch.randn(9, 1, 3, 9, 9), optimizer)
    trainer.register_hooks([StopOnSkippedUpdates(model, 3)])
    with pytest.raises(FloatingPointError, match="(?i)loss became infinite or NaN"):
        trainer.train(0, 9)
    assert model.batches == 3


@pytest.mark.parametrize("steps", [0, -1, 2.0, "2", None])
def test_number_of_steps(steps):
    with pytest.raises(ValueError, match="must be a positive integer"):
        accumulate_gradients(None, steps)


def test_trainers_with_a_step_of_their_own():
    class Own(SimpleTrainer):
        def run_step(self):
            pass

    model = TwoLayers(group_norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="cannot accumulate gradients in a Own; allowed are Simple"):
        accumulating(Own(model, [], optimizer), 2)
    trainer = accumulating(SimpleTrainer(model, [], optimizer), 2)
    with pytest.raises(TypeError, match="_Accumulation"):
        accumulating(trainer, 2)


def test_retinanet_estimates_each_level_from_its_own_input():
    """The real thing: heads share their layers between five levels, two batches make a step."""
    cfg = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    model = small_model(cfg, "BCN+WS", BACKBONE__NAME="build_retinanet_resnet_fpn_backbone")
    assert small_config(cfg, "BCN").MODEL.RETINANET.NUM_CONVS == 2
    layer = model.head.cls_subnet[1]
    assert layer.num_levels == 5
    seen = []
    layer.register_forward_pre_hook(lambda m, x: seen.append((m.level, x[0].detach().double())))
    data = [[a_training_image(128)] for _ in range(2)]
    trainer = SimpleTrainer(model, iter(data), torch.optim.SGD(model.parameters(), 0.01))
    accumulating(trainer, 2).train(0, 1)
    assert [level for level, _ in seen] == [*range(5)] * 2
    for level in range(5):
        mean, var = torch.zeros(32).double(), torch.ones(32).double()
        for _, x in (s for s in seen if s[0] == level):
            batch, around = x.mean((0, 2, 3)), (x - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
            mean, var = mean + 0.1 * (batch - mean), var + 0.1 * (around - var)
        torch.testing.assert_close(layer.running_mean[level].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var[level].double(), var, rtol=1e-5, atol=1e-6)
