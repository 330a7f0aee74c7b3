"""Two processes (gloo, CPU): the estimates of all ranks are one, and nobody waits for ever."""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from engine.small_models import TwoLayers, estimates, moved, recalibrated
from engine.two_ranks import run_two_ranks
from oracles import channel_norm
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from demo.digits import make_digits_dataset
from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.engine import (
    Trainer,
    accumulate_gradients,
    load_config,
    recalibrate_estimates,
    synchronize_estimates,
)
from wsbcn_d2.engine.statistics import named_batch_channel_norms

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/Digits-InstanceSegmentation/mask_rcnn_R_18_FPN_bcn_ws.yaml"
SMALL = [
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "DATASETS.TEST", "()"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.DEVICE", "cpu"),
]


def test_two_ranks(tmp_path):
    folder = tmp_path / "datasets"
    make_digits_dataset(
        str(folder / "digits"), num_train=6, num_val=2, image_size=96, progress=False
    )
    output = run_two_ranks(__file__, tmp_path, DETECTRON2_DATASETS=str(folder))
    functions = [name for name in globals() if name.startswith("ranks_")]
    assert functions and all(f"{name}: passed" in output for name in functions)


def equal_on_all_ranks(tensors):
    mine, *others = comm.all_gather(tensors)
    return all(torch.equal(mine[key], other[key]) for other in others for key in mine)


