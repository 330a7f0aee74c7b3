"""Heads that are shared between feature levels and that are not Detectron2's."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import get_norm as detectron2_get_norm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2_models import logged, randomize_norms
from test_stock_components import dense_head, flat, pyramid
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from wsbcn_d2 import BatchChannelNorm, convert, fold, get_norm, separate_levels

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


def test_branches_of_several_scales_share_nothing():
    """A list called `scales` has a factor for each level, or is something else."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)) for _ in range(3)
            )

    model = convert(nn.Sequential(Branches()), "BCN(groups=4)")
    norms = [m for m in model.modules() if isinstance(m, BatchChannelNorm)]
    assert [norm.num_levels for norm in norms] == [1, 1, 1]


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


def test_head_that_asks_for_more_norms():
    """Only the layer that RetinaNetHead looks at has one group."""

    class Head(RetinaNetHead):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.more = detectron2_get_norm("GN", 64)

    assert dense_head(Head, "GN(groups=8)", num_anchors=2).more.num_groups == 32


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


def noticed(train, *args):
    with logged("detectron2.wsbcn_d2") as messages:
        train(*args)
    return [m for m in messages if "separate_levels" in m]


def by_loop(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for batch in batches:
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()


def by_accumulation(model, batches):
    for batch in batches:
        model(batch)["loss"].backward()


def by_trainer(model, batches):
    SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), 1e-3)).train(0, len(batches))


def by_scaler(model, batches):
    scaler = torch.amp.GradScaler("cpu")
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)["loss"]
        scaler.scale(loss).backward()


def by_checkpointing(model, batches):
    for batch in batches:
        checkpoint(model, batch, use_reentrant=False)["loss"].backward()


TRAIN = [by_loop, by_accumulation, by_trainer, by_scaler, by_checkpointing]


@pytest.mark.parametrize("train", TRAIN)
def test_training_says_once_that_levels_share_estimates(train):
    model = Detector(convert(Head(nn.BatchNorm2d, 3, scales=False), OPTION))
    (message,) = noticed(train, model, [features(), features()])
    assert message.startswith("head.tower.1 is called for inputs of several sizes ((16, 16) and")
    assert not noticed(train, model, [features()])
    model = Detector(separate_levels(Head(lambda c: get_norm(OPTION, c), 3, scales=False), 3))
    assert not noticed(train, model, [features()])


def test_two_heads_are_one_message():
    heads = [Head(lambda c: get_norm(OPTION, c), 3, scales=False) for _ in range(2)]
    model = nn.ModuleDict({"a": Detector(heads[0]), "b": Detector(heads[1])})
    model.forward = lambda x: {"loss": model["a"](x)["loss"] + model["b"](x)["loss"]}
    (message,) = noticed(by_loop, model, [features(), features()])
    assert message.startswith("a.head.tower.1")


@pytest.mark.parametrize("train", TRAIN)
def test_images_of_several_sizes_are_no_levels(train):
    """Each batch has another, and the layer one call in each."""
    model = Detector(Head(lambda c: get_norm(OPTION, c), 3, scales=False))
    images = [[x] for x in features(4)]
    with torch.no_grad():  # recalibration, before a step
        [model(x) for x in images]
    [model.eval()(x) for x in images]
    assert not noticed(train, model.train(), images)
    # and not later on either
    assert model.head.tower[1].first_size is None
    model.head.requires_grad_(False)
    assert not noticed(model, [x.requires_grad_() for x in features()])


def test_compiled_and_copied_layers_are_as_before():
    model = Detector(Head(lambda c: get_norm(OPTION, c), 3, scales=False))
    by_loop(model, [features()])
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    norm = clone.head.tower[1]
    assert isinstance(norm, BatchChannelNorm) and norm.first_size is None
    x = torch.randn(2, C, 8, 8)
    torch.testing.assert_close(torch.jit.script(norm.eval())(x), norm(x))
    trained = BatchChannelNorm(C, 2)
    compiled = torch.compile(copy.deepcopy(trained), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), trained(x))


def test_replicas_say_nothing():
    """Those of DataParallel are new in each pass."""
    norm = BatchChannelNorm(C, 2)
    replica = copy.copy(norm)
    vars(replica)["_parameters"] = {name: p.clone() for name, p in norm.named_parameters()}
    assert not noticed(lambda: [replica(x) for x in features()])
    assert noticed(lambda: [norm(x) for x in features()])[0].startswith("BatchChannelNorm is")


class Calibrated(nn.Module):
    @property
    def scales(self):
        raise RuntimeError("not calibrated yet")


def test_properties_of_other_modules_are_not_looked_at():
    nn.Sequential(Calibrated())
    nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
