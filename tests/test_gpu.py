"""What only a GPU can show: python -m pytest -m gpu"""

import copy

import pytest
import torch
import torch.nn.functional as F
from ops.cases import batch_channel_norm
from oracles import estimated_bcn, large_batch_bcn, standardized_weight
from torch import nn

from wsbcn_d2 import BatchChannelNorm, WSConv2d
from wsbcn_d2.engine import recalibrate_estimates
from wsbcn_d2.layers import run_branch
from wsbcn_d2.ops import backend_name, set_backend

pytestmark = pytest.mark.gpu


def close(a, b, tolerance):
    top = b.abs().max()
    torch.testing.assert_close(a.double().cpu() / top, b / top, rtol=0, atol=tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["estimate", "batch"])
@pytest.mark.parametrize("shape,groups", [((1, 256, 50, 67), 32), ((64, 64, 7, 7), 8)])
def test_batch_channel_norm(shape, groups, mode, dtype, memory_format):
    norm = BatchChannelNorm(shape[1], groups, mode=mode)
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    x = (torch.randn(shape) * 3 + 2).to(dtype)
    affine = [p.detach().double().requires_grad_() for p in norm.parameters()]
    # in the order weight, bias, group_weight, group_bias
    exact = x.double().requires_grad_()
    oracle = estimated_bcn if mode == "estimate" else large_batch_bcn
    expected = oracle(
        exact, *affine, norm.running_mean.double(), norm.running_var.double(), rate=0.1
    )
    dy = torch.randn(shape).to(dtype)
    expected.y.backward(dy.double())

    norm.cuda()
    ours = x.cuda().contiguous(memory_format=memory_format).requires_grad_()
    y = norm(ours)
    y.backward(dy.cuda().contiguous(memory_format=memory_format))
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    close(y, expected.y.detach(), tolerance)
    close(ours.grad, exact.grad, 2 * tolerance)
    close(norm.running_mean, expected.running_mean, 1e-5)
    close(norm.running_var, expected.running_var, 1e-5)
    for p, reference in zip(norm.parameters(), affine):
        close(p.grad, reference.grad, 2 * tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_branch_of_a_block(dtype, memory_format):
    """To the last bit what single operations compute, and less memory."""
    torch.backends.cudnn.deterministic = True
    convs = [
        WSConv2d(256, 64, 1, bias=False, norm=BatchChannelNorm(64)),
        WSConv2d(64, 64, 3, padding=1, bias=False, norm=BatchChannelNorm(64)),
        WSConv2d(64, 256, 1, bias=False, norm=BatchChannelNorm(256)),
    ]
    model = nn.ModuleList(convs).cuda().to(memory_format=memory_format)
    x = torch.randn(2, 256, 50, 67, device="cuda").contiguous(memory_format=memory_format)
    x = x.to(dtype)
    results, saved = [], []
    try:
        for single in (True, False):
            module = copy.deepcopy(model)
            if single:  # what looks between two convolutions makes them single operations
                module[1].register_forward_hook(lambda m, x, y: None)
            for _ in range(3):
                ours = x.detach().requires_grad_()
                module.zero_grad(set_to_none=True)
                before = torch.cuda.memory_allocated()
                with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    y = run_branch(module, ours, ours)
                saved.append(torch.cuda.memory_allocated() - before)
                y.float().square().mean().backward()
            results.append([y.detach(), ours.grad, *(p.grad for p in module.parameters())])
            results[-1] += list(module.buffers())
    finally:
        torch.backends.cudnn.deterministic = False
    torch.testing.assert_close(*results, rtol=0, atol=0)
    # Two outputs of 64 channels are not there.
    assert saved[-1] < saved[2] - 1.5 * x.numel() // 4 * x.element_size()


def test_autocast_and_no_synchronization_with_the_host():
    model = nn.Sequential(WSConv2d(3, 64, 3), BatchChannelNorm(64), nn.Conv2d(64, 8, 1)).cuda()
    x = torch.randn(1, 3, 64, 64, device="cuda")
    scaler = torch.cuda.amp.GradScaler()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(x).square().mean()
            scaler.scale(loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert model[1].running_var.dtype == torch.float32
    assert model[1].running_var.isfinite().all() and model[1].skipped_updates == 0


def test_triton_is_what_runs():
    assert backend_name() == "triton"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 200, 301), (128, 64, 7, 7), (2, 96, 1, 1)])
