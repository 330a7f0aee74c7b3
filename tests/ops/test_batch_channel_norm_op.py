"""The operation against the formulas in float64."""

import pytest
import torch
from ops.cases import ORACLES, batch_channel_norm, make_inputs, with_grad
from oracles import estimated_bcn

# (N, C, H, W), groups: a group a channel, one group, odd sizes, one pixel, one channel
SHAPES = [
    ((1, 32, 7, 9), 32),
    ((2, 12, 5, 3), 1),
    ((3, 6, 4, 4), 3),
    ((1, 48, 1, 1), 4),
    ((4, 10, 1, 6), 5),
    ((2, 1, 8, 8), 1),
]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("shape,groups", SHAPES)
def test_forward_estimates_and_gradients(shape, groups, batch_statistics):
    if batch_statistics and shape[0] * shape[2] * shape[3] == 1:
        pytest.skip("a batch of one value has no unbiased variance")
    inputs = make_inputs(shape, groups)
    ours, theirs = with_grad(inputs), with_grad(inputs)
    y = batch_channel_norm(*ours, use_batch_statistics=batch_statistics, update_rate=0.3)
    expected = ORACLES[batch_statistics](*theirs, rate=0.3)

    torch.testing.assert_close(y, expected.y)
    torch.testing.assert_close(ours[5], expected.running_mean)
    torch.testing.assert_close(ours[6], expected.running_var)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.y.backward(dy)
    for mine, other in zip(ours[:5], theirs[:5]):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_gradcheck(batch_statistics):
    inputs = make_inputs((2, 6, 2, 3), 3)
    mean, var = inputs[5:]

    def f(*tensors):
        return batch_channel_norm(
            *tensors, mean.clone(), var.clone(), use_batch_statistics=batch_statistics
        )

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs[:5]])


def test_fixed_estimates_are_left_alone():
    inputs = make_inputs((2, 8, 5, 5), 2)
    y = batch_channel_norm(*inputs)
    expected = estimated_bcn(*inputs, rate=None)
    torch.testing.assert_close(y, expected.y)
    again = make_inputs((2, 8, 5, 5), 2)[5:]
    assert not torch.equal(inputs[5], again[0])  # random, so equality below means something
    before = [t.clone() for t in inputs[5:]]
    batch_channel_norm(*inputs, update_rate=0.0)
    torch.testing.assert_close(inputs[5:], before, rtol=0, atol=0)


