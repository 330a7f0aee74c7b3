import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import channel_norm, estimated_bcn, large_batch_bcn
from torch import nn
from torch.utils.checkpoint import checkpoint
from versions import needs_compile, needs_native_kernels, needs_newer_torch

from wsbcn_d2 import BatchChannelNorm, ChannelNorm


def randomized(norm):
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return norm


def oracle_arguments(norm):
    names = ("weight", "bias", "group_weight", "group_bias", "running_mean", "running_var")
    return [getattr(norm, name).detach().double() for name in names]


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_channel_norm(groups):
    norm = randomized(ChannelNorm(16, groups, eps=1e-3)).double()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    assert norm.weight.shape == norm.bias.shape == (groups,)
    expected = channel_norm(x, norm.weight, norm.bias, 1e-3)
    torch.testing.assert_close(norm(x), expected)
    inputs = (x, *norm.parameters())
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(norm(x), inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


def test_estimate_mode_trains_for_several_steps_and_evaluates():
    norm = randomized(BatchChannelNorm(8, 2, eps=1e-4, update_rate=0.2)).double()
    for step in range(5):
        x = torch.randn(1, 8, 6, 6, dtype=torch.float64) * (step + 1) + step
        expected = estimated_bcn(x, *oracle_arguments(norm), rate=0.2, eps=1e-4)
        torch.testing.assert_close(norm(x), expected.y)
        torch.testing.assert_close(norm.running_mean, expected.running_mean)
        torch.testing.assert_close(norm.running_var, expected.running_var)
    norm.eval()
    expected = estimated_bcn(x, *oracle_arguments(norm), rate=None, eps=1e-4)
    torch.testing.assert_close(norm(x), expected.y)
    torch.testing.assert_close(norm.running_mean, expected.running_mean)


@pytest.mark.parametrize("mode", ["batch", "sync"])
def test_batch_mode_is_batchnorm_then_channel_norm(mode):
    """Against the stock layers; "sync" in a single process is "batch"."""
    norm = randomized(BatchChannelNorm(8, 2, mode=mode))
    bn = nn.BatchNorm2d(8)
    bn.load_state_dict({**bn.state_dict(), **{k: norm.state_dict()[k] for k in ("weight", "bias")}})
    cn = ChannelNorm(8, 2)
    cn.load_state_dict({"weight": norm.group_weight, "bias": norm.group_bias})
    for _ in range(3):
        x = torch.randn(4, 8, 5, 5, requires_grad=True)
        y, expected = norm(x), cn(bn(x))
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, norm.weight, norm.bias), dy),
            torch.autograd.grad(expected, (x, bn.weight, bn.bias), dy),
        )
    torch.testing.assert_close(norm.running_mean, bn.running_mean)
    torch.testing.assert_close(norm.running_var, bn.running_var)
    norm.eval(), bn.eval()
    torch.testing.assert_close(norm(x), cn(bn(x)))
    oracle = large_batch_bcn(x.double(), *oracle_arguments(norm), rate=0.1)
    torch.testing.assert_close(norm.train()(x).double(), oracle.y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["estimate", "batch", "sync"])
def test_frozen_layer_uses_and_keeps_its_estimates(mode):
    norm = randomized(BatchChannelNorm(8, 2, mode=mode))
    norm(torch.randn(4, 8, 5, 5) + 2)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(4, 8, 5, 5)
    for p in norm.parameters():
        p.requires_grad = False
    frozen = norm.train()(x)
    torch.testing.assert_close((norm.running_mean, norm.running_var), before, rtol=0, atol=0)
    torch.testing.assert_close(frozen, norm.eval()(x), rtol=0, atol=0)
    norm.group_bias.requires_grad = True  # one trainable parameter is enough
    norm.train()(x)
    assert not torch.equal(norm.running_mean, before[0])


def test_replica_of_data_parallel_is_not_frozen():
    """It has copies of the parameters as attributes, in no list of parameters."""
    norm = randomized(BatchChannelNorm(8, 2))
    replica = norm._replicate_for_data_parallel()
    for name, parameter in norm.named_parameters():
        setattr(replica, name, parameter * 1)
    x, other = torch.randn(2, 8, 5, 5), copy.deepcopy(norm)
    torch.testing.assert_close(replica(x), other(x))
    torch.testing.assert_close(dict(replica.named_buffers()), dict(other.named_buffers()))


