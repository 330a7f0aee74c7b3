"""Every backend against the formulas in float64: Triton on a GPU, or else in its interpreter."""

import pytest
import torch
from ops.cases import (
    BCN_GRADIENTS,
    DEVICE,
    assert_same,
    batch_channel_norm,
    expected,
    make_inputs,
    run,
)
from oracles import standardized_weight

from wsbcn_d2.ops import moments
from wsbcn_d2.ops.backend import kernels_for

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NCHW, LAST = torch.contiguous_format, torch.channels_last
TOLERANCE = {F64: 1e-7, F32: 2e-5, F16: 2e-3, BF16: 1.6e-2}

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, and of NumPy where numbers are not finite on purpose.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

PLAIN, RELU = {}, {"activation": "relu"}
RESIDUAL, BOTH = {"residual": True}, {"residual": True, "activation": "relu"}
ESTIMATE, BATCH = {"update_rate": 0.3}, {"update_rate": 0.3, "use_batch_statistics": True}
FIXED, FIXED_BATCH = {}, {"use_batch_statistics": True}

# Each value of a column with most of those of the others, rather than all with all.
CASES = [
    # (N, C, H, W), groups, dtype, memory format, statistics, what follows
    ((2, 12, 5, 3), 1, F64, LAST, ESTIMATE, RELU),
    ((1, 32, 7, 9), 32, F32, NCHW, ESTIMATE, PLAIN),  # a group a channel
    ((3, 6, 4, 4), 3, F32, LAST, BATCH, BOTH),
    ((1, 48, 1, 1), 4, F32, NCHW, FIXED, RESIDUAL),  # one pixel
    ((2, 5, 1, 1), 5, F64, LAST, BATCH, PLAIN),  # groups of one value
    ((4, 10, 1, 6), 5, BF16, LAST, ESTIMATE, BOTH),
    ((2, 10, 3, 7), 2, BF16, NCHW, BATCH, RELU),
    ((2, 1, 8, 8), 1, F16, NCHW, FIXED_BATCH, RELU),  # one channel
    ((2, 24, 5, 5), 3, F16, LAST, FIXED, PLAIN),
    ((2, 130, 3, 5), 13, F32, LAST, ESTIMATE, RESIDUAL),  # two blocks of channels
    ((1, 2100, 1, 2), 1, F32, NCHW, ESTIMATE, RELU),  # more than a tile of them in a group
    ((1, 3, 97, 90), 1, F32, NCHW, ESTIMATE, BOTH),  # more than one part of the pixels
    ((2, 4, 70, 81), 2, F32, LAST, BATCH, RELU),
    # Kernels in C: everything in NCHW; in channels_last and the other dtypes what differs there.
    ((3, 6, 5, 7), 2, F32, NCHW, ESTIMATE, BOTH),
    ((3, 6, 5, 7), 3, F32, NCHW, {"update_rate": 0.7}, RELU),
    ((3, 130, 2, 2), 13, F32, NCHW, ESTIMATE, RESIDUAL),
    ((2, 4, 70, 81), 2, F32, NCHW, BATCH, BOTH),
    ((2, 9, 5, 7), 3, F32, NCHW, BATCH, PLAIN),
    ((2, 9, 5, 7), 3, F32, NCHW, FIXED_BATCH, RELU),
    ((2, 9, 5, 7), 3, F32, NCHW, FIXED, BOTH),
    ((2, 4, 70, 81), 2, F32, NCHW, FIXED, PLAIN),
    ((1, 300, 17, 20), 3, F32, LAST, ESTIMATE, BOTH),  # several blocks of channels and of pixels
    ((2, 300, 3, 100), 3, BF16, LAST, BATCH, RESIDUAL),
    ((2, 6, 17, 20), 2, F16, LAST, FIXED, BOTH),
    ((2, 6, 70, 81), 2, BF16, NCHW, ESTIMATE, PLAIN),
    ((2, 6, 7, 8), 3, F16, NCHW, ESTIMATE, BOTH),
]


def random(shape, dtype, memory_format=NCHW):
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=memory_format)


def activation(shape, groups, dtype, memory_format=NCHW, **where):
    """The inputs of the operation on the device under test; parameters in at least float32."""
    x, *rest = (t.to(DEVICE) for t in make_inputs(shape, groups, **where))
    rest = [t.to(torch.promote_types(dtype, F32)) for t in rest]
    return [x.to(dtype).contiguous(memory_format=memory_format), *rest]


