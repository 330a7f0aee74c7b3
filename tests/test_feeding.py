"""Which convolutions are standardized in the models of others, by norm strings and by convert."""

import copy
import functools

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d
from detectron2_models import logged, modules_of_type
from torch import nn

from wsbcn_d2 import BatchChannelNorm, WSConv2d, convert, get_norm, summarize
from wsbcn_d2.layers import WeightStandardized

LOGGER = "detectron2.wsbcn_d2"
OPTION = "GN(groups=2)+WS"
C = 8


class Block(nn.Module):
    """Parts under their names, and a forward pass that calls them in its own order."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def in_order(*names):
    def run(block, x):
        for name in names:
            x = getattr(block, name)(x)
        return x

    return run


def conv(inputs=C, outputs=C, **options):
    return nn.Conv2d(inputs, outputs, options.pop("kernel_size", 3), padding="same", **options)


def deep_stem(norm):
    stem = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, C))
    return Block(in_order("stem", "bn1"), stem=stem, bn1=norm(C))


def nested_sequences(norm):
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(conv(3, 3, groups=3), conv(3, C, kernel_size=1)))
    return nn.Sequential(inner, norm(C), conv())


def separable(norm):
    """As in segmentation_models_pytorch."""
    depthwise = nn.Sequential(conv(3, 3, groups=3), conv(3, C, kernel_size=1))
    return nn.Sequential(depthwise, nn.Sequential(norm(C), nn.ReLU()))


def leading_norm(norm):
    actf = nn.Sequential(norm(C), nn.ReLU())
    return Block(in_order("conv", "actf"), conv=conv(3), actf=actf)


def leading_norm_registered_first(norm):
    """As in CenterNet's DLA, where the convolution changes the number of channels."""
    actf = nn.Sequential(norm(C), nn.ReLU())
    return Block(in_order("conv", "actf"), actf=actf, conv=conv(3))


def norm_registered_first(norm):
    return Block(in_order("conv", "bn"), bn=norm(C), conv=conv(3))


def run_lists(block, x):
    x = block.first(x)
    for c, n in zip(block.convs, block.bns):
        x = n(c(x))
    return x


def parallel_lists(norm):
    """As in Res2Net."""
    convs = nn.ModuleList([conv(), nn.Sequential(nn.ReLU(), conv(C, 4))])
    bns = nn.ModuleList([norm(C), norm(4)])
    return Block(run_lists, first=conv(3), convs=convs, bns=bns)


def owned_and_unowned(norm):
    """A norm behind a convolution that has one of its own is not fed by it."""
    return nn.Sequential(Conv2d(3, C, 3, norm=norm(C)), nn.ReLU(), conv(), norm(C), conv())


STRUCTURES = {
    deep_stem: {"stem.2"},
    nested_sequences: {"0.1.1"},
    separable: {"0.1"},
    leading_norm: {"conv"},
    leading_norm_registered_first: {"conv"},
    norm_registered_first: {"conv"},
    parallel_lists: {"convs.0", "convs.1.1"},
    owned_and_unowned: {"0", "2"},
}


def standardized(model):
    return set(modules_of_type(model, WeightStandardized))


def plain(channels):
    return nn.GroupNorm(2, channels)


@pytest.mark.parametrize("build", STRUCTURES, ids=lambda build: build.__name__)
def test_found_by_the_structure(build):
    by_string = build(functools.partial(get_norm, OPTION))
    assert standardized(by_string) == STRUCTURES[build]
    model = build(plain)
    assert standardized(convert(model, OPTION)) == STRUCTURES[build]
    followed = convert(build(plain), OPTION, example_inputs=torch.randn(1, 3, 9, 9))
    assert standardized(followed) == STRUCTURES[build]
    model.load_state_dict(by_string.state_dict())
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(model(x), by_string(x))


def filled_lists(norm):
    """Lists that have a parent before they have modules."""
    block = Block(run_lists, first=conv(3), convs=nn.ModuleList(), bns=nn.ModuleList())
    for _ in range(2):
        block.convs.append(conv())
        block.bns.append(norm(C))
    return block


def test_lists_that_are_filled_later():
    """No hook can know the parent of a list, so the first call says what to do."""
    block = filled_lists(functools.partial(get_norm, OPTION))
    x = torch.randn(1, 3, 9, 9)
    for model in (block, copy.deepcopy(block)):
        assert not standardized(model)
        with pytest.raises(ValueError, match=r"GroupNorm asks for weight stand.*wsbcn_d2.convert"):
            model(x)
    for model in (block, filled_lists(plain)):
        assert standardized(convert(model, OPTION)) == {"convs.0", "convs.1"}
        model(x)


