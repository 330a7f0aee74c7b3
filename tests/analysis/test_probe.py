"""The probe against a quadratic, whose loss and gradient along the gradient are known."""

import copy

import numpy as np
import pytest
import torch
from detectron2_models import a_training_image, small_model
from torch import nn

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.analysis import probe_loss

RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
STEPS = (0.5, 1.0, 4.0)


class Quadratic(nn.Module):
    """The loss w'Aw / 2 + b'w, in two parts; the batch is (A, b)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 2, 4, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, batch):
        a, b = batch
        return {"loss_a": self.w @ a @ self.w / 2, "loss_b": b @ self.w}


def test_quadratic():
    generator = torch.Generator().manual_seed(0)
    model, batches = Quadratic(), []
    for _ in range(3):
        a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        batches.append((a @ a.T, torch.randn(4, generator=generator, dtype=torch.float64)))
    probe = probe_loss(model, batches, 0.1, steps=STEPS)
    w = model.w.detach()
    for i, (a, b) in enumerate(batches):
        g = a @ w + b
        np.testing.assert_allclose(probe.loss[i], w @ a @ w / 2 + b @ w)
        np.testing.assert_allclose(probe.gradient_norm[i], g.norm())
        for j, step in enumerate(STEPS):
            eta = 0.1 * step
            change = -eta * g @ g + eta**2 * g @ a @ g / 2
            np.testing.assert_allclose(probe.loss_change[i, j], change, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(probe.gradient_change[i, j], eta * (a @ g).norm())
        np.testing.assert_allclose(probe.smoothness[i], (a @ g).norm() / g.norm())
    np.testing.assert_allclose(probe.step_sizes, [0.05, 0.1, 0.4])
    np.testing.assert_allclose(probe.weight_norm, w.norm())


class Estimated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), BatchChannelNorm(8, 2)

    def forward(self, x):
        noise = torch.rand(())  # as sampling does
        return (self.norm(self.conv(x)).relu() * noise).square().mean()


def test_every_pass_starts_from_the_same_estimates_and_random_numbers():
    """A vanishing step gives a vanishing change."""
    torch.manual_seed(3)
    model = Estimated()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batches = [torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    probe = probe_loss(model, batches, 1e-30, steps=(1.0, 2.0))
    assert (probe.loss_change == 0).all() and (probe.gradient_change == 0).all()
    assert (probe.gradient_norm > 0).all()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.conv.weight.grad is None


def test_loss_of_a_detector_falls_as_its_gradient_says():
    """For small steps, by η‖g‖²; with newly sampled proposals it would jump instead."""
    model = small_model(RCNN, "GN", ROI_HEADS__BATCH_SIZE_PER_IMAGE=4).train()
    sample = type(model.roi_heads).label_and_sample_proposals
    probe = probe_loss(model, [[a_training_image(96)]], 1e-5, steps=(1.0, 2.0))
    expected = -probe.step_sizes * probe.gradient_norm[0] ** 2
    np.testing.assert_allclose(probe.loss_change[0], expected, rtol=0.1)
    assert model.roi_heads.label_and_sample_proposals.__func__ is sample


@pytest.mark.parametrize(
    "batches, rate, steps, message",
    [
        ([], 0.1, STEPS, r"batches \(0\)"),
        ([1], 0.1, (), r"steps \(0\)"),
        ([1], 0.0, STEPS, r"learning_rate \(0.0\)"),
        ([1], 0.1, (1.0, -1.0), "must be positive"),
    ],
)
def test_bad_arguments(batches, rate, steps, message):
    with pytest.raises(ValueError, match=message):
        probe_loss(Quadratic(), batches, rate, steps=steps)


def test_nothing_to_move():
    with pytest.raises(ValueError, match="no trainable parameters"):
        probe_loss(Quadratic().requires_grad_(False), [1], 0.1)