def test_update_without_gradient():
    norm = BatchChannelNorm(8, 2)
    with torch.no_grad():
        norm(torch.ones(1, 8, 3, 3))
    torch.testing.assert_close(norm.running_mean, torch.full((8,), 0.1))


@pytest.mark.parametrize(
    "use_reentrant, compiled",
    [
        (False, None),
        (True, None),
        pytest.param(False, "block", marks=[needs_compile, needs_newer_torch]),
        pytest.param(True, "block", marks=[needs_compile, needs_newer_torch]),
        pytest.param(False, "all", marks=needs_compile),  # it does not trace reentrant ones
    ],
)
def test_activation_checkpointing_updates_once(use_reentrant, compiled):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), BatchChannelNorm(8, 2), nn.Conv2d(8, 8, 3))
    plain.append(randomized(BatchChannelNorm(8, 4)))
    recomputed = copy.deepcopy(plain)
    block = recomputed
    if compiled == "block":
        block = torch.compile(recomputed, backend="aot_eager")

    def run(x):
        return checkpoint(block, x, use_reentrant=use_reentrant)

    if compiled == "all":
        run = torch.compile(run, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(1, 3, 9, 9, requires_grad=True)
        x2 = x.detach().clone().requires_grad_()
        y = plain(x)
        y.square().mean().backward()
        run(x2).square().mean().backward()
        torch.testing.assert_close(x2.grad, x.grad)
    torch.testing.assert_close(dict(recomputed.named_buffers()), dict(plain.named_buffers()))
    for a, b in zip(plain.parameters(), recomputed.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_estimates_stay_float32(cast):
    norm = BatchChannelNorm(8, 2)
    norm.running_var.fill_(1e6)  # beyond the range of float16
    norm.running_mean.fill_(1 + 2**-20)  # beyond the resolution of both
    cast(norm)
    assert norm.weight.dtype in (torch.float16, torch.bfloat16)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.running_var[0] == 1e6 and norm.running_mean[0] == 1 + 2**-20
    x = torch.randn(1, 8, 4, 4).to(norm.weight.dtype).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == norm.weight.grad.dtype == norm.weight.dtype
    assert norm.double().running_mean.dtype == torch.float64


def test_levels_have_their_own_estimates():
    norm = randomized(BatchChannelNorm(8, 2, update_rate=0.25)).double()
    oracles = [copy.deepcopy(norm) for _ in range(3)]
    norm.set_num_levels(3)
    for _ in range(2):
        for level, oracle in enumerate(oracles):
            x = torch.randn(1, 8, 4, 4, dtype=torch.float64) + 10 * level
            torch.testing.assert_close(norm(x), oracle(x))
    for level, oracle in enumerate(oracles):
        torch.testing.assert_close(norm.running_mean[level], oracle.running_mean)
        torch.testing.assert_close(norm.running_var[level], oracle.running_var)
    norm.eval()(x)
    norm.restart_levels()
    torch.testing.assert_close(norm(x), oracles[0].eval()(x))
    with pytest.raises(ValueError, match="already has estimates for 3 levels"):
        norm.set_num_levels(2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2, 1), (4, 2, 2), (1, 1, 4)])
def test_levels_under_activation_checkpointing(use_reentrant, together, sizes):
    """Calls are repeated in the order of the backward pass, the last level first, unless all were
    checkpointed together."""
    norm = randomized(BatchChannelNorm(8, 2))
    norm.set_num_levels(3)
    norm.running_mean.copy_(torch.randn(3, 8))
    plain = copy.deepcopy(norm)
    inputs = [torch.randn(1, 8, size, 4, requires_grad=True) for size in sizes]

    def losses(norm, *inputs):
        return torch.stack([norm(x).square().mul(x).sum() for x in inputs])

    for training in (True, True, False):  # in evaluation, too, levels have their own estimates
        norm.train(training), plain.train(training)
        expected = torch.autograd.grad(losses(plain, *inputs).sum(), [*inputs, *plain.parameters()])
        if together:
            loss = checkpoint(losses, norm, *inputs, use_reentrant=use_reentrant)
        else:
            parts = [checkpoint(losses, norm, x, use_reentrant=use_reentrant) for x in inputs]
            loss = torch.cat(parts)
        loss.sum().backward()
        found = [t.grad for t in (*inputs, *norm.parameters())]
        torch.testing.assert_close(found, list(expected))
        torch.testing.assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))
        assert norm.level == 0
        for t in (*inputs, *norm.parameters()):
            t.grad = None


