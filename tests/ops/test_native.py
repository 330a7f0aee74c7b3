"""The kernels in C: how they are compiled, and what they share with those in plain PyTorch."""

import functools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from ops.cases import make_inputs, run
from versions import needs_c_compiler

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.ops import (
    backend,
    backend_name,
    batch_channel_norm,
    eager,
    native_backend,
    native_library,
    set_backend,
    standardize_all_backward,
)
from wsbcn_d2.ops.extension import load

pytestmark = needs_c_compiler

CPU = torch.device("cpu")
# What the message begins with.
SLOWER = "Kernels in C cannot be used on cpu, so BCN and WS run in plain PyTorch there"


@pytest.fixture
def compiler(fake_compiler):
    """Sets the compiler of C."""
    return functools.partial(fake_compiler, "CC")


def begin_anew():
    """As if the process had just started."""
    native_library.library.cache_clear()
    load.cache_clear()
    backend._native_fails.cache_clear()
    set_backend(None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache, empty, and a process that has not looked into it."""
    monkeypatch.delenv("WSBCN_D2_BACKEND", raising=False)
    monkeypatch.setenv("WSBCN_D2_EXTENSION", "0")  # which would be compiled there, too
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begin_anew()
    yield tmp_path / "cache"
    monkeypatch.undo()
    begin_anew()


def test_compiled_once(cache, compiler):
    calls = compiler('exec cc "$@"')
    for _ in range(2):
        begin_anew()
        assert backend_name(CPU) == "native"
        BatchChannelNorm(4, 2)(torch.ones(1, 4, 2, 2))
    lines = calls.read_text().splitlines()
    assert lines.count("--version") == 2 and len(lines) == 3
    assert [path.suffix for path in (cache / "wsbcn_d2").iterdir()] == [".so"]


def test_another_compiler_makes_another_library(cache, compiler):
    for body in ('exec cc "$@"', 'test "$1" = --version && echo 2 || exec cc "$@"'):
        compiler(body)
        begin_anew()
        assert backend_name(CPU) == "native"
    assert len(list((cache / "wsbcn_d2").iterdir())) == 2


@pytest.mark.parametrize("has", ["no library", "another library"])
def test_damaged_library_is_compiled_anew(cache, has):
    assert backend_name(CPU) == "native"
    (library,) = (cache / "wsbcn_d2").iterdir()
    whole = library.read_bytes()
    library.unlink()  # which this process has open
    if has == "no library":
        library.write_bytes(b"not a library")
    else:
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", library], check=True)
    begin_anew()
    assert backend_name(CPU) == "native"
    assert library.stat().st_size == len(whole)


def test_cache_that_cannot_be_written(cache, compiler):
    cache.touch()  # not a folder
    calls = compiler('exec cc "$@"')
    assert backend_name(CPU) == "native"
    library = Path(calls.read_text().split(" -o ")[1].split()[0])
    assert not library.parent.exists()  # nothing is left behind


def test_cache_that_others_can_write(cache):
    """Whoever does decides what this process runs."""
    assert backend_name(CPU) == "native"
    (library,) = (cache / "wsbcn_d2").iterdir()
    library.unlink()
    library.parent.chmod(0o777)
    begin_anew()
    assert backend_name(CPU) == "native"
    assert not any(library.parent.iterdir())


def test_cache_that_keeps_nothing(cache, monkeypatch):
    replace = os.replace

    def fail_there(source, target):
        if cache in Path(target).parents:
            raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_there)
    assert backend_name(CPU) == "native"
    assert not any((cache / "wsbcn_d2").iterdir())


def test_compiler_of_blanks_is_none(cache, monkeypatch):
    monkeypatch.setenv("CC", "  ")
    assert backend_name(CPU) == "native"


@pytest.mark.parametrize("change", ["device", "dtype"])
def test_defaults_of_torch_do_not_matter(cache, compiler, change):
    compiler('exec cc "$@"')
    defaults = torch.get_default_dtype()
    try:
        if change == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        assert backend_name(CPU) == "native"
        assert any(cache.glob("wsbcn_d2/*.so"))
    finally:
        torch.set_default_dtype(defaults)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "body,reason",
    [
        ("echo lost; exit 3", "compiler failed with status 3: lost"),
        (
            'test "$1" = --version || { echo before; echo internal error; echo after; exit 4; }',
            "compiler failed with status 4: internal error",
        ),
        ("exit 0", "OSError"),  # makes nothing
        ('exec cc -Dsqrtf=fabsf "$@"', "the compiled kernels compute something else than PyTorch"),
        ("CC=/no/such/compiler -m64", "RuntimeError: there is no C compiler (/no/such/compiler)"),
        ("CC='cc", "RuntimeError: CC='cc is not a command: No closing quotation"),
    ],
)
def test_falls_back_and_says_why_once(cache, compiler, caplog, monkeypatch, body, reason):
    if body.startswith("CC="):
        monkeypatch.setenv("CC", body[3:])
    else:
        compiler(body)
    monkeypatch.setattr(backend.logger, "propagate", True)
    norm = BatchChannelNorm(4, 2)
    for _ in range(2):
        norm(torch.ones(1, 4, 2, 2)).sum().backward()
        set_backend(None)  # looks for kernels again
    assert backend_name(CPU) == "eager"
    (message,) = caplog.messages
    assert message.startswith(SLOWER) and reason in message
    if "compute something else" not in reason:
        assert not any(cache.glob("wsbcn_d2/*"))


def test_variance_is_around_a_mean_that_float32_cannot_hold():
    x = torch.tensor([1e7, 1e7 + 1]).repeat(1500).view(1, 1, 60, 50)
    mean, var = native_backend.moments(x)
    assert mean.item() in (1e7, 1e7 + 1) and var.item() == 0.25


@pytest.mark.parametrize(
    "wrong,of",
    [(i, "another size") for i in range(7)] + [(i, "another device") for i in range(6)],
)
def test_arguments_that_do_not_fit_are_errors(wrong, of):
    """Not reads of memory that is not theirs."""
    x, *rest = make_inputs((2, 6, 5, 7), 3, torch.float32)
    rest.append(torch.randn(2, 6, 5, 7))
    if of == "another device":
        rest[wrong] = rest[wrong].to("meta")
    else:
        rest[wrong] = rest[wrong][..., :-1].contiguous()
    *rest, residual = rest
    with pytest.raises(RuntimeError):
        native_backend.batch_channel_norm_forward(
            x, residual, *rest, None, None, 0.1, 1e-5, False, False, False
        )


def test_gradients_that_do_not_fit_are_errors():
    x, *rest = make_inputs((2, 6, 5, 7), 3, torch.float32)
    options = (None, None, None, 1e-5, False, False, False)
    _, tables = native_backend.batch_channel_norm_forward(x, None, *rest, *options)
    for wrong in (torch.randn(2, 6, 5, 6), torch.randn(2, 6, 5, 7, device="meta")):
        with pytest.raises(RuntimeError):
            native_backend.batch_channel_norm_backward(
                wrong, x, None, rest[0], rest[2], tables, False, False, False
            )
    filters = torch.randn(4, 3, 2, 2)
    _, mean, rstd = native_backend.standardize_forward([filters], [1e-5], torch.float32)
    with pytest.raises(RuntimeError, match="gradient of shape"):
        standardize_all_backward([filters[:, :2]], [filters], mean, rstd)
    with pytest.raises(RuntimeError):
        native_backend.standardize_backward([filters.to("meta")], [filters], mean, rstd)
    with pytest.raises(RuntimeError):
        native_backend.standardize_forward([filters, filters.to("meta")], [0, 0], torch.float32)


def test_gradient_without_memory():
    """As some operations make of zeros."""
    x, *rest = make_inputs((2, 6, 5, 7), 3, torch.float32)
    options = (None, None, None, 1e-5, False, False, False)
    _, tables = native_backend.batch_channel_norm_forward(x, None, *rest, *options)
    grad = torch._efficientzerotensor(x.shape)
    results = native_backend.batch_channel_norm_backward(
        grad, x, None, rest[0], rest[2], tables, False, False, False
    )
    assert not results[0].any() and not results[2].any()


def test_residual_of_another_dtype():
    x, *rest = make_inputs((2, 6, 5, 7), 3, torch.float32)
    residual = torch.randn(x.shape, dtype=torch.bfloat16)
    y = [batch_channel_norm(x, *rest, residual=r) for r in (residual, residual.float())]
    torch.testing.assert_close(y[0], y[1])


@pytest.mark.parametrize("kernels", [eager, native_backend])
def test_estimates_that_move_all_the_way_forget_where_they_were(kernels):
    x, *parameters, _, _ = make_inputs((2, 6, 3, 5), 2, torch.float32)
    mean, var = torch.full((6,), 1e8), torch.full((6,), 1e8)
    options = (1.0, 1e-5, False, False, False)
    kernels.batch_channel_norm_forward(x, None, *parameters, mean, var, None, None, *options)
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(images):
    """Some of which are more than there are groups."""
    shape = (images, 32, 80, 101)  # enough for several threads, and more than a block of pixels
    inputs = make_inputs(shape, 4, torch.float32)
    options = {"residual": torch.randn(shape), "relu": True, "update_rate": 0.1}
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


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("has_residual,relu", [(False, True), (True, True), (True, False)])
def test_either_finishes_what_the_other_began(batch, has_residual, relu):
    """As when a gradient comes in channels_last and a dtype that the compiled kernels leave."""
    x, *parameters, mean, var = make_inputs((2, 6, 5, 7), 3, torch.float32)
    residual = torch.randn_like(x) if has_residual else None
    grad = torch.randn_like(x)
    results = []
    for forward in (native_backend, eager):
        y, tables = forward.batch_channel_norm_forward(
            x, residual, *parameters, mean, var, None, None, None, 1e-5, batch, relu, False
        )
        for backward in (native_backend, eager):
            of_x, of_residual, of_parameters = backward.batch_channel_norm_backward(
                grad, x, y, parameters[0], parameters[2], tables, relu, has_residual, False
            )
            again = backward.batch_channel_norm_again(x, tables, 3, relu)
            found = [y, of_x, of_parameters, again]
            results.append(found if of_residual is None else [*found, of_residual])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