class FourLayers(nn.Module):
    """Independent layers: two in a row, one shared by two levels, one on RoIs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), BatchChannelNorm(8, 2), nn.Conv2d(8, 8, 3))
        self.norm = BatchChannelNorm(8, 4, update_rate=0.3)
        self.shared = BatchChannelNorm(8, 2)
        self.shared.set_num_levels(2)
        self.rois = BatchChannelNorm(4, 2)

    def forward(self, image, rois):
        x = self.norm(self.stem(image))
        y = self.shared(x).sum() + self.shared(2 * x[:, :, ::2, ::2] + 1).sum()
        return y + self.rois(rois).sum()


def ranks_estimates_are_those_of_one_process(rank):
    model = FourLayers()
    recorded = []
    for name, layer in named_batch_channel_norms(model):
        layer.register_forward_pre_hook(
            lambda layer, x, name=name: recorded.append((name, layer.level, x[0].detach().clone()))
        )
    real, calls = dist.all_reduce, []

    def counted(*args, **kwargs):
        calls.append(args[0].numel())
        return real(*args, **kwargs)

    for iteration in range(5):
        before = {
            name: (norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in named_batch_channel_norms(model)
        }
        generator = torch.Generator().manual_seed(10 * iteration + rank)
        size = (1 + rank, 3, 12 + 5 * rank + iteration, 20 - 7 * rank)
        image = torch.randn(size, generator=generator) * (1 + rank) + rank
        rois = torch.randn((3 + 4 * rank, 4, 2, 2), generator=generator) - 5 * rank
        if (iteration, rank) in [(1, 0), (3, 0), (3, 1)]:
            rois = rois[:0]
        if (iteration, rank) == (2, 1):
            rois[0, 0, 0, 0] = float("nan")
        recorded.clear()
        model(image, rois).backward()
        mine = estimates(model)
        assert not equal_on_all_ranks(mine)

        dist.all_reduce = counted
        calls.clear()
        synchronize_estimates(model)
        dist.all_reduce = real
        # one call, for the means, variances and counts of everything
        assert calls == [sum(e.numel() for e in mine.values()) + 1 + 1 + 2 + 1]
        assert equal_on_all_ranks(estimates(model))
        assert all(m.seen_elements.sum() == 0 for _, m in named_batch_channel_norms(model))

        inputs = {}
        for others in comm.all_gather(recorded):
            for name, level, x in others:
                inputs.setdefault((name, level), [])
                if x.isfinite().all() and x.numel():
                    inputs[name, level].append(x)
        assert len(inputs) == 5
        for (name, level), xs in inputs.items():
            layer = model.get_submodule(name)
            levels = layer.num_levels > 1
            old = [e[level] if levels else e for e in before[name]]
            new = [e[level] if levels else e for e in (layer.running_mean, layer.running_var)]
            if not xs:
                assert (iteration, name) == (3, "rois")
                torch.testing.assert_close(new, old, rtol=0, atol=0)
                continue
            expected = [e.float() for e in moved(old, xs, layer.update_rate)]
            torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)
    assert model.rois.skipped_updates == rank  # rank 1 has seen one


def ranks_a_period_weighs_all_its_batches(rank):
    """To first order in the rate: every rank's batches count by their elements, not their number.

    With a rate of 1 the last batch of a rank is all that it knows, which makes it exact."""
    norm = BatchChannelNorm(4, 2, update_rate=1.0)
    for size in (2, 4):
        x = torch.full((1, 4, size, size * (1 + rank)), float(size + rank))
        norm(x)
    synchronize_estimates(norm)
    # rank 0 has seen 4 + 16 values and rank 1 twice as many
    torch.testing.assert_close(norm.running_mean, torch.full((4,), (4.0 + 2 * 5.0) / 3))


def ranks_a_large_variance_stays_finite(rank):
    """Times the number of values behind it, it is beyond float32."""
    norm = BatchChannelNorm(4, 2)
    norm.running_var.fill_(1e34)
    norm.seen_elements.fill_(1e6 * (1 + rank))
    synchronize_estimates(norm)
    torch.testing.assert_close(norm.running_var, torch.full((4,), 1e34))


def ranks_synchronized_layer_is_one_process_with_all_images(rank):
    synchronized_layer(rank, torch.float64, 1e-10)  # plain PyTorch
    synchronized_layer(rank, torch.float32, 1e-4)  # the kernels in C


def synchronized_layer(rank, dtype, tolerance):
    """Against the formulas in float64."""
    torch.manual_seed(0)
    norm = BatchChannelNorm(8, 2, mode="sync", update_rate=0.3).to(dtype)
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    cases = [
        [(3, 8, 6, 5), (3, 8, 6, 5)],
        [(3, 8, 6, 5), (1, 8, 4, 9)],
        [(0, 8, 5, 5), (2, 8, 5, 5)],
        [(2, 8, 1, 7), (0, 8, 1, 7)],
    ]
    for case in cases:
        mean, var = (t.double().clone() for t in (norm.running_mean, norm.running_var))
        xs = [(torch.randn(s).double() * (i + 1) + i).requires_grad_() for i, s in enumerate(case)]
        dys = [torch.randn(s).double() for s in case]
        # the formulas, with autograd through the statistics of all values
        leaves = [p.detach().double().clone().requires_grad_() for p in norm.parameters()]
        weight, bias, group_weight, group_bias = (p.view(1, -1, 1, 1) for p in leaves)
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], dim=1)
        mu, s2 = values.mean(1), values.var(1, unbiased=False)
        loss, ys = 0.0, []
        for x, dy in zip(xs, dys):
            z = weight * (x - mu.view(1, -1, 1, 1)) / (s2 + norm.eps).sqrt().view(1, -1, 1, 1)
            ys.append(channel_norm(z + bias, leaves[2], leaves[3], norm.eps) if len(x) else z)
            loss = loss + (ys[-1] * dy).sum()
        expected = torch.autograd.grad(loss, [xs[rank], *leaves])

        x = xs[rank].detach().to(dtype).requires_grad_()
        y = norm(x)
        got = torch.autograd.grad((y * dys[rank]).sum(), [x, *norm.parameters()])
        close = dict(rtol=tolerance, atol=tolerance, check_dtype=False)
        torch.testing.assert_close(y, ys[rank], **close)
        torch.testing.assert_close(got[0], expected[0], **close)
        for mine, theirs in zip(got[1:], expected[1:]):
            mine = mine.clone()
            dist.all_reduce(mine)  # a rank has the gradient of its own loss
            torch.testing.assert_close(mine, theirs, **close)
        unbiased = values.var(1, unbiased=True)
        torch.testing.assert_close(norm.running_mean, mean + 0.3 * (mu - mean), **close)
        torch.testing.assert_close(norm.running_var, var + 0.3 * (unbiased - var), **close)
        assert equal_on_all_ranks(estimates(norm))

    before = estimates(norm)
    x = torch.zeros(0, 8, 4, 4, dtype=dtype, requires_grad=True)
    norm(x).sum().backward()
    torch.testing.assert_close(estimates(norm), before, rtol=0, atol=0)
    assert all(p.grad.isfinite().all() for p in norm.parameters())
    norm.eval()  # no collective: a rank may evaluate alone
    if rank == 0:
        norm(torch.randn(1, 8, 3, 3, dtype=dtype))


def ranks_recalibrate_with_unequal_shares(rank):
    model = TwoLayers()
    batches = [torch.randn(1 + i, 3, 9 + i, 14 - i) * (i + 1) for i in range(4)]
    expected = {k: v.float() for k, v in recalibrated(model, batches, rounds=2).items()}
    recalibrate_estimates(model, batches[:3] if rank == 0 else batches[3:])
    torch.testing.assert_close(estimates(model), expected, rtol=1e-5, atol=1e-6)
    assert equal_on_all_ranks(estimates(model))


def ranks_accumulation_reduces_gradients_once(rank):
    def group_norm(channels):
        return nn.GroupNorm(2, channels)

    torch.manual_seed(0)
    reference = TwoLayers(group_norm)
    model = DistributedDataParallel(copy.deepcopy(reference), broadcast_buffers=False)
    reductions = []

    def counting_hook(state, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counting_hook)
    images = torch.randn(12, 1, 3, 10, 10)
    mine = iter(images[rank::2])
    trainer = nn.Module()  # anything that delegates its steps
    trainer._trainer = SimpleTrainer(model, mine, torch.optim.SGD(model.parameters(), 0.1))
    accumulate_gradients(trainer, 3)
    whole = [images[:6].flatten(0, 1), images[6:].flatten(0, 1)]
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)

    class Compare(HookBase):
        def after_step(self):
            assert reductions == [0]
            reductions.clear()
            optimizer.zero_grad()
            sum(reference(whole[self.trainer.iter]).values()).backward()
            optimizer.step()
            torch.testing.assert_close(
                dict(model.module.named_parameters()), dict(reference.named_parameters())
            )

    trainer._trainer.register_hooks([Compare()])
    trainer._trainer.train(0, 2)


class GatherEstimates(HookBase):
    """After every iteration, whether all ranks have the same estimates."""

    def __init__(self):
        self.equal = []

    def after_step(self):
        self.equal.append(equal_on_all_ranks(estimates(self.trainer.model)))


def ranks_trainer_keeps_estimates_equal(rank):
    opts = [*SMALL, "OUTPUT_DIR", "out", "TEST.PRECISE_BCN.ENABLED", "True"]
    cfg = load_config(str(CONFIG), opts + ["TEST.PRECISE_BCN.NUM_IMAGES", "4"])
    torch.manual_seed(rank)  # DDP makes the weights equal
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = Trainer(cfg)
    check = GatherEstimates()
    trainer.register_hooks([check])
    trainer.train()
    assert check.equal == [True] * 3

    # what rank 0 has saved is what every rank has, and computes the same there
    comm.synchronize()
    loaded = build_model(cfg)
    DetectionCheckpointer(loaded).load("out/model_final.pth")
    torch.testing.assert_close(estimates(loaded), estimates(trainer.model.module), rtol=0, atol=0)
    image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0)) * 255
    outputs = []
    for model in (loaded, trainer.model.module):
        model.roi_heads.box_predictor.test_score_thresh = 0.0
        with torch.no_grad():
            instances = model.eval()([{"image": image}])[0]["instances"]
        assert len(instances)
        outputs.append({"boxes": instances.pred_boxes.tensor, "masks": instances.pred_masks})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert equal_on_all_ranks(outputs[0])


def ranks_trainer_checkpoints_activations(rank):
    """The estimates and weights are those without it."""
    results = []
    for what in ("", "all"):
        opts = ["MODEL.WSBCN.CHECKPOINT_ACTIVATIONS", what, "SOLVER.MAX_ITER", "2"]
        cfg = load_config(str(CONFIG), [*SMALL, "OUTPUT_DIR", f"out{what}", "SEED", "1", *opts])
        seed_all_rng(1)
        trainer = Trainer(cfg)
        model = trainer.model.module
        assert (type(model.backbone).__name__ == "CheckpointedFPN") == bool(what)
        trainer.train()
        results.append({**estimates(model), **dict(model.named_parameters())})
    assert equal_on_all_ranks({k: v.detach() for k, v in results[1].items()})
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


def ranks_trainer_period(rank):
    for period, expected in ((0, [False, False, False]), (100, [False, True, True])):
        # with a long period, still before a checkpoint (every 2) and at the end
        opts = [*SMALL, "OUTPUT_DIR", f"out{period}", "MODEL.WSBCN.SYNC_PERIOD", str(period)]
        os.makedirs(opts[-3], exist_ok=True)
        trainer = Trainer(load_config(str(CONFIG), opts))
        check = GatherEstimates()
        trainer.register_hooks([check])
        trainer.train()
        assert check.equal == expected