@needs_compile
def test_levels_are_compiled_once_for_all_sizes():
    norm = BatchChannelNorm(8, 2)
    norm.set_num_levels(3)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(norm, backend=backend, dynamic=True, fullgraph=True)
    counts = []
    for size in (32, 28, 24, 20, 36):
        for divisor in (1, 2, 4):
            compiled(torch.randn(2, 8, size // divisor, size // divisor))
        counts.append(len(graphs))
    assert counts[-1] == counts[1] and norm.level == 0


def test_assigned_estimates_stay_in_float32():
    norm = BatchChannelNorm(8, 2)
    norm.load_state_dict(BatchChannelNorm(8, 2).half().state_dict(), assign=True)
    half = {name: value.half() for name, value in norm.state_dict().items()}
    norm.load_state_dict(half, assign=True)
    assert norm.weight.dtype == torch.float16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    norm(torch.randn(1, 8, 9, 9).half() * 3000)  # whose variance float16 cannot hold
    assert norm.skipped_updates == 0 and norm.running_var.min() > 1e5


def test_estimates_stay_in_float32_whatever_the_default_is():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        norm = BatchChannelNorm(8, 2)
    finally:
        torch.set_default_dtype(before)
    assert norm.weight.dtype == torch.bfloat16
    estimates = (norm.running_mean, norm.running_var, norm.seen_elements)
    assert {table.dtype for table in estimates} == {torch.float32}


def test_load_batchnorm_and_level_estimates():
    bn = nn.BatchNorm2d(8)
    bn(torch.randn(4, 8, 5, 5) * 3 + 1)
    norm = BatchChannelNorm(8, 2)
    keys = norm.load_state_dict(bn.state_dict(), strict=False)
    assert sorted(keys.missing_keys) == ["group_bias", "group_weight"]
    assert keys.unexpected_keys == []
    torch.testing.assert_close(norm.running_var, bn.running_var)
    levels = norm
    levels.set_num_levels(2)
    again = BatchChannelNorm(8, 2)
    again.set_num_levels(2)
    again.load_state_dict(levels.state_dict())
    torch.testing.assert_close(again.running_var, levels.running_var)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "file"])
def test_copies(clone):
    norm = randomized(BatchChannelNorm(8, 2))
    norm(torch.randn(1, 8, 4, 4))
    if clone == "file":
        file = io.BytesIO()
        torch.save(norm.state_dict(), file)
        file.seek(0)
        other = BatchChannelNorm(8, 2)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        other = clone(norm)
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(other(x), norm(x), rtol=0, atol=0)
    torch.testing.assert_close(other.running_mean, norm.running_mean, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [BatchChannelNorm, ChannelNorm])
def test_reset_parameters(cls):
    norm = randomized(cls(8, 2))
    norm(torch.randn(1, 8, 3, 3) * 9)
    norm.reset_parameters()
    torch.testing.assert_close(norm.state_dict(), cls(8, 2).state_dict(), rtol=0, atol=0)


def test_one_value_a_group():
    """torch's GroupNorm refuses it in training; a coarse level of a pyramid can be like that."""
    norm, x = BatchChannelNorm(8, 8).eval(), torch.randn(1, 8, 1, 1)
    torch.testing.assert_close(norm(x), torch.zeros(1, 8, 1, 1), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.jit.trace(norm, x)(x), norm(x), rtol=0, atol=1e-3)
    assert ChannelNorm(8, 8)(x).abs().max() < 1e-3


def test_state_dict_keys():
    assert set(BatchChannelNorm(8, 2).state_dict()) == {
        "weight",
        "bias",
        "group_weight",
        "group_bias",
        "running_mean",
        "running_var",
    }
    assert set(ChannelNorm(8, 2).state_dict()) == {"weight", "bias"}


