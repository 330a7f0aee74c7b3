"""The extension of PyTorch: that it computes what Python does, and how it comes to be."""

import contextlib
import errno
import gc
import itertools
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from ops.test_branch import Again, inputs, make_links
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from versions import needs_compile, needs_extension

from wsbcn_d2 import BatchChannelNorm
from wsbcn_d2.ops import branch
from wsbcn_d2.ops.extension import extension, load

pytestmark = needs_extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_python(monkeypatch):
    """A function that makes Python do the work until it is called again."""

    def switch(on):
        monkeypatch.setenv("WSBCN_D2_EXTENSION", "0" if on else "1")
        load.cache_clear()

    yield switch
    monkeypatch.undo()
    load.cache_clear()


def passes(dtype, parameters, batch, residual, relu, frozen, retained=False):
    """A forward pass and its backward passes: all that they give and change."""
    torch.manual_seed(0)
    x, added = inputs(3, dtype)
    links = make_links(3, dtype, batch=batch, parameters=parameters)
    leaves = [t for link in links for t in (link.filters, *link.parameters)]
    for leaf in leaves[::2] if frozen else []:
        leaf.requires_grad_(False)
    x.requires_grad_(not frozen)
    added = added.requires_grad_() if residual else None
    y = branch(x, links, added, relu)
    for last in (False, True) if retained else (True,):
        y.square().sum().backward(retain_graph=not last)
    grads = [t.grad for t in (x, *leaves, added) if t is not None]
    return [y.detach(), *grads, *(t for link in links for t in link.state)], y.grad_fn.name()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [False, True])
def test_same_bits_as_python(in_python, dtype, batch):
    kinds = list(itertools.product([False, True], repeat=4))
    for parameters in {dtype, torch.promote_types(dtype, torch.float32)}:
        for residual, relu, frozen, retained in kinds:
            results = []
            for on in (False, True):
                in_python(on)
                case = (dtype, parameters, batch, residual, relu, frozen, retained)
                results.append(passes(*case))
            (ours, name), (theirs, other_name) = results
            assert (name, other_name) == ("BranchBackward", "_BranchBackward")
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs):
                assert (a is None) == (b is None)
                assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)


def test_nothing_is_left_of_a_graph():
    """Neither of filters that are made again nor of what was saved."""
    x, residual = inputs(3, torch.float32)
    links = make_links(3, torch.float32)
    for backward in (False, True):
        again = [Again(link.filters) for link in links]
        refs = [weakref.ref(a) for a in again]
        y = branch(
            x, [link._replace(again=a) for link, a in zip(links, again)], residual.requires_grad_()
        )
        assert y.grad_fn.name() == "BranchBackward"
        if backward:
            y.sum().backward()
        del again, y
        gc.collect()
        assert [ref() for ref in refs] == [None] * 3


def test_saved_tensors_are_watched():
    layer = BatchChannelNorm(8, 2)
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    y = layer(x.clone())
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_error_of_python_comes_through():
    class Failing(Again):
        def filters(self):
            raise KeyError("no filters")

    x, residual = inputs(1, torch.float32)
    (link,) = make_links(1, torch.float32)
    y = branch(x, [link._replace(again=Failing(link.filters))], residual)
    with pytest.raises(KeyError, match="no filters"):
        y.sum().backward()


def test_tangents_are_refused():
    layer, x = BatchChannelNorm(8, 2), torch.randn(1, 8, 3, 3)
    with pytest.raises(RuntimeError, match="forward"):
        with torch.autograd.forward_ad.dual_level():
            layer(torch.autograd.forward_ad.make_dual(x, x))


@pytest.fixture
def compiled_autograd():
    module = pytest.importorskip("torch._dynamo.compiled_autograd")
    if not hasattr(module, "_enable"):
        pytest.skip("this PyTorch has no compiled autograd by this name")
    return lambda: module._enable(torch.compile(backend="eager"))


@needs_compile
def test_compiled_autograd_of_the_backward_pass_alone(compiled_autograd):
    y = BatchChannelNorm(8, 2)(torch.randn(1, 8, 3, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="set WSBCN_D2_EXTENSION=0 in the environment"):
        with compiled_autograd():
            y.sum().backward()


@needs_compile
def test_compiled_autograd(compiled_autograd):
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = BatchChannelNorm(8, 2)
        grad = torch.randn(x.shape)
        if enabled:
            with compiled_autograd():
                layer(x).backward(grad)
        else:
            layer(x).backward(grad)
        grads.append((x.grad, layer.weight.grad))
        x.grad = None
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_checkpointing(relu, has_residual):
    """Also where the backward pass is watched, so that Python repeats what the extension did."""
    layer = randomized(BatchChannelNorm(8, 2)).eval()
    x = torch.randn(1, 8, 8, 8, requires_grad=True)  # the last two like the first two
    residual = torch.randn(x.shape) if has_residual else None
    leaves = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x, residual, relu).square().sum(), leaves)
    for watch in (contextlib.nullcontext, profile):
        y = checkpoint(lambda x: layer(x, residual, relu) * 1.0, x, use_reentrant=False)
        assert y.grad_fn.next_functions[0][0].name() == "BatchChannelNormBackward"
        with watch():
            grads = torch.autograd.grad(y.square().sum(), leaves)
        torch.testing.assert_close(grads, plain)