@pytest.mark.parametrize("shape,groups,dtype,memory_format,statistics,follows", CASES)
def test_forward_backward_and_estimates(shape, groups, dtype, memory_format, statistics, follows):
    inputs = activation(shape, groups, dtype, memory_format)
    # Neither the residual nor the gradient need have the memory format of x.
    other = {NCHW: LAST, LAST: NCHW}[memory_format]
    options = {**statistics, **follows}
    if "residual" in options:
        options["residual"] = random(shape, dtype, other)
    grad = random(shape, dtype, other)
    ours = run(inputs, grad, **options)
    assert_same(ours, expected(inputs, grad, **options), TOLERANCE[dtype])
    again = run(inputs, grad, **options)
    torch.testing.assert_close(again, ours, rtol=0, atol=0)  # deterministic


def test_pixels_are_divided_in_two_of_the_cases(backend):
    if backend != "triton":
        pytest.skip("of Triton")
    from wsbcn_d2.ops.triton_backend import _Tiling

    inputs = [activation(*case[:4])[0] for case in CASES]
    parts = [_Tiling.of(x.shape, x.is_contiguous(), x.device).parts for x in inputs]
    assert sum(n > 1 for n in parts) >= 2


@pytest.fixture
def tables_by_launches(backend, monkeypatch):
    """As if tiles had to read too much to find out the tables by themselves."""
    if backend != "triton":
        pytest.skip("of Triton")
    from wsbcn_d2.ops import triton_backend

    monkeypatch.setattr(triton_backend, "_FEW_PARTS", 0)
    plans = (triton_backend._plan_forward, triton_backend._plan_backward)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


@pytest.mark.parametrize("follows", [{}, RELU])
@pytest.mark.parametrize("shape,memory_format", [((3, 12, 5, 4), LAST), ((1, 3, 97, 90), NCHW)])
def test_tables_by_launches_of_their_own(tables_by_launches, shape, memory_format, follows):
    inputs = activation(shape, 3, F32, memory_format)
    grad = random(shape, F32)
    options = {**ESTIMATE, **follows}
    assert_same(run(inputs, grad, **options), expected(inputs, grad, **options), TOLERANCE[F32])
    inputs[0][0, 1, 2, 3] = float("nan")
    ours = run(inputs, grad, **options)
    assert ours["skipped"] == 1 and ours["seen"] == 0
    for name, estimate in zip(("mean", "var"), inputs[5:]):
        torch.testing.assert_close(ours[name], estimate.double().cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("statistics", [ESTIMATE, BATCH])
@pytest.mark.parametrize(
    "shape,groups,memory_format",
    [
        ((1, 2048, 16, 16), 1, LAST),  # a group of more channels than a program reads parts for
        ((1, 1030, 12, 11), 1, LAST),
        ((2, 16, 97, 90), 2, NCHW),
        ((1, 96, 40, 44), 32, LAST),
    ],
)
def test_as_on_a_large_gpu(backend, monkeypatch, shape, groups, memory_format, statistics):
    """Where the pixels are divided among as many multiprocessors as an H100 has."""
    if backend != "triton":
        pytest.skip("of Triton")
    from wsbcn_d2.ops import triton_backend

    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 132)
    inputs = activation(shape, groups, F32, memory_format)
    x = inputs[0]
    parts = triton_backend._Tiling.of(x.shape, x.is_contiguous(), x.device).parts
    assert parts > 1
    grad = random(shape, F32)
    ours = run(inputs, grad, **statistics)
    assert_same(ours, expected(inputs, grad, **statistics), TOLERANCE[F32])


@pytest.mark.parametrize("which", range(1, 7))
@pytest.mark.parametrize("change", ["strides", "dtype"])
def test_parameters_and_estimates_of_any_kind(which, change):
    """Others than those of a layer, which are dense and of float32."""
    inputs = activation((2, 6, 5, 7), 3, F32)
    if change == "strides":
        inputs[which] = torch.stack([inputs[which], inputs[which] * 2], dim=1)[:, 0]
    elif which < 5:
        inputs[which] = inputs[which].bfloat16()
    else:
        inputs[5:] = [table.double() for table in inputs[5:]]
    grad = random((2, 6, 5, 7), F32)
    leaves = [t.detach().requires_grad_() for t in inputs[:5]]
    theirs = expected(inputs, grad, **ESTIMATE)
    estimates = inputs[5:]
    y = batch_channel_norm(*leaves, *estimates, **ESTIMATE)
    y.backward(grad)
    ours = {"y": y, "mean": estimates[0], "var": estimates[1]}
    for name, leaf in zip(BCN_GRADIENTS, leaves):
        assert leaf.grad.dtype == leaf.dtype
        ours[f"gradient of {name}"] = leaf.grad
    tolerance = TOLERANCE[BF16] if change == "dtype" else TOLERANCE[F32]
    theirs = {name: theirs[name] for name in ours}
    assert_same({name: t.detach().cpu() for name, t in ours.items()}, theirs, tolerance)