def test_variance_is_taken_around_the_old_estimate():
    """It then holds the variance between images too, which one image cannot show."""
    x = torch.full((1, 2, 4, 4), 3.0)
    mean, var = torch.zeros(2), torch.zeros(2)
    ones, zeros = torch.ones(2), torch.zeros(2)
    batch_channel_norm(x, ones, zeros, ones[:1], zeros[:1], mean, var, update_rate=0.5)
    assert mean.tolist() == [1.5, 1.5]
    assert var.tolist() == [4.5, 4.5]  # half of (3 - 0)^2; around the new mean it would be 1.125


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("offset,scale", [(1000.0, 0.01), (-3e4, 1.0), (0.0, 1e-4), (0.0, 1e4)])
def test_float32_far_from_zero(offset, scale, batch_statistics):
    """Float32 results stay as accurate as the float32 input itself allows."""
    shape, groups = (2, 16, 24, 40), 4
    # what a few roundings of the values, or their mean, to float32 do to the normalized values
    atol = max(1e-3, 4 * torch.finfo(torch.float32).eps * abs(offset) / scale)
    inputs = make_inputs(shape, groups, torch.float32, offset, scale)
    exact = [t.double() for t in inputs]
    ours, theirs = with_grad(inputs), with_grad(exact)
    y = batch_channel_norm(*ours, use_batch_statistics=batch_statistics, update_rate=0.1)
    expected = ORACLES[batch_statistics](*theirs, rate=0.1)
    torch.testing.assert_close(y.double(), expected.y, rtol=1e-3, atol=atol)
    atol_mean = 1e-7 * max(scale, 10)
    torch.testing.assert_close(ours[5].double(), expected.running_mean, rtol=1e-6, atol=atol_mean)
    torch.testing.assert_close(ours[6].double(), expected.running_var, rtol=1e-3, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.y.backward(dy.double())
    for mine, other in zip(ours[:5], theirs[:5]):
        top = other.grad.abs().max()
        torch.testing.assert_close(mine.grad.double() / top, other.grad / top, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_half_precision_input_has_float32_statistics(dtype, batch_statistics):
    x, *rest = make_inputs((2, 16, 30, 20), 4, torch.float32)
    x = (x * 50).to(dtype)
    ours = with_grad([x, *rest])
    theirs = with_grad([t.double() for t in (x, *rest)])
    y = batch_channel_norm(*ours, use_batch_statistics=batch_statistics, update_rate=0.1)
    expected = ORACLES[batch_statistics](*theirs, rate=0.1)
    assert y.dtype == dtype
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected.y, rtol=precision, atol=precision)
    # far below the resolution of the input dtype
    torch.testing.assert_close(ours[5].double(), expected.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[6].double(), expected.running_var, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.y.backward(dy.double())
    assert ours[0].grad.dtype == dtype and ours[1].grad.dtype == torch.float32
    for mine, other in zip(ours[:5], theirs[:5]):
        top = other.grad.abs().max()
        torch.testing.assert_close(
            mine.grad.double() / top, other.grad / top, rtol=0, atol=2 * precision
        )


def test_autocast_does_not_lower_the_precision():
    inputs = make_inputs((1, 8, 40, 40), 2, torch.float32, offset=300.0)
    plain, mixed = with_grad(inputs), with_grad(inputs)
    y = batch_channel_norm(*plain, update_rate=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = batch_channel_norm(*mixed, update_rate=0.1)
        z.sum().backward()
    y.sum().backward()
    torch.testing.assert_close(z, y, rtol=0, atol=0)
    torch.testing.assert_close(mixed[6], plain[6], rtol=0, atol=0)
    torch.testing.assert_close(mixed[0].grad, plain[0].grad, rtol=0, atol=0)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_memory_formats(batch_statistics):
    inputs = make_inputs((2, 8, 6, 5), 2)
    reference, ours = with_grad(inputs), with_grad(inputs)
    x = ours[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    y = batch_channel_norm(x, *ours[1:], use_batch_statistics=batch_statistics)
    expected = batch_channel_norm(*reference, use_batch_statistics=batch_statistics)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(expected)
    y.backward(dy.to(memory_format=torch.channels_last))
    expected.backward(dy)
    torch.testing.assert_close(x.grad, reference[0].grad)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_non_contiguous_input_and_gradient():
    inputs = make_inputs((2, 8, 6, 10), 2)
    reference = with_grad(inputs)
    wide = torch.randn(2, 8, 6, 20, dtype=torch.float64)
    wide[..., ::2] = inputs[0]
    x = wide[..., ::2].requires_grad_()
    ours = with_grad(inputs)
    y = batch_channel_norm(x, *ours[1:])
    expected = batch_channel_norm(*reference)
    torch.testing.assert_close(y, expected)
    y.mean().backward()  # an expanded gradient
    expected.mean().backward()
    torch.testing.assert_close(x.grad, reference[0].grad)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 8, 0, 7)])
def test_empty_input(shape, batch_statistics):
    inputs = make_inputs(shape, 2, torch.float32)
    before = [t.clone() for t in inputs[5:]]
    ours = with_grad(inputs)
    y = batch_channel_norm(*ours, use_batch_statistics=batch_statistics, update_rate=0.5)
    assert y.shape == shape
    y.sum().backward()
    for t in ours[:5]:
        torch.testing.assert_close(t.grad, torch.zeros_like(t))
    torch.testing.assert_close(ours[5:], before, rtol=0, atol=0)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_non_finite_batch_leaves_the_estimates(bad, batch_statistics):
    """3e38 is finite, but its square is not."""
    inputs = make_inputs((1, 4, 5, 5), 2, torch.float32)
    before = [t.clone() for t in inputs[5:]]
    skipped = torch.tensor(0)
    inputs[0][0, 1, 2, 3] = bad
    kwargs = dict(use_batch_statistics=batch_statistics, update_rate=0.1, skipped_updates=skipped)
    batch_channel_norm(*inputs, **kwargs)
    torch.testing.assert_close(inputs[5:], before, rtol=0, atol=0)
    assert skipped.item() == 1
    inputs[0][0, 1, 2, 3] = 0.0
    batch_channel_norm(*inputs, **kwargs)
    assert skipped.item() == 1
    assert not torch.equal(inputs[5], before[0])


def test_saves_the_input_and_tables_only():
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    _, *rest = make_inputs(x.shape, 4, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = batch_channel_norm(x, *[t.requires_grad_() for t in rest[:4]], *rest[4:])
    large = [t for t in saved if t.numel() == x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()
    assert sum(t.numel() for t in saved if t is not large[0]) < 10 * x.shape[0] * x.shape[1]
    torch.relu_(y).sum().backward()  # the output may be overwritten


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("activation", ["", "relu"])
def test_second_derivatives(batch_statistics, activation):
    inputs = make_inputs((2, 6, 2, 3), 3)
    residual = torch.randn_like(inputs[0]).requires_grad_()

    def f(*tensors):
        estimates = [t.clone() for t in inputs[5:]]
        options = {"use_batch_statistics": batch_statistics, "activation": activation}
        return batch_channel_norm(*tensors[:-1], *estimates, residual=tensors[-1], **options)

    leaves = [t.requires_grad_() for t in inputs[:5]]
    assert torch.autograd.gradgradcheck(f, [*leaves, residual], atol=1e-4)


def test_many_gradients_at_once():
    x, *rest = with_grad(make_inputs((2, 6, 2, 3), 3))
    y = batch_channel_norm(x, *rest, activation="relu")
    grads = torch.randn(4, *y.shape, dtype=y.dtype)
    leaves = [x, *rest[:4]]
    together = torch.autograd.grad(y, leaves, grads, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    torch.testing.assert_close(together, tuple(torch.stack(g) for g in zip(*single)))


def test_other_devices_are_errors():
    """Kernels would read memory that is not there."""
    x, *rest = make_inputs((1, 6, 3, 5), 2, torch.float32)
    names = ["weight", "bias", "group_weight", "group_bias", "running_mean", "running_var"]
    for i, name in enumerate(names):
        with pytest.raises(RuntimeError, match=f"x is on cpu, but {name} is on meta"):
            batch_channel_norm(x, *rest[:i], rest[i].to("meta"), *rest[i + 1 :])
    with pytest.raises(RuntimeError, match="x is on cpu, but the residual is on meta"):
        batch_channel_norm(x, *rest, residual=x.to("meta"))


def test_second_derivatives_where_only_the_residual_has_a_gradient():
    x, *rest = make_inputs((2, 6, 2, 3), 3)
    residual = torch.randn(x.shape, dtype=x.dtype, requires_grad=True)
    y = batch_channel_norm(x, *rest, residual=residual, activation="relu")
    (grad,) = torch.autograd.grad(y.sum(), residual, create_graph=True)
    assert torch.equal(grad, (y > 0).to(y.dtype))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_hooks_that_save_tensors_in_another_format(memory_format, cpu_backend):
    """They may leave one of the input and the output as it was."""
    x, *rest = make_inputs((1, 4, 3, 5), 2, torch.float32)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    residual = torch.randn(x.shape).contiguous(memory_format=memory_format)
    grad = torch.randn(x.shape)
    other = {torch.contiguous_format: torch.channels_last}.get(
        memory_format, torch.contiguous_format
    )

    def gradient(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = batch_channel_norm(x, *rest, residual=residual, activation="relu")
        return torch.autograd.grad(y, x, grad)

    def pack(t):
        return t if t.is_leaf or t.dim() != 4 else t.contiguous(memory_format=other)

    torch.testing.assert_close(gradient(pack), gradient(lambda t: t))


@pytest.mark.parametrize("name", ["weight", "bias", "group_bias", "running_mean", "running_var"])
def test_arguments_that_do_not_fit_are_errors(name):
    """Kernels would read beyond them."""
    x, *rest = make_inputs((1, 6, 3, 5), 2, torch.float32)
    at = ["weight", "bias", "group_weight", "group_bias", "running_mean", "running_var"].index(name)
    rest[at] = rest[at][:1]
    with pytest.raises(ValueError, match=f"^{name} must be of shape"):
        batch_channel_norm(x, *rest)


def test_groups_that_do_not_divide():
    x, *rest = make_inputs((1, 6, 3, 5), 2, torch.float32)
    rest[2:4] = [torch.ones(4), torch.ones(4)]
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4 groups"):
        batch_channel_norm(x, *rest)
