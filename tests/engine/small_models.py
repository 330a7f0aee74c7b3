"""A small model and config, and what the estimates should be."""

import copy

import torch
from detectron2.config import get_cfg
from torch import nn

from wsbcn_d2 import BatchChannelNorm, add_wsbcn_config
from wsbcn_d2.engine.statistics import named_batch_channel_norms


class TwoLayers(nn.Module):
    """conv, BCN, ReLU, conv, BCN; a dict of losses for a batch of images in training mode."""

    def __init__(self, norm=lambda c: BatchChannelNorm(c, 2)):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 4, 3), norm(4)
        self.predict = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        out = self.predict(x.square().mean((2, 3)))
        return {
            "loss_first": out[:, 0].square().mean(),
            "loss_second": (out[:, 1] - 1).abs().mean(),
        }


def tiny_config(folder, *opts):
    """For 4 iterations on CPU; the learning rate warms up over 2 and falls after 3."""
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder), "SOLVER.CHECKPOINT_PERIOD", "2"),
            *("SOLVER.BASE_LR", "0.02", "SOLVER.WARMUP_ITERS", "2", "SOLVER.STEPS", "(3,)"),
            *("SOLVER.MAX_ITER", "4", *opts),
        ]
    )
    folder.mkdir(exist_ok=True)
    return cfg


def estimates(model):
    """Copies of all estimates, by name."""
    return {
        f"{name}.{key}": getattr(layer, key).clone()
        for name, layer in named_batch_channel_norms(model)
        for key in ("running_mean", "running_var")
    }


def statistics_of(inputs, center=0.0):
    """Mean, and mean square around `center` (C,), of a list of (N, C, H, W) taken together."""
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    center = torch.as_tensor(center, dtype=torch.float64).reshape(-1, 1)
    return values.mean(1), ((values - center) ** 2).mean(1)


def moved(layer_estimates, inputs, rate):
    """The estimates (mean, var) after an update of estimated BCN with all of `inputs` at once."""
    mean, var = (e.double() for e in layer_estimates)
    batch_mean, batch_var = statistics_of(inputs, mean)
    return mean + rate * (batch_mean - mean), var + rate * (batch_var - var)


@torch.no_grad()
def recalibrated(model, batches, rounds):
    """What recalibrating a TwoLayers gives, layer by layer in float64."""
    model = copy.deepcopy(model).double().eval()
    for _ in range(rounds):
        first = [model.conv1(x.double()) for x in batches]
        second = [model.conv2(model.norm1(x).relu()) for x in first]
        for norm, inputs in ((model.norm1, first), (model.norm2, second)):
            mean, _ = statistics_of(inputs)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(statistics_of(inputs, mean)[1])
    return estimates(model)
