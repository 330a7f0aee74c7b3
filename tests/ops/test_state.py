"""What is asked of PyTorch by names that are not public: each is there, and means what it did."""

import ast
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from versions import needs_newer_torch

import wsbcn_d2
from wsbcn_d2.ops import state


class Asks(torch.autograd.Function):
    """Identity, whose backward pass notes what a function says there."""

    @staticmethod
    def forward(ctx, x, question, answers):
        ctx.question, ctx.answers = question, answers
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.answers.append(ctx.question(grad))
        return grad, None, None


@pytest.fixture
def x():
    return torch.randn(2, 3, requires_grad=True)


class Saves(torch.autograd.Function):
    """Identity, whose backward pass notes whether what it saved is gone."""

    @staticmethod
    def forward(ctx, x, answers):
        saved = x.clone()
        ctx.answers, ctx.saved = answers, weakref.ref(saved)
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors
        ctx.answers.append(ctx.saved() is None)
        state.free_saved_tensors(ctx)
        ctx.answers.append(ctx.saved() is None)
        return grad, None


def test_saved_tensors_are_freed(x):
    answers = []
    y = Saves.apply(x, answers).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert answers == [False, False, False, True]


def test_in_backward(x):
    answers = [state.in_backward()]
    Asks.apply(x, lambda grad: state.in_backward(), answers).sum().backward()
    answers.append(state.in_backward())
    assert answers == [False, True, False]


@needs_newer_torch
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_forward_pass_that_may_be_repeated(x, use_reentrant):
    answers = [(state.may_be_repeated(), state.in_backward())]

    def function(x):
        answers.append((state.may_be_repeated(), state.in_backward()))
        return x.sin()

    function(x)
    checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
    first, plainly, checkpointed, repeated = answers
    assert first == plainly == (False, False)
    assert checkpointed == (True, False) and repeated[1]
    with torch.no_grad():
        assert state.may_be_repeated()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not state.may_be_repeated()


def test_transformed(x):
    assert not state.is_transformed(x)
    answers = []
    torch.func.grad(lambda x: answers.append(state.is_transformed()) or x.sum())(x.detach())
    torch.func.vmap(lambda x: answers.append(state.is_transformed()) or x)(x.detach())
    y = Asks.apply(x, state.is_transformed, answers)
    torch.autograd.grad(y, x, torch.ones(4, 2, 3), is_grads_batched=True)
    assert answers == [True] * 3


class OwnTensor(torch.Tensor):
    pass


def test_plain(x):
    assert state.is_plain(x, torch.nn.Parameter(x))
    assert not state.is_plain(x, x.detach().as_subclass(OwnTensor))
    answers = []

    def function(x):
        answers.append(state.is_plain(x))
        return x * 2

    with FakeTensorMode():
        function(torch.ones(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        function(x.detach())
    make_fx(function)(x.detach())
    torch.jit.trace(function, x.detach(), check_trace=False)
    torch.func.vmap(function)(x.detach())
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
    assert answers == [False] * 6
    compiled = torch.compile(lambda x: x + state.is_compiling(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.detach()), x.detach() + 1)


def test_assertion():
    state.assert_soon(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        state.assert_soon(torch.tensor(False), "not fine")


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_hook",
        "register_module_forward_pre_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    ],
)
def test_hooks_on_all_modules(register):
    assert not state.all_modules_are_hooked()
    handle = getattr(torch.nn.modules.module, register)(lambda *_: None)
    try:
        assert state.all_modules_are_hooked()
    finally:
        handle.remove()
    assert not state.all_modules_are_hooked()


def private_names(path):
    """What a file takes from PyTorch by a name with an underscore before it. Attributes of modules
    and tensors (``module._buffers``) are not found: what these are, no file says."""
    tree, of_torch, found = ast.parse(path.read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = getattr(node, "module", None) or ""
            for name in node.names:
                if (source or name.name).split(".")[0] == "torch":
                    of_torch.add((name.asname or name.name).split(".")[0])
                    found |= {name.name} if name.name.startswith("_") or "._" in source else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in of_torch:
                found.add(node.attr)
    return found


def test_nothing_else_of_the_package_uses_such_names():
    root = Path(wsbcn_d2.__file__).parent
    found = {path.relative_to(root).as_posix(): private_names(path) for path in root.rglob("*.py")}
    assert {path for path, names in found.items() if names} == {"ops/state.py"}
    assert {"_current_level", "_global_forward_hooks"} <= found["ops/state.py"]
