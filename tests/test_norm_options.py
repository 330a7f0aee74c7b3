"""The strings that name a normalization."""

import ast
import inspect

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, batch_norm
from detectron2.layers import get_norm as detectron2_get_norm
from torch import nn

import wsbcn_d2
from wsbcn_d2 import BatchChannelNorm, ChannelNorm, WSConv2d, get_norm

# name -> class, attributes
OPTIONS = {
    "BCN": (BatchChannelNorm, dict(mode="estimate", num_groups=32, update_rate=0.1)),
    "BatchBCN": (BatchChannelNorm, dict(mode="batch", num_groups=32, update_rate=0.1)),
    "SyncBCN": (BatchChannelNorm, dict(mode="sync", num_groups=32, update_rate=0.1)),
    "CN": (ChannelNorm, dict(num_groups=32)),
    "GN": (nn.GroupNorm, dict(num_groups=32)),
    "BN": (nn.BatchNorm2d, {}),
    "SyncBN": (nn.SyncBatchNorm, {}),
    "FrozenBN": (FrozenBatchNorm2d, {}),
    "LN": (batch_norm.LayerNorm, {}),
    "nnSyncBN": (nn.SyncBatchNorm, {}),
    "naiveSyncBN": (NaiveSyncBatchNorm, dict(_stats_mode="")),
    "naiveSyncBN_N": (NaiveSyncBatchNorm, dict(_stats_mode="N")),
    "BCN(groups=16)": (BatchChannelNorm, dict(mode="estimate", num_groups=16, update_rate=0.1)),
    "BCN(update_rate=0.01)": (BatchChannelNorm, dict(num_groups=32, update_rate=0.01)),
    "BCN(groups=8, update_rate=1e-3)": (BatchChannelNorm, dict(num_groups=8, update_rate=1e-3)),
    "BCN(update_rate=1,groups=1)": (BatchChannelNorm, dict(num_groups=1, update_rate=1.0)),
    "BatchBCN(groups=16)": (BatchChannelNorm, dict(mode="batch", num_groups=16)),
    "SyncBCN(groups=16)": (BatchChannelNorm, dict(mode="sync", num_groups=16)),
    "CN(groups=64)": (ChannelNorm, dict(num_groups=64)),
    "GN(groups=8)": (nn.GroupNorm, dict(num_groups=8)),
}

# Strings as they are written in configs, some with blanks.
YAML_STRINGS = [
    "BCN",
    "BCN+WS",
    "BCN(groups=16)+WS",
    "BCN(groups=16, update_rate=0.01)+WS",
    "GN+WS",
]


