"""The kernels in C: how they are built and found, and what only they do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.cases import batch_channel_norm, make_inputs, run
from oracles import standardized_weight
from versions import needs_native_kernels

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.ops import backend, backend_name, eager, moments, native_backend, set_backend
from wsbcn_d2.ops.normalization import Normalization

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# --------------------------------------------------------------------------------------- building


def build(tmp_path, compiler):
    """Builds the extension of a copy of the project, and returns where it would be."""
    for name in ("setup.py", "README.md", "wsbcn_d2/version.py", "wsbcn_d2/ops/native_kernels.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": compiler},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return list((tmp_path / "wsbcn_d2/ops").glob("native_kernels*.so")), result.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_build(tmp_path):
    (path,), _ = build(tmp_path, "cc")
    script = f"import ctypes; print(ctypes.CDLL({str(path)!r}).wsbcn_size_of_pass())"
    size = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert int(size) == native_backend._PASS.size


def test_build_without_a_compiler_succeeds_and_says_so(tmp_path):
    paths, message = build(tmp_path, "no-such-compiler")
    assert paths == [] and "native_kernels" in message


# A process whose kernels are those in a folder, which normalizes twice and prints what ran and what
# was logged.
SCRIPT = """
import logging, sys, torch
from pathlib import Path
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("detectron2.wsbcn_d2").addHandler(handler)
from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.ops import backend_name, native_backend
native_backend.Path = lambda file: Path(sys.argv[1]) / "native_backend.py"
for _ in range(2):
    BatchChannelNorm(4, 2)(torch.ones(1, 4, 2, 2)).sum().backward()
print(backend_name(torch.device("cpu")), len(messages), *messages)
"""


@pytest.mark.parametrize(
    "content,reason", [(None, "not built"), (b"", "short"), ("another", "none")]
)
def test_without_them_plain_pytorch_runs_and_one_line_says_so(tmp_path, content, reason):
    """Not built, a damaged file, or the library of something else."""
    path = tmp_path / f"native_kernels{native_backend.EXTENSION_SUFFIXES[0]}"
    if content == "another":
        path.symlink_to(torch._C.__file__)
    elif content is not None:
        path.write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "WSBCN_D2_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "eager 1 Kernels in C cannot be used on cpu, so wsbcn_d2 runs in"
    )
    assert reason in result.stdout


# -------------------------------------------------------------------------------------- computing


@needs_native_kernels
def test_they_are_what_runs_on_a_cpu(monkeypatch):
    monkeypatch.delenv("WSBCN_D2_BACKEND", raising=False)
    backend._kernels_of_device.cache_clear()
    assert backend_name(CPU) == "native"


@needs_native_kernels
def test_variance_is_around_a_mean_that_float32_cannot_hold():
    x = torch.tensor([1e7, 1e7 + 1]).repeat(1500).view(1, 1, 60, 50)
    for layout in (torch.contiguous_format, torch.channels_last):
        mean, var = moments(x.expand(1, 3, 60, 50).contiguous(memory_format=layout))
        assert set(mean.flatten().tolist()) <= {1e7, 1e7 + 1}
        assert var.flatten().tolist() == [0.25] * 3


@needs_native_kernels
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 3.1, 1e-3, 1e-5, 700.0])
def test_conversions_round_as_those_of_pytorch(dtype, factor):
    """Of all numbers that there are: to subnormal ones, to infinity, ties to even."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    tables = torch.zeros(2 + 5 + 1)  # of one channel, whose `scale` is the fifth
    tables[2 + 3] = factor
    y = native_backend.again(x.view(1, 1, 1, -1), tables, 1, "").flatten()
    expected = (x.float() * torch.tensor(factor)).to(dtype)
    known = x.isfinite()
    assert torch.equal(y[known], expected[known])
    assert torch.equal(y.isnan(), (x.float() - 0.0).isnan())