def randomized(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    return layer


@pytest.mark.parametrize("of_branch", [False, True])
def test_order_of_saved_tensors_is_that_of_python(in_python, of_branch):
    orders = []
    for on in (False, True):
        in_python(on)
        torch.manual_seed(0)
        packed = []
        with saved_tensors_hooks(lambda t: packed.append(t.detach().clone()) or t, lambda t: t):
            if of_branch:
                x, residual = inputs(3, torch.float32)
                branch(x.requires_grad_(), make_links(3, torch.float32), residual)
            else:
                x = torch.randn(1, 8, 3, 3, requires_grad=True)
                BatchChannelNorm(8, 2)(x, torch.randn(x.shape), True)
        orders.append(packed)
    torch.testing.assert_close(*orders, rtol=0, atol=0)


@pytest.mark.parametrize("on", [False, True])
def test_gradient_that_does_not_come(in_python, on):
    """Is zeros, and not none: where ranks synchronize all must take part."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    in_python(on)
    layer, x = BatchChannelNorm(8, 2), torch.randn(1, 8, 3, 3, requires_grad=True)
    grads = torch.autograd.grad(NoGradient.apply(layer(x)).sum(), [x, *layer.parameters()])
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("on", [False, True])
def test_subclasses_stay_what_they_are(in_python, on):
    class Other(torch.Tensor):
        pass

    in_python(on)
    y = BatchChannelNorm(8, 2)(torch.randn(1, 8, 3, 3).as_subclass(Other))
    assert type(y) is Other


def test_cycle_through_filters_is_collected():
    x, residual = inputs(1, torch.float32)
    (link,) = make_links(1, torch.float32)
    again = Again(link.filters)
    y = branch(x, [link._replace(again=again)], residual)
    again.result, ref = y, weakref.ref(again)
    y.sum().backward()
    del again, y
    gc.collect()
    assert ref() is None


def test_branch_of_nothing():
    with pytest.raises(IndexError, match="at least one convolution"):
        branch(torch.ones(1, 8, 3, 3, requires_grad=True), [])


@pytest.fixture
def compiler(tmp_path, monkeypatch, fake_compiler):
    """Sets the compiler of C++; the cache is empty. ``copies`` is one that makes the extension."""

    def set_to(body):
        return fake_compiler("CXX", body)

    load()
    load.cache_clear()
    whole = load().__file__  # the one in the user's cache, also where the first has compiled it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    set_to.copies = f'{UNTIL_OUTPUT}; cp {whole} "$2"'
    load.cache_clear()
    yield set_to
    monkeypatch.undo()
    load.cache_clear()


def test_compiled_once_by_several_processes(compiler):
    """Which begin at the same time."""
    calls = compiler(f"case $1 in --version) ;; *) sleep 3 ;; esac; {compiler.copies}")
    script = "from wsbcn_d2.ops.extension import extension; print(extension().__name__)"
    command = [sys.executable, "-c", script]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs == ["wsbcn_d2_extension\n"] * 3
    lines = calls.read_text().splitlines()
    assert lines.count("--version") == 3 and len(lines) == 4


def test_without_locks(compiler, monkeypatch):
    """As some file systems of networks are: nobody waits for ever."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    compiler(compiler.copies)
    assert extension() is not None


def test_processes_that_waited_do_not_try_again(compiler):
    calls = compiler("test $1 = --version || { sleep 5; exit 1; }")
    script = "from wsbcn_d2.ops.extension import extension; print(extension())"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": path}
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == ["None\n"] * 2
    assert sum(line != "--version" for line in calls.read_text().splitlines()) == 1


def test_says_that_it_takes_time(compiler, caplog):
    compiler(compiler.copies)
    with caplog.at_level(logging.WARNING, "detectron2.wsbcn_d2"):
        assert extension() is not None
        load.cache_clear()
        assert extension() is not None
    assert [r.message for r in caplog.records] == [
        "Compiling the extension of PyTorch for BCN (once, about half a minute) ..."
    ]


UNTIL_OUTPUT = 'while [ "$1" != -o ]; do test $# = 0 && exit; shift; done'


@pytest.mark.parametrize(
    "body,reason",
    [
        ("exit 1", "failed with status 1"),
        ("test $1 = --version || { echo 'error: no Python.h'; exit 1; }", "error: no Python.h"),
        (f'{UNTIL_OUTPUT}; echo no >"$2"', "file too short"),
    ],
)
def test_falls_back_and_says_why_once(compiler, caplog, body, reason):
    compiler(body)
    layer, x = BatchChannelNorm(8, 2), torch.randn(1, 8, 3, 3, requires_grad=True)
    with caplog.at_level(logging.WARNING, "detectron2.wsbcn_d2"):
        for _ in range(2):
            assert layer(x).grad_fn.name() == "_BatchChannelNormBackward"
    (record,) = (r for r in caplog.records if not r.message.startswith("Compiling"))
    assert record.message.startswith("The extension of PyTorch cannot be compiled, so BCN and WS")
    assert reason in record.message


def test_without_a_cache(compiler, caplog, tmp_path):
    """It is not compiled in each process."""
    (tmp_path / "cache").touch()  # not a folder
    calls = compiler(compiler.copies)
    with caplog.at_level(logging.WARNING, "detectron2.wsbcn_d2"):
        assert extension() is None
    assert "there is no folder to keep what takes long to compile" in caplog.text
    assert calls.read_text() == "--version\n"


def test_environment_variable(compiler, monkeypatch):
    calls = compiler(compiler.copies)
    monkeypatch.setenv("WSBCN_D2_EXTENSION", "0")
    assert extension() is None
    assert not calls.exists()


def test_older_pytorch(monkeypatch):
    load.cache_clear()
    try:
        monkeypatch.setattr(torch, "__version__", "2.0.1+cu118")
        assert extension() is None
    finally:
        monkeypatch.undo()
        load.cache_clear()
