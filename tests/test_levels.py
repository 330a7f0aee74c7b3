"""Heads that are shared between feature levels and that are not Detectron2's."""

from collections import OrderedDict

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2_models import logged, randomize_norms
from test_stock_components import dense_head, flat, pyramid
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from wsbcn_d2 import BatchChannelNorm, convert, fold, get_norm, separate_levels
from wsbcn_d2.engine.hooks import NoticeSharedLayers

C = 8
OPTION = "BCN(groups=2, update_rate=1)+WS"


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


class Head(nn.Module):
    """As those of AdelaiDet's FCOS and of CenterNet2; or, without scales, of SOLOv2."""

    def __init__(self, norm, levels, scales=True):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), norm(C), nn.ReLU())
        self.logits = nn.Conv2d(C, 2, 3, padding=1)
        if scales:
            self.scales = nn.ModuleList([Scale() for _ in range(levels)])

    def forward(self, features):
        return [self.logits(self.tower(x)) for x in features]


def features(levels=3):
    """Each level with statistics of its own."""
    sizes = [16, 8, 4, 2][:levels]
    return [torch.randn(2, C, s, s) * (i + 1) + i for i, s in enumerate(sizes)]


def assert_modes_agree(model, x):
    """With an update rate of 1, estimates are those of the last batch: fixed features give the
    same in training and in evaluation, level by level."""
    with torch.no_grad():
        for _ in range(2):  # the second time around the estimates of the first
            model.train()(x)
        expected = model(x)
        found = model.eval()(x)
    for y, z in zip(expected, found):
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)


def parent_of(head):
    """What a head joins, which is when it is complete."""
    parent = nn.Module()
    parent.head = head
    return parent.head


BUILD = {
    "by string": lambda: parent_of(Head(lambda c: get_norm(OPTION, c), 3)),
    "by convert": lambda: convert(Head(nn.BatchNorm2d, 3), OPTION),
    "by example": lambda: convert(
        Head(nn.BatchNorm2d, 3, scales=False), OPTION, example_inputs=(features(),)
    ),
    "by call": lambda: separate_levels(
        Head(lambda c: get_norm(OPTION, c), 3, scales=False), num_levels=3
    ),
}


@pytest.mark.parametrize("how", BUILD)
def test_levels_have_estimates_of_their_own(how):
    head = BUILD[how]()
    assert head.tower[1].num_levels == 3
    x = features()
    assert_modes_agree(head, x)
    expected = [y.detach() for y in head.eval()(x)]
    with pytest.raises(RuntimeError):  # a pass that ends halfway
        head([x[0], torch.randn(1, 3, 4, 4)])
    for y, z in zip(expected, head(x)):
        torch.testing.assert_close(z.detach(), y)
    for y, z in zip(expected, fold(head)(x)):
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)


def test_statistics_are_carried_to_all_levels():
    head = Head(nn.BatchNorm2d, 3)
    head.tower[1].running_mean.normal_()
    mean = head.tower[1].running_mean.clone()
    convert(head, OPTION)
    assert torch.equal(head.tower[1].running_mean, mean.expand(3, -1))


class Backbone(nn.Module):
    out_channels = 32

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3, 4, 1), nn.BatchNorm2d(32)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return OrderedDict((str(i), nn.functional.max_pool2d(x, 2**i)) for i in range(3))


def test_detectors_of_torchvision():
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    model = FCOS(Backbone(), 2, anchor_generator=anchors, min_size=64, max_size=64)
    convert(model, "BCN(groups=2, update_rate=1)+WS")
    norms = [m for m in model.head.modules() if isinstance(m, BatchChannelNorm)]
    assert len(norms) == 8 and {norm.num_levels for norm in norms} == {3}
    assert model.backbone.bn.num_levels == 1
    x = list(model.backbone(torch.randn(2, 3, 64, 64)).values())
    with torch.no_grad():
        expected = model.head(x)
        found = model.head.eval()(x)
    for key, y in expected.items():
        torch.testing.assert_close(found[key], y, rtol=1e-4, atol=1e-4)


def test_errors():
    head = Head(nn.BatchNorm2d, 3)
    with pytest.raises(ValueError, match="Head: expected BCN layers .* 4 levels, found no BCN"):
        separate_levels(head, 4)
    convert(head, OPTION)
    with pytest.raises(ValueError, match="Head: .*for 1 or 4 levels, found 3"):
        separate_levels(head, 4)
    assert head.tower[1].num_levels == 3


def test_head_of_retinanet_can_be_scripted():
    head = randomize_norms(dense_head(RetinaNetHead, "BCN(groups=8)", num_anchors=2)).eval()
    scripted, x = torch.jit.script(head), pyramid()
    with torch.no_grad():
        expected = flat(head(x))
        for _ in range(2):
            for y, z in zip(expected, flat(scripted(x))):
                torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)


class Detector(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return {"loss": sum(y.square().mean() for y in self.head(x))}


def test_training_says_that_levels_share_estimates():
    def train(head):
        model = Detector(head)
        trainer = SimpleTrainer(
            model, [features(), features()], torch.optim.SGD(model.parameters(), 1e-3)
        )
        trainer.register_hooks([NoticeSharedLayers(model)])
        with logged("detectron2.wsbcn_d2") as messages:
            trainer.train(0, 2)
        assert not model._forward_pre_hooks
        return [m for m in messages if "separate_levels" in m]

    head = Head(lambda c: get_norm(OPTION, c), 3, scales=False)
    (message,) = train(head)
    assert "1 BCN layers are called for several feature levels" in message
    assert "(head.tower.1)" in message and not head.tower[1]._forward_pre_hooks
    assert not train(separate_levels(head, 3))