@needs_native_kernels
def test_residual_and_gradient_of_another_dtype():
    x, *rest = make_inputs((2, 6, 5, 7), 3, F32)
    residual, grad = torch.randn(2, 2, 6, 5, 7, dtype=BF16)
    x.requires_grad_()
    results = []
    for r, g in ((residual, grad), (residual.float(), grad.float())):
        y = batch_channel_norm(x, *rest, residual=r)
        results.append([y, *torch.autograd.grad(y, x, g.to(y.dtype))])
    torch.testing.assert_close(*results)


@needs_native_kernels
def test_gradient_without_memory_is_an_error():
    """As forward-mode derivatives make of zeros."""
    x, *rest = make_inputs((2, 6, 5, 7), 3, F32)
    _, tables = native_backend.forward(x, Normalization(*rest), None, "")
    options = {"y": None, "weight": rest[0], "group_weight": rest[2], "activation": ""}
    options.update(has_residual=False, synchronize=False)
    with pytest.raises(RuntimeError, match="without memory"):
        native_backend.backward(torch._efficientzerotensor(x.shape), x, tables, **options)


@needs_native_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_counter_of_another_dtype(dtype):
    x, *rest = make_inputs((2, 6, 5, 7), 3, F32)
    seen = torch.zeros((), dtype=dtype)
    norm = Normalization(*rest, update_rate=0.1, seen_elements=seen)
    native_backend.forward(x, norm, None, "")
    assert seen == 2 * 5 * 7


@needs_native_kernels
@pytest.mark.parametrize("kernels", [eager, native_backend])
def test_estimates_that_move_all_the_way_forget_where_they_were(kernels):
    x, *parameters, _, _ = make_inputs((2, 6, 3, 5), 2, F32)
    mean, var = torch.full((6,), 1e8), torch.full((6,), 1e8)
    kernels.forward(x, Normalization(*parameters, mean, var, update_rate=1.0), None, "")
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)


@needs_native_kernels
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_do_not_depend_on_the_number_of_threads(images, layout):
    """Some of which are more than there are groups."""
    shape = (images, 32, 80, 101)  # enough for several threads, and more than a block of pixels
    x, *rest = make_inputs(shape, 4, F32)
    inputs = [x.contiguous(memory_format=layout), *rest]
    options = {"residual": torch.randn(shape), "activation": "relu", "update_rate": 0.1}
    grad = torch.randn(shape)
    before = torch.get_num_threads()
    set_backend("native")
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs, grad, **options))
    finally:
        torch.set_num_threads(before)
        set_backend(None)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@needs_native_kernels
def test_module_of_doubled_precision_with_a_float32_input():
    norm = BatchChannelNorm(4, 2).double()
    x = torch.randn(1, 4, 3, 3)
    y = norm.eval()(x)
    torch.testing.assert_close(y, BatchChannelNorm(4, 2).eval()(x))


@needs_native_kernels
def test_weights_whose_mean_float32_cannot_hold():
    """Nor does the size of the values matter, where their cubes are none of float32."""
    far = torch.tensor([16000.0, 16000 + 1 / 512, 16000 + 1 / 512]).repeat(4, 99).view(4, 33, 3, 3)
    for weight in (far, torch.randn(4, 33, 3, 3) * 1e15):
        filters, statistics = native_backend.standardize(weight, 1e-12)
        exact = weight.double().requires_grad_()
        expected = standardized_weight(exact, 1e-12)
        torch.testing.assert_close(filters.double(), expected.detach(), rtol=2e-5, atol=2e-5)
        grad = torch.randn_like(weight)
        expected.backward(grad.double())
        of_weight = native_backend.standardize_backward(grad, weight, statistics)
        scale = exact.grad.abs().max()
        torch.testing.assert_close(
            of_weight / scale, (exact.grad / scale).float(), rtol=0, atol=1e-5
        )


@needs_native_kernels
def test_standardization_by_several_threads():
    """Which gives the same bits, and the gradient in the memory of that of the filters."""
    weight, grad = torch.randn(2, 64, 256, 3, 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            filters, statistics = native_backend.standardize(weight, 1e-5)
            own = grad.clone()
            result = native_backend.standardize_backward(own, weight, statistics)
            assert result.data_ptr() == own.data_ptr()
            results.append([filters, result])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[1:], [results[0]] * 2, rtol=0, atol=0)
