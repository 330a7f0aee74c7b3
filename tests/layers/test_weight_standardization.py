import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from oracles import standardized_weight
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from wsbcn_d2 import WSConv2d, WSConvTranspose2d, standardize_weight
from wsbcn_d2.layers import adaptation, is_convolution, standardize_

VARIANTS = [
    dict(),
    dict(stride=2, padding=1),
    dict(dilation=2, padding=2),
    dict(groups=4),
    dict(groups=8),
    dict(bias=False),
    dict(padding=1, padding_mode="reflect"),
]


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (5, 7, 1, 1), (6, 1, 3, 3)])
def test_standardize_weight(shape):
    weight = torch.randn(shape, dtype=torch.float64) * 0.02 + 0.3
    torch.testing.assert_close(standardize_weight(weight), standardized_weight(weight))
    torch.testing.assert_close(standardize_weight(weight, 1e-2), standardized_weight(weight, 1e-2))
    assert torch.autograd.gradcheck(standardize_weight, weight.requires_grad_())
    assert torch.autograd.gradgradcheck(standardize_weight, weight)


@pytest.mark.parametrize("filters", [torch.full((3, 4, 3, 3), 0.7), torch.randn(4, 1, 1, 1)])
def test_constant_filters_are_safe(filters):
    weight = filters.requires_grad_()
    out = standardize_weight(weight)
    torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=1e-3)
    out.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().max() < 1


def test_half_precision_weights_are_standardized_in_float32():
    weight = (torch.randn(4, 512, 3, 3) * 1e-3).half()
    expected = standardized_weight(weight.double())
    out = standardize_weight(weight)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_conv_is_a_plain_conv_with_standardized_filters(kwargs):
    conv = WSConv2d(8, 16, 3, **kwargs)
    plain = nn.Conv2d(8, 16, 3, **kwargs)
    plain.load_state_dict({k: v for k, v in conv.state_dict().items() if k != "ws_eps"})
    x = torch.randn(2, 8, 9, 9)
    weight = conv.weight.detach().clone().requires_grad_()
    plain.weight = nn.Parameter(standardized_weight(weight).detach())
    torch.testing.assert_close(conv.standardized_weight(), plain.weight)
    y, expected = conv(x), plain(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    standardized_weight(weight).backward(plain.weight.grad)
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)


def test_norm_and_activation_follow():
    conv = WSConv2d(4, 8, 1, norm=nn.GroupNorm(2, 8), activation=F.relu)
    x = torch.randn(2, 4, 5, 5)
    expected = F.relu(conv.norm(F.conv2d(x, standardized_weight(conv.weight), conv.bias)))
    torch.testing.assert_close(conv(x), expected)
    empty = conv(torch.zeros(0, 4, 5, 5))
    assert empty.shape == (0, 8, 5, 5)
    empty.sum().backward()
    assert conv.weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    "kwargs", [dict(), dict(groups=4, stride=2, output_padding=1), dict(bias=False)]
)
def test_transposed_conv(kwargs):
    """A filter of a transposed convolution is what makes one of its output channels: adding a
    constant to it and scaling it changes nothing."""
    conv = WSConvTranspose2d(8, 12, 3, **kwargs).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y = conv(x)
    plain = nn.ConvTranspose2d(8, 12, 3, **kwargs).double()
    plain.load_state_dict({k: v for k, v in conv.state_dict().items() if k != "ws_eps"})
    groups = conv.groups
    with torch.no_grad():
        for g in range(groups):
            rows = slice(g * 8 // groups, (g + 1) * 8 // groups)
            filters = conv.weight[rows].transpose(0, 1)
            plain.weight[rows] = standardized_weight(filters).transpose(0, 1)
    torch.testing.assert_close(y, plain(x))
    conv.eps = 0.0
    y = conv(x)
    with torch.no_grad():
        conv.weight[:, 1] = 3 * conv.weight[:, 1] + 0.1
    torch.testing.assert_close(conv(x), y)


@pytest.mark.parametrize(
    "conv",
    [Conv2d(4, 8, 3, norm=nn.GroupNorm(2, 8)), nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3)],
)
def test_standardize_in_place(conv):
    x = torch.randn(1, 4, 6, 6)
    parameters = dict(conv.named_parameters())
    expected = copy.deepcopy(conv)
    assert is_convolution(conv)
    assert standardize_(conv) is conv and standardize_(conv) is conv
    assert all(p is parameters[name] for name, p in conv.named_parameters())
    with torch.no_grad():
        dims = (0, 1) if isinstance(conv, nn.ConvTranspose2d) else (0, 0)
        weight = expected.weight.transpose(*dims)
        expected.weight.copy_(standardized_weight(weight).transpose(*dims))
    torch.testing.assert_close(conv(x), expected(x))