def convolutions_first(norm):
    return Block(
        lambda m, x: m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(x))))),
        **{"conv1": conv(3), "conv2": conv(), "bn1": norm(C), "bn2": norm(C), "relu": nn.ReLU()},
    )


def test_convolutions_first_and_norms_behind_them():
    """In the order in which many write them down."""
    x = torch.randn(1, 3, 9, 9)
    for kwargs in ({}, {"example_inputs": x}):
        model = convert(convolutions_first(plain), OPTION, **kwargs)
        assert standardized(model) == {"conv1", "conv2"}
        model(x)
    model = DOUBTFUL["more convolutions"](plain)
    with pytest.raises(
        ValueError, match="bn1: .* one of several layers behind 3 conv.*pairs={'bn1"
    ):
        convert(model, OPTION)
    convert(model, OPTION, pairs={"bn1": "a", "bn2": "c"})
    assert standardized(model) == {"a", "c"}


DOUBTFUL = {
    "convolutions first": convolutions_first,
    "more convolutions": lambda norm: Block(
        None, a=conv(), b=conv(), c=conv(), bn1=norm(C), bn2=norm(C)
    ),
    "same channels": lambda norm: Block(
        None, actf=nn.Sequential(norm(C), nn.ReLU()), conv=conv(C, C)
    ),
    "pre-activation": lambda norm: Block(None, norm=norm(C), relu=nn.ReLU(), conv=conv(C, 2 * C)),
    "other length": lambda norm: Block(
        None, convs=nn.ModuleList([conv(), conv()]), bns=nn.ModuleList([norm(C)])
    ),
    "other channels": lambda norm: nn.Sequential(conv(3, 4), norm(C)),
    "two lists": lambda norm: Block(
        None,
        a=nn.ModuleList([conv()]),
        b=nn.ModuleList([conv()]),
        bns=nn.ModuleList([norm(C)]),
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_strings_do_not_guess(name):
    with pytest.raises(ValueError, match=r"asks for weight standardization.*pairs, example_inputs"):
        DOUBTFUL[name](functools.partial(get_norm, OPTION))


@pytest.mark.parametrize(
    "name, norm",
    [
        ("other length", "bns.0"),
        ("other channels", "1"),
        ("two lists", "bns.0"),
    ],
)
def test_convert_does_not_guess(name, norm):
    model = DOUBTFUL[name](plain)
    with pytest.raises(ValueError, match=rf"cannot convert {norm}: .*pairs={{'{norm}': 'NAME"):
        convert(model, OPTION)
    assert not standardized(model)
    assert not standardized(convert(model, OPTION, pairs={norm: None}))


def test_pairs():
    model = DOUBTFUL["two lists"](plain)
    assert standardized(convert(model, OPTION, pairs={"bns.0": "b.0"})) == {"b.0"}
    for pairs, message in (
        ({"bns.1": "b.0"}, "pairs: 'bns.1' is none of the layers to convert: bns.0"),
        ({"bns.0": "b.2"}, "pairs: 'bns.0': 'b.2' is not in the model"),
        ({"bns.0": "bns"}, "pairs: 'bns.0': 'bns' is ModuleList"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, OPTION, pairs=pairs)


# ------------------------------------------------------------------------------ an example input


def sum_of_branches():
    """As in RepViT: the norm gets a sum, and no convolution alone may be standardized."""
    return Block(
        lambda b, x: b.bn(b.conv(x) + b.conv1(x) + x),
        conv=conv(3, 3),
        conv1=conv(3, 3, kernel_size=1),
        bn=nn.BatchNorm2d(3),
    )


def called_in_another_order():
    return Block(
        lambda b, x: b.bn2(b.conv2(b.bn1(b.conv1(x)))),
        conv1=conv(3, C),
        conv2=conv(C, C),
        bn1=nn.BatchNorm2d(C),
        bn2=nn.BatchNorm2d(C),
    )


def changed_in_place():
    return Block(lambda b, x: b.bn(b.conv(x).relu_()), conv=conv(3, C), bn=nn.BatchNorm2d(C))


@pytest.mark.parametrize(
    "build, expected",
    [
        (sum_of_branches, set()),
        (called_in_another_order, {"conv1", "conv2"}),
        (changed_in_place, set()),
    ],
)
def test_example_inputs_tell(build, expected):
    model = build()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with logged(LOGGER) as messages:
        convert(model, "BN+WS", example_inputs=(torch.randn(1, 3, 9, 9),))
    assert standardized(model) == expected
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert bool(expected) != any("bn (gets the output of no convolution)" in m for m in messages)


def test_example_inputs_that_do_not_fit():
    model = deep_stem(plain)
    with pytest.raises(ValueError, match=r"example_inputs: the model cannot .*RuntimeError"):
        convert(model, OPTION, example_inputs=torch.randn(1, 5, 9, 9))
    assert model.training and not standardized(model)
    model = nn.Sequential(nn.Conv1d(3, C, 3), nn.Tanh(), nn.GroupNorm(2, C))
    with pytest.raises(ValueError, match=r"cannot convert 2: its input is of shape \(1, 8, 7\)"):
        convert(model, OPTION, example_inputs=torch.randn(1, 3, 9))


# ---------------------------------------------------------------------------- filters of one weight


def test_filters_of_one_weight_are_not_standardized():
    def build(norm):
        return nn.Sequential(conv(3, C), norm(C), conv(C, C, kernel_size=1, groups=C), norm(C))

    with logged(LOGGER) as messages:
        by_string = build(functools.partial(get_norm, "BN+WS"))
    assert any("Sequential.3: " in m and "one weight" in m for m in messages)
    with logged(LOGGER) as messages:
        model = convert(build(nn.BatchNorm2d), "BN+WS")
    assert any("3 (" in m and "one weight" in m for m in messages)
    for m in (by_string, model):
        assert standardized(m) == {"0"} and type(m[2]) is nn.Conv2d
        m(torch.randn(2, 3, 9, 9)).square().mean().backward()
        assert m[0].weight.grad.abs().max() > 1e-9
    assert "1 of 2 convolutions" in summarize(model)
    assert "1 with filters of one weight" in summarize(model)


@pytest.mark.parametrize("options", [{"groups": 4}, {"groups": 4, "bias": False}])
def test_layer_with_filters_of_one_weight_is_an_error(options):
    with pytest.raises(ValueError, match="filters of one weight each .*4 channels"):
        WSConv2d(4, 4, 1, **options)
    WSConv2d(4, 4, 1, groups=2)


# ---------------------------------------------------------------------------------- pre-activation


def test_densenet_is_converted():
    model = torchvision.models.DenseNet(16, (1, 1), 16, 4, num_classes=3)
    model.features.norm5.requires_grad_(False)
    with logged(LOGGER) as messages:
        convert(model, "BCN(groups=8)+WS")
    (report,) = [m for m in messages if "converted without weight standardization" in m]
    names = {
        *("features.denseblock1.denselayer1.norm1", "features.transition1.norm"),
        *("features.denseblock2.denselayer1.norm1", "features.norm5"),
    }
    assert {word for word in report.split() if word.startswith("features")} == names
    assert {type(m) for m in modules_of_type(model, nn.GroupNorm).values()} == {BatchChannelNorm}
    # those before a norm: not before the concatenations
    expected = {"features.conv0"}
    expected |= {f"features.denseblock{i}.denselayer1.conv1" for i in (1, 2)}
    assert standardized(model) == expected
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_layers_that_no_convolution_feeds_can_be_left():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(C), conv(), nn.BatchNorm2d(C))
    with logged(LOGGER) as messages:
        convert(model, OPTION, unfed="leave")
    assert type(model[2]) is nn.BatchNorm2d and type(model[4]) is nn.GroupNorm
    assert any("left as they are: 2 (follows a ReLU)" in m for m in messages)
    with pytest.raises(ValueError, match="unfed must be 'convert' or 'leave', got 'skip'"):
        convert(model, OPTION, unfed="skip")


def test_convolutions_of_derived_classes_are_named():
    class Padded(nn.Conv2d):
        pass

    model = nn.Sequential(Padded(3, C, 3), nn.BatchNorm2d(C))
    with logged(LOGGER) as messages:
        convert(model, OPTION)
    assert any("1 (follows a Padded)" in m for m in messages) and type(model[0]) is Padded


def test_other_batch_norms_are_named():
    model = nn.Sequential(conv(), nn.BatchNorm2d(C), nn.Flatten(), nn.BatchNorm1d(C))
    with logged(LOGGER) as messages:
        convert(model, "BCN(groups=2)")
    assert any(m.endswith("left: 3") for m in messages)


def test_groups_that_fit_all_layers_are_named():
    model = nn.Sequential(conv(3, 32), nn.BatchNorm2d(32), conv(32, 48), nn.BatchNorm2d(48))
    model.append(nn.BatchNorm2d(24))
    message = r"cannot convert 3: .*48 channels .*'BCN\(groups=8\)' would work for all layers"
    with pytest.raises(ValueError, match=message):
        convert(model, "BCN")
    convert(model, "BCN(groups=8)")