def test_fused_relu_and_residual(shape, with_residual, memory_format):
    """Triton against plain PyTorch, both on the GPU."""
    results = {}
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        set_backend(backend)
        try:
            c = shape[1]
            x, residual, dy = (
                torch.randn(shape, device="cuda").contiguous(memory_format=memory_format)
                for _ in range(3)
            )
            affine = [torch.rand(n, device="cuda") + 0.5 for n in (c, c, 32, 32)]
            leaves = [t.requires_grad_() for t in (x, residual, *affine)]
            mean, var = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
            y = batch_channel_norm(
                x,
                *affine,
                mean,
                var,
                update_rate=0.1,
                residual=residual if with_residual else None,
                activation="relu",
            )
            y.backward(dy)
        finally:
            set_backend(None)
        results[backend] = [y.detach(), mean, var, *(t.grad for t in leaves if t.grad is not None)]
    assert len(results["eager"]) == 8 + with_residual
    for eager, triton in zip(*results.values()):
        close(triton, eager.double().cpu(), 1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_standardized_convolutions(memory_format):
    for args in ((64, 128, 3), (128, 32, 1), (32, 32, 5, 1, 0, 1, 32)):
        conv = WSConv2d(*args)
        x, weight = torch.randn(2, args[0], 9, 8), conv.weight.detach().double().requires_grad_()
        exact = F.conv2d(
            x.double(), standardized_weight(weight), conv.bias.double(), groups=conv.groups
        )
        exact.square().sum().backward()
        conv.cuda().to(memory_format=memory_format)
        torch.backends.cudnn.allow_tf32 = False
        try:
            y = conv(x.cuda().contiguous(memory_format=memory_format))
            y.square().sum().backward()
        finally:
            torch.backends.cudnn.allow_tf32 = True
        close(y.detach(), exact.detach(), 1e-4)
        close(conv.weight.grad, weight.grad, 1e-4)


def at(offset, x):
    """A copy of x that begins so many elements after a multiple of 16 bytes."""
    out = x.new_empty(x.numel() + offset).as_strided(x.shape, x.stride(), offset)
    return out.copy_(x)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape,memory_format",
    [
        ((1, 256, 100, 152), torch.contiguous_format),
        ((1, 256, 100, 152), torch.channels_last),  # hundreds of parts
        ((64, 256, 14, 14), torch.contiguous_format),  # many images
    ],
)
def test_same_results_each_time(shape, memory_format, residual):
    """To the last bit, wherever the input begins in memory, and right ones."""
    values, dy = torch.randn(2, *shape, device="cuda")
    results = {"eager": [], 0: [], 1: []}
    for key in (0, 1, 0, 1, 0, 1, "eager"):
        set_backend("eager" if key == "eager" else None)
        try:
            x = at(0 if key == "eager" else key, values.contiguous(memory_format=memory_format))
            x.requires_grad_()
            norm = BatchChannelNorm(shape[1]).cuda()
            y = norm(x, residual=x if residual else None, activation="relu")
            y.backward(dy)
        finally:
            set_backend(None)
        tensors = [y.detach(), x.grad, *(p.grad for p in norm.parameters())]
        tensors += [norm.running_mean, norm.running_var]
        results[key].append(tensors)
    assert len(tensors) == 8
    for passes in (results[0], results[1]):
        torch.testing.assert_close(passes[1:], passes[:1] * 2, rtol=0, atol=0)
        for ours, theirs in zip(passes[0], results["eager"][0]):
            close(ours, theirs.double().cpu(), 1e-5)


def test_batch_that_is_not_finite_changes_no_estimate():
    norm = BatchChannelNorm(256).cuda()
    x = torch.randn(1, 256, 40, 50, device="cuda")
    for _ in range(2):
        norm(x)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x[0, 200, 3, 4] = float("inf")
    norm(x)
    assert norm.skipped_updates == 1 and norm.seen_elements == 2 * 40 * 50
    torch.testing.assert_close((norm.running_mean, norm.running_var), before, rtol=0, atol=0)


def test_cuda_graph():
    norm = BatchChannelNorm(64).cuda()
    x = torch.randn(1, 64, 30, 40, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            norm(x)
    torch.cuda.current_stream().wait_stream(stream)
    reference = BatchChannelNorm(64).cuda()
    reference.load_state_dict(norm.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = norm(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(x.shape, device="cuda") + seed)
        graph.replay()
        torch.testing.assert_close(y, reference(x).detach(), rtol=0, atol=0)
    torch.testing.assert_close(norm.running_var, reference.running_var, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_second_gpu():
    x = torch.randn(1, 64, 30, 40)
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):  # the current one is cuda:0
        norm = BatchChannelNorm(64).to(device)
        ours = x.to(device).requires_grad_()
        y = norm(ours, activation="relu")
        y.square().sum().backward()
        results.append([t.cpu() for t in (y.detach(), ours.grad, norm.running_var)])
    torch.testing.assert_close(results[1:], results[:1] * 3, rtol=0, atol=0)


def test_recalibration_leaves_the_generator_of_the_model_alone():
    """Also on a GPU that is not the current one; what the forward pass draws is seeded."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    model = nn.Sequential(nn.Dropout(0.5), BatchChannelNorm(8, 2)).to(device).train()
    batches = [torch.randn(2, 8, 5, 5, device=device) for _ in range(3)]
    results = []
    for _ in range(2):
        torch.randn(3, device=device)  # another state each time
        before = torch.cuda.get_rng_state(device)
        recalibrate_estimates(model, batches)
        assert torch.equal(torch.cuda.get_rng_state(device), before)
        results.append(model[1].running_var.clone())
    torch.testing.assert_close(results[0], results[1])