def test_not_a_number_lets_gradients_through_relu():
    inputs = activation((1, 6, 3, 5), 2, F32)
    inputs[0][0, 1, 2, 3] = float("nan")
    residual = random((1, 6, 3, 5), F32).requires_grad_()
    y = batch_channel_norm(*inputs, residual=residual, activation="relu")
    assert y.isnan().any() and not y.isnan().all()
    (gradient,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    torch.testing.assert_close(gradient, (~(y <= 0)).to(F32), rtol=0, atol=0)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_far_from_zero(batch_statistics):
    """1000 +- 0.01 in float32, whose steps are 6e-5 there."""
    inputs = activation((2, 6, 9, 8), 3, F32, offset=1000.0, scale=0.01)
    grad = random((2, 6, 9, 8), F32)
    options = {"use_batch_statistics": batch_statistics, "update_rate": 0.1}
    ours, theirs = run(inputs, grad, **options), expected(inputs, grad, **options)
    # what a few roundings of the values, or their mean, do to the normalized values
    assert_same(ours, theirs, 4 * torch.finfo(F32).eps * 1000 / 0.01)
    if not batch_statistics:  # the estimates of the variance are about 1: rounding matters less
        torch.testing.assert_close(ours["y"], theirs["y"], rtol=0, atol=4e-3)
    torch.testing.assert_close(ours["var"], theirs["var"].double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("first", [1e3, 1e18])
def test_first_pixel_far_from_the_others(first):
    """The variance is 1/2000 of what it is around that pixel; the squares of all differences to
    1e18 have a sum that float32 cannot hold."""
    x = random((2, 3, 43, 47), F32)
    x[:, :, 0, 0] = first
    mean, var = (table.double().cpu() for table in moments(x))
    planes = x.double().cpu().flatten(2)
    torch.testing.assert_close(mean, planes.mean(dim=2), rtol=1e-5, atol=0)
    torch.testing.assert_close(var, planes.var(dim=2, unbiased=False), rtol=1e-5, atol=0)


def test_squares_that_overflow_around_zero_are_noticed():
    """The mean is finite and small, and what is subtracted from the sum of squares overflows."""
    inputs = activation((1, 6, 97, 90), 2, F32)
    inputs[0][0, 4, 0::2], inputs[0][0, 4, 1::2] = 1e30, -1.1e30
    skipped, before = torch.tensor(0, device=DEVICE), [t.clone() for t in inputs[5:]]
    batch_channel_norm(*inputs, update_rate=0.1, skipped_updates=skipped)
    torch.testing.assert_close(inputs[5:], before, rtol=0, atol=0)
    assert skipped.item() == 1


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_non_finite_batch_is_skipped_and_counted(bad, batch_statistics, images):
    """3e38 is finite, but its square is not."""
    inputs = activation((images, 6, 3, 5), 2, F32)
    inputs[0][-1, 4, 2, 3] = bad
    skipped, seen = torch.tensor(2, device=DEVICE), torch.tensor(7.0, device=DEVICE)
    options = {"use_batch_statistics": batch_statistics, "update_rate": 0.1}
    options.update(skipped_updates=skipped, seen_elements=seen)
    before = [t.clone() for t in inputs[5:]]
    y = batch_channel_norm(*inputs, **options)
    torch.testing.assert_close(inputs[5:], before, rtol=0, atol=0)
    assert skipped.item() == 3 and seen.item() == 7
    assert bad == 3e38 or not y[-1].isfinite().all()
    inputs[0][-1, 4, 2, 3] = 0.0
    if not batch_statistics:  # the other group, and the other image, are unharmed
        x, *rest = (t.double().cpu() for t in inputs)
        good = expected([x, *rest], torch.ones_like(x))["y"]
        unharmed = torch.ones_like(x, dtype=torch.bool)
        unharmed[-1, 3:] = False
        ours = y.double().cpu()
        torch.testing.assert_close(ours[unharmed], good[unharmed], rtol=1e-4, atol=1e-5)
    batch_channel_norm(*inputs, **options)
    assert skipped.item() == 3 and seen.item() == 7 + images * 15
    assert not torch.equal(inputs[5], before[0])


@pytest.mark.parametrize("statistics", [ESTIMATE, BATCH])
@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 8, 0, 7)])
def test_empty(shape, statistics):
    inputs = activation(shape, 2, F32)
    ours = run(
        inputs, random(shape, F32), residual=random(shape, F32), activation="relu", **statistics
    )
    torch.testing.assert_close(ours["mean"], inputs[5].double().cpu(), rtol=0, atol=0)
    torch.testing.assert_close(ours["var"], inputs[6].double().cpu(), rtol=0, atol=0)
    assert ours["skipped"] == 0 and ours["seen"] == 0
    assert all(not ours[name].any() for name in ours if name.startswith("gradient"))