def test_standardize_refuses_what_it_does_not_know():
    class MyConv(nn.Conv2d):
        pass

    for module in (nn.Linear(2, 2), MyConv(2, 2, 1)):
        assert not is_convolution(module)
        with pytest.raises(TypeError, match=f"{type(module).__name__}; allowed are Conv2d"):
            standardize_(module)


def test_mark_in_the_state_dict(caplog):
    conv = WSConv2d(4, 8, 3, eps=1e-3)
    state = conv.state_dict()
    assert state["ws_eps"].dtype == torch.float64 and state["ws_eps"].item() == 1e-3
    other = nn.Sequential(WSConv2d(4, 8, 3), WSConv2d(8, 8, 3))
    own = {f"0.{k}": v for k, v in conv.half().state_dict().items()}
    own.update({f"1.{k}": v for k, v in WSConv2d(8, 8, 3).state_dict().items()})
    with caplog.at_level(logging.WARNING, "detectron2.wsbcn_d2"):
        other.load_state_dict(own)  # strict
    assert other[0].eps == 1e-3 and other[1].eps == 1e-5
    assert not caplog.records


def test_weights_without_the_mark_are_reported_once_per_load(caplog):
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(WSConv2d(4, 8, 3), WSConv2d(8, 8, 3))
    for load in (1, 2):
        with caplog.at_level(logging.WARNING, "detectron2.wsbcn_d2"):
            keys = model.load_state_dict(plain.state_dict(), strict=False)
        assert keys.missing_keys == ["0.ws_eps", "1.ws_eps"]
        assert len(caplog.records) == load
        assert "not trained with weight standardization" in caplog.text
        assert "'+WS'" in caplog.text
    with pytest.raises(RuntimeError, match="ws_eps"):
        model.load_state_dict(plain.state_dict())


def tables(scales, shifts):
    return {"ws_scale": torch.ones(scales), "ws_shift": torch.ones(shifts)}


@pytest.mark.parametrize("strict", [True, False])
def test_adaptation_of_another_size_leaves_nothing_behind(strict):
    conv = WSConv2d(3, 4, 1)
    conv.load_state_dict({**conv.state_dict(), **tables(4, 4)})
    conv.load_state_dict({k: v for k, v in conv.state_dict().items() if "ws_s" not in k})
    state = {**conv.state_dict(), **tables(5, 4)}
    with pytest.raises(RuntimeError, match=r"ws_scale is of shape \(5,\), not \(4,\)"):
        conv.load_state_dict(state, strict=strict)
    assert conv.ws_scale is None and conv.ws_shift is None
    assert sorted(conv.state_dict()) == ["bias", "weight", "ws_eps"]


def test_an_image_without_a_batch():
    conv = WSConv2d(3, 8, 3, padding=1).double()
    x = torch.randn(3, 5, 7).double()
    (grad,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    (expected,) = torch.autograd.grad(conv(x[None]).square().sum(), conv.weight)
    torch.testing.assert_close(grad, expected)


def test_distributed_state_dicts_have_the_entries():
    """Those of torch.distributed.checkpoint, by which sharded models are saved."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def build(eps):
        return nn.Sequential(WSConv2d(3, 4, 3, eps=eps), WSConvTranspose2d(4, 4, 3, eps=eps))

    source, target = build(1e-3), build(1e-5)
    state = get_model_state_dict(source)
    assert state.keys() == source.state_dict().keys()
    set_model_state_dict(target, state)
    assert [conv.eps for conv in target] == [1e-3, 1e-3]
    for entry in (source.half().state_dict()["0.ws_eps"], source.get_buffer("1.ws_eps")):
        assert entry.dtype == torch.float64 and entry.item() == 1e-3


@pytest.mark.parametrize("kind", ["pruned", "parametrized", "hooked"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_scale_and_shift_beside_a_weight_that_is_computed(kind):
    def build():
        conv = WSConv2d(3, 4, 3, bias=False)
        if keep:
            conv.ws_scale, conv.ws_shift = adaptation(conv.weight, conv.eps)
        if kind == "pruned":
            return prune.l1_unstructured(conv, "weight", 0.3)
        return (parametrizations.weight_norm if kind == "parametrized" else weight_norm)(conv)

    keep = True
    source = build()
    keep = False
    target = build()
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("factor", [0.0, 0.99])
def test_filters_may_be_scaled_as_a_whole(factor):
    conv = WSConv2d(3, 4, 3).eval()
    state = {name: value.clone() for name, value in conv.state_dict().items()}
    state["weight"] *= factor
    conv.load_state_dict(state, assign=True)
    assert torch.equal(conv.weight, state["weight"])