@pytest.mark.parametrize("suffix", ["", "+WS", " + WS"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("build", [get_norm, detectron2_get_norm], ids=["ours", "detectron2's"])
def test_option_builds_the_layer_it_names_and_standardizes_only_if_told(build, name, suffix):
    kind, attributes = OPTIONS[name]
    norm = build(name + suffix, 64)
    assert type(norm) is kind
    assert {key: getattr(norm, key) for key in attributes} == attributes
    channels = {"num_channels", "num_features", "normalized_shape"} & set(dir(norm))
    assert all(getattr(norm, key) in (64, (64,)) for key in channels) and channels
    conv = Conv2d(3, 64, 3, norm=norm)
    assert type(conv) is (WSConv2d if suffix else Conv2d)


def test_every_stock_option_is_an_option():
    """Read from the source of the installed Detectron2, so a new option there is noticed."""
    tree = ast.parse(inspect.getsource(batch_norm))
    function = next(n for n in tree.body if getattr(n, "name", "") == "get_norm")
    table = next(n for n in ast.walk(function) if isinstance(n, ast.Dict))
    stock = {key.value for key in table.keys}
    assert {"BN", "GN", "FrozenBN"} <= stock <= set(wsbcn_d2.list_norm_options())


def test_stock_options_compute_what_the_stock_layers_compute():
    x = torch.randn(4, 64, 5, 5)
    torch.testing.assert_close(get_norm("GN", 64)(x), nn.GroupNorm(32, 64)(x))
    torch.testing.assert_close(get_norm("BN+WS", 64)(x), nn.BatchNorm2d(64)(x))
    torch.testing.assert_close(get_norm("LN", 64)(x), batch_norm.LayerNorm(64)(x))


@pytest.mark.parametrize(
    "unknown",
    [
        "bcn",
        "BCN+ws",
        "WS",
        "+WS",
        "BCN+WS+WS",
        "BCN-WS",
        "GN32",
        "BCN()()",
        "BCN(",
        "InstanceNorm",
    ],
)
def test_unknown_option_lists_the_options(unknown):
    with pytest.raises(ValueError) as error:
        detectron2_get_norm(unknown, 64)
    message = str(error.value)
    assert repr(unknown) in message
    for name in ("BCN", "BatchBCN", "SyncBCN", "CN", "GN", "BN", "SyncBN", "FrozenBN", "+WS"):
        assert name in message


@pytest.mark.parametrize(
    "option, channels, working",
    [
        ("BCN", 48, "BCN(groups=16)"),  # DeepLabv3+ has 48 channels
        ("BCN+WS", 48, "BCN(groups=16)+WS"),
        ("GN+WS", 48, "GN(groups=16)+WS"),
        ("CN", 48, "CN(groups=16)"),
        ("SyncBCN(groups=24)+WS", 32, "SyncBCN(groups=8)+WS"),
        ("BCN(groups=10, update_rate=0.01)", 64, "BCN(groups=2, update_rate=0.01)"),
        ("GN(groups=64)", 32, "GN(groups=32)"),
        ("BCN", 7, "BCN(groups=1)"),
    ],
)
def test_groups_that_do_not_divide_name_both_numbers_and_a_string_that_works(
    option, channels, working
):
    with pytest.raises(ValueError) as error:
        get_norm(option, channels)
    message = str(error.value)
    groups = option.partition("groups=")[2].split(",")[0].split(")")[0] or "32"
    assert f"{channels} channels" in message and f"{groups} groups" in message
    assert repr(working) in message
    norm = get_norm(working, channels)
    assert norm(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)
    assert type(Conv2d(1, channels, 3, norm=norm)) is (WSConv2d if "WS" in working else Conv2d)


@pytest.mark.parametrize(
    "option, found",
    [
        ("BCN(groups=0)", "'0'"),
        ("BCN(groups=-2)", "'-2'"),
        ("BCN(groups=2.5)", "'2.5'"),
        ("BCN(groups=)", "''"),
        ("BCN(groups=many)", "'many'"),
        ("BCN(16)", "'16'"),
        ("BCN(group=16)", "'group=16'"),
        ("BCN(groups=8,groups=16)", "'groups=16'"),
        ("BCN(update_rate=1.5)", "'1.5'"),
        ("BCN(update_rate=-0.1)", "'-0.1'"),
        ("BCN(update_rate=nan)", "'nan'"),
        ("GN(update_rate=0.1)", "'update_rate=0.1'"),
        ("BN(groups=8)+WS", "'groups=8'"),
    ],
)
def test_malformed_arguments_are_named(option, found):
    with pytest.raises(ValueError) as error:
        get_norm(option, 64)
    assert repr(option) in str(error.value) and found in str(error.value)


@pytest.mark.parametrize("build", [get_norm, detectron2_get_norm], ids=["ours", "detectron2's"])
def test_callables_none_and_empty_pass_through(build):
    assert build(None, 64) is None
    assert build("", 64) is None
    norm = build(lambda channels: nn.InstanceNorm2d(channels, affine=True), 64)
    assert type(norm) is nn.InstanceNorm2d and norm.num_features == 64
    assert type(build(norm=nn.BatchNorm2d, out_channels=5)) is nn.BatchNorm2d


def test_a_callable_may_ask_for_weight_standardization():
    conv = Conv2d(3, 64, 3, norm=detectron2_get_norm(lambda c: get_norm("BCN+WS", c), 64))
    assert type(conv) is WSConv2d


@pytest.mark.parametrize("option", YAML_STRINGS)
def test_option_survives_command_line_dump_and_reload_of_a_config(option, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RESNETS.NORM", option])
    assert cfg.MODEL.RESNETS.NORM == option
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    reloaded = get_cfg()
    reloaded.merge_from_file(str(path))
    assert reloaded.MODEL.RESNETS.NORM == option
    written = tmp_path / "written.yaml"
    written.write_text(f"MODEL:\n  RESNETS:\n    NORM: {option}\n")
    reloaded.merge_from_file(str(written))
    assert reloaded.MODEL.RESNETS.NORM == option


def test_group_count_comes_from_the_string_alone():
    """Building one option does not change what the same string builds later."""
    first = get_norm("BCN", 64)
    get_norm("BCN(groups=8, update_rate=0.5)", 64)
    second = get_norm("BCN", 64)
    assert (first.num_groups, first.update_rate) == (second.num_groups, second.update_rate)