def test_repr():
    norm = BatchChannelNorm(256)
    text = "BatchChannelNorm(256, groups=32, mode=estimate, update_rate=0.1)"
    assert repr(norm) == text
    norm.set_num_levels(5)
    assert repr(norm) == text[:-1] + ", levels=5)"
    assert repr(ChannelNorm(64, 16)) == "ChannelNorm(64, groups=16)"


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: BatchChannelNorm(48), "48 channels cannot be divided into 32 groups"),
        (lambda: ChannelNorm(8, 0), "8 channels cannot be divided into 0 groups"),
        (
            lambda: BatchChannelNorm(32, update_rate=1.5),
            r"update_rate must be in \[0, 1\], got 1.5",
        ),
        (lambda: BatchChannelNorm(32, mode="online"), "one of estimate, batch, sync, got 'online'"),
        (
            lambda: BatchChannelNorm(32)(torch.zeros(1, 32, 4)),
            r"\(N, 32, H, W\), got .*\[1, 32, 4\]",
        ),
        (
            lambda: BatchChannelNorm(32)(torch.zeros(1, 32, 4, 4).int()),
            "floating dtype, got .*int32",
        ),
        (lambda: ChannelNorm(32)(torch.zeros(1, 16, 4, 4)), r"got .*\[1, 16, 4, 4\]"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_cancellation_free_where_groupnorm_is_not_needed():
    """The whole layer after a stem with a large offset: gradients stay those of float64."""
    norm = BatchChannelNorm(32, 32)
    x = F.relu(torch.randn(1, 32, 20, 20)) + 5e3
    y = norm(x)
    expected = estimated_bcn(x.double(), *oracle_arguments(BatchChannelNorm(32, 32)), rate=0.1).y
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("export", [torch.jit.script, "trace"])
def test_torchscript_of_evaluation(export, levels):
    """A trace must hold for sizes that it was not made with."""
    norm = randomized(BatchChannelNorm(8, 2))
    norm(torch.randn(2, 8, 5, 5) * 2 + 1)
    if levels > 1:
        norm.set_num_levels(levels)
    model = nn.Sequential(norm, randomized(ChannelNorm(8, 4))).eval()
    x = torch.randn(2, 8, 6, 3)
    if export == "trace":
        exported = torch.jit.trace(model, torch.randn(1, 8, 9, 9), check_trace=False)
    else:
        exported = export(model)
    norm.restart_levels()
    torch.testing.assert_close(exported(x), model(x))


@needs_compile
@pytest.mark.parametrize("mode", ["estimate", "batch"])
@pytest.mark.parametrize("train", [False, True])
def test_compile_without_graph_break(train, mode):
    norm = randomized(BatchChannelNorm(8, 2, mode=mode)).train(train)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 7, 7)
    for _ in range(2):
        y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))
    for a, b in zip(other.parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@needs_compile
@needs_native_kernels
@pytest.mark.parametrize("offset,scale,off_estimate", [(0, 1, 0), (1000, 0.01, 0), (-3e4, 1, 100)])
def test_all_ways_to_run_are_equally_near(offset, scale, off_estimate):
    """To float64, far from zero, too, where a mean that is part of a bias cancels."""
    norm = randomized(BatchChannelNorm(64, 32)).eval()
    norm.running_mean.copy_(offset + off_estimate + torch.randn(64) * scale)
    norm.running_var.fill_(scale**2)
    x = offset + scale * torch.randn(2, 64, 20, 30)
    values = [t.double() for t in (*norm.parameters(), norm.running_mean, norm.running_var)]
    expected = estimated_bcn(x.double(), *values, None).y
    with torch.no_grad():
        outputs = [
            norm(x),
            torch.jit.trace(norm, x, check_trace=False)(x),
            torch.jit.script(norm)(x),
            torch.compile(norm, backend="aot_eager")(x),
            norm(x.contiguous(memory_format=torch.channels_last)),
        ]
    errors = [float((y.double() - expected).abs().max()) for y in outputs]
    assert max(errors) < 3 * min(errors) + 1e-5, errors