def strided():
    return torch.randn(2, 6, 4, 10)[..., ::2]


def transposed():
    return torch.randn(2, 6, 5, 4).transpose(2, 3)


def expanded():
    return torch.randn(1, 6, 4, 1).expand(2, 6, 4, 5)


@pytest.mark.parametrize("make", [strided, transposed, expanded])
def test_operands_that_do_not_lie_densely(make):
    """x, the residual and the gradient, which is expanded whenever a sum or mean follows."""
    inputs = activation((2, 6, 4, 5), 2, F32)
    operands = [make().to(DEVICE) for _ in range(3)]
    results = []
    for x, residual, grad in (operands, [t.contiguous() for t in operands]):
        x, residual = x.requires_grad_(), residual.requires_grad_()
        leaves = [t.clone().requires_grad_() for t in inputs[1:5]]
        y = batch_channel_norm(x, *leaves, *inputs[5:], residual=residual, activation="relu")
        results.append([y, *torch.autograd.grad(y, [x, residual, *leaves], grad)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_without_counters():
    inputs = activation((1, 6, 3, 4), 2, F32)
    theirs = expected(inputs, torch.ones(1, 6, 3, 4), **ESTIMATE)
    batch_channel_norm(*inputs, **ESTIMATE)
    torch.testing.assert_close(inputs[5].double().cpu(), theirs["mean"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape,memory_format", [((2, 5, 3, 4), LAST), ((1, 3, 97, 90), NCHW)])
def test_moments(shape, memory_format):
    x = (random(shape, F32) + 100).contiguous(memory_format=memory_format)
    mean, var = moments(x)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        var.double(), exact.var((2, 3), unbiased=False), rtol=1e-4, atol=1e-6
    )
    for empty in (torch.ones(0, 3, 2, 2), torch.ones(2, 3, 0, 2)):
        for table in moments(empty.to(DEVICE)):
            assert table.shape == empty.shape[:2] and not table.any()


WEIGHTS = [
    # (C_out, C_in / groups, kh, kw), memory format
    ((7, 5, 3, 3), NCHW),
    ((7, 5, 3, 3), LAST),
    ((9, 300, 3, 3), NCHW),  # more values than the kernels in C sum at a time
    ((4, 1, 3, 3), LAST),
    ((64, 16, 1, 1), NCHW),
    ((2, 1, 1, 1), NCHW),  # filters of one value
]


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("shape,memory_format", WEIGHTS)
def test_standardization(shape, memory_format, dtype):
    """The gradient need not have the memory format of the weight."""
    weight = (random(shape, F32) * 0.02 + 0.1).to(dtype).contiguous(memory_format=memory_format)
    kernels = kernels_for(weight)
    filters, statistics = kernels.standardize(weight, 1e-5)
    exact = weight.double().requires_grad_()
    theirs = standardized_weight(exact)
    compute_dtype = torch.promote_types(dtype, F32)
    assert filters.dtype == compute_dtype and filters.stride() == weight.stride()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype != F64 else {}
    torch.testing.assert_close(filters.double(), theirs.detach(), **tolerance)
    for layout in (NCHW, LAST):
        grad = random(shape, compute_dtype, layout)
        (expected,) = torch.autograd.grad(theirs, exact, grad.double(), retain_graph=True)
        of_weight = kernels.standardize_backward(grad, weight, statistics)
        assert of_weight.stride() == weight.stride()
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(of_weight.double() / scale, expected / scale, **tolerance)


def test_standardization_of_no_filters():
    kernels, weight = kernels_for(torch.ones(1, device=DEVICE)), torch.ones(0, 3, 3, 3)
    filters, statistics = kernels.standardize(weight.to(DEVICE), 1e-5)
    assert filters.shape == weight.shape
    assert kernels.standardize_backward(filters, filters, statistics).shape == weight.shape
