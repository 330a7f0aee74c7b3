"""Launches everything twice, with Triton's own launch code and by repetition, and compares the two.

They are repeated by Python, or by the extension (``with`` and ``without``, the only argument).

In a process of its own, without GPU and interpreter: Triton compiles for a GPU, and a driver notes
what comes to be launched, down to the compiled kernel.
"""

import contextlib
import ctypes
import hashlib
import sys
from unittest import mock

import torch
import triton
from torch.autograd.graph import saved_tensors_hooks
from triton.runtime import JITFunction, driver

from wsbcn_d2.benchmark import host
from wsbcn_d2.ops import (
    Link,
    batch_channel_norm,
    branch,
    set_backend,
    standardize_all,
    standardize_all_backward,
    triton_backend,
)
from wsbcn_d2.ops.extension import extension
from wsbcn_d2.ops.launch import _LAUNCHERS_ARE_KNOWN

LAUNCHED = []


class Launcher(host._Launcher):
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def launch(self, *args):
        # Of the launch itself all but what Triton makes anew for those that listen to launches.
        launch, arguments = args[:10], args[13:]
        arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        LAUNCHED.append(
            (self.name, launch, *(Address(a) if is_address(a) else a for a in arguments))
        )


def is_address(argument):
    return isinstance(argument, int) and argument > 2**24  # larger than any count here


def value_at(address):
    return ctypes.c_float.from_address(address).value


class Address(int):
    """With what was there first when the launch was made."""

    def __init__(self, address):
        self.value = value_at(address)


class Utilities(host._Utilities):
    def load_binary(self, name, binary, *_):
        module, _, *rest = super().load_binary()
        return (module, hashlib.sha256(binary).hexdigest(), *rest)


class NoDevice(host._NoDevice):
    launcher_cls = Launcher
    utils = Utilities()


def described(launched, tensors, copies=()):
    """Launches with addresses replaced by what lies there: one of the tensors, by name, or else,
    which are outputs and temporaries, by order. The compiled kernel, which is compared too, knows
    the type.

    ``copies``: values with which temporaries begin that are no outputs; they are their names.
    """
    names = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor is not None}

    def name(argument):
        if isinstance(argument, Address):
            value = argument.value
            names.setdefault(argument, value if value in copies else len(names))
            return names[argument], argument % 16
        return argument

    return [tuple(map(name, launch)) for launch in launched]


def at(offset, x):
    """A copy of x that begins so many elements after a multiple of 16 bytes."""
    out = torch.empty(x.numel() + offset, dtype=x.dtype).as_strided(x.shape, x.stride(), offset)
    assert out.data_ptr() % 16 == offset * x.element_size() % 16
    return out.copy_(x)


def layer(channels, groups, dtype, level):
    """Parameters, estimates and counters; of one of several levels, whose counters are no multiples
    of 16 bytes apart."""
    parameters = [torch.ones(c, dtype=dtype) for c in (channels, channels, groups, groups)]
    estimates = [torch.zeros(4, channels), torch.ones(4, channels)]
    seen = torch.zeros(4)
    return (
        [p.requires_grad_() for p in parameters] + [e[level] for e in estimates],
        {"skipped_updates": torch.tensor(0), "seen_elements": seen[level]},
    )


def step(shape, dtype, last, parameters, offset, level, options):
    """A forward and a backward pass, with new tensors as in every step of training."""
    options = dict(options)
    channels, groups = shape[1], options.pop("groups", 2)
    tensors, counters = layer(channels, groups, parameters, level)
    x = torch.randn(shape, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    options = {**options, **(counters if options["update_rate"] is not None else {})}
    if options.pop("residual", False):
        options["residual"] = at(offset, x)
    x = at(offset, x).requires_grad_()
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = batch_channel_norm(x, *tensors, **options)
    inputs = dict(enumerate([*tensors, *counters.values()]), x=x, residual=options.get("residual"))
    (tables,) = (t for t in saved if t.dim() == 1 and t.numel() > 2 * channels)
    for stream in (0, 1):
        inputs[f"flags of {stream}"] = triton_backend._flags(x.device, stream)
    forward = described(LAUNCHED, {**inputs, "y": y, "tables": tables})
    del LAUNCHED[:]
    grad = at(offset, torch.ones_like(y))
    y.backward(grad)
    outputs = {"y": y, "tables": tables, "grad": grad, "grad of x": x.grad}
    if shape[0] == 1 and dtype == parameters:  # otherwise these are not what kernels wrote
        outputs["grad of weight"] = tensors[0].grad
    return forward + described(LAUNCHED, {**inputs, **outputs})


def step_of_a_branch(shape, dtype, last, parameters, level):
    """The same of two convolutions, whose backward pass makes an output again."""
    links = []
    for _ in range(2):
        (*affine, mean, var), counters = layer(shape[1], 2, parameters, level)
        filters = torch.randn(shape[1], shape[1], 1, 1, dtype=dtype, requires_grad=True)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        state = (mean, var, counters["skipped_updates"], counters["seen_elements"])
        links.append(Link(filters, None, geometry, affine, state, 0.1, 1e-5, False, False))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = branch(x, links)
    y.backward(torch.ones_like(y))
    # What lies where is that of the single operations.
    return [
        tuple("address" if isinstance(a, Address) else a for a in launch) for launch in LAUNCHED
    ]


def step_of_filters(shapes, dtype, last, out_dtype, eps):
    """The same of filters that are standardized together."""
    weights = [torch.full(shape, 3.0, dtype=dtype) for shape in shapes]
    grads = [torch.full(shape, 5.0, dtype=out_dtype) for shape in shapes]
    if last:
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
        grads = [g.contiguous(memory_format=torch.channels_last) for g in grads]
    all_eps = [eps] * len(shapes)
    outputs, mean, rstd = standardize_all(weights, all_eps, out_dtype)
    assert [(o.shape, o.stride(), o.dtype) for o in outputs] == [
        (w.shape, w.stride(), out_dtype) for w in weights
    ]
    filters = triton_backend._filters(tuple(w.shape for w in weights), weights[0].device)
    of_eps = triton_backend._eps_of_filters(tuple(all_eps), tuple(shapes), weights[0].device)
    known = {"starts": filters.starts, "places": filters.places, "eps": of_eps}
    results = {"mean": mean, "rstd": rstd, **dict(enumerate(outputs))}
    copies = [value_at(weights[0].data_ptr()), value_at(grads[0].data_ptr())]
    forward = described(LAUNCHED, {**known, **results}, copies)
    del LAUNCHED[:]
    gradients = standardize_all_backward(grads, weights, mean, rstd)
    results = {"mean": mean, "rstd": rstd, **dict(enumerate(gradients))}
    return forward + described(LAUNCHED, {**known, **results}, copies)


UPDATE = {"update_rate": 0.1}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    # shape, dtype, channels_last, dtype of the parameters, offset of activations, level, options
    ((1, 8, 6, 5), F32, False, F32, 0, 0, UPDATE),
    ((1, 8, 6, 5), F32, False, F32, 0, 0, {"update_rate": 0.01}),
    ((1, 8, 6, 5), F32, False, F32, 0, 0, {"update_rate": None}),
    ((1, 8, 6, 5), F32, False, F32, 0, 0, {**UPDATE, "groups": 4}),
    ((1, 8, 6, 5), F32, False, F32, 0, 0, {"update_rate": 1, "eps": 1}),  # integers
    # Of these two only one can be read 16 bytes at a time.
    ((1, 8, 16, 16), F32, False, F32, 0, 0, UPDATE),
    ((1, 8, 16, 16), F32, False, F32, 1, 0, UPDATE),
    ((1, 8, 6, 5), F32, False, F32, 0, 1, UPDATE),
    ((1, 6, 6, 5), F32, False, F32, 0, 1, UPDATE),
    ((1, 8, 6, 5), BF16, True, F32, 0, 0, UPDATE),
    ((1, 8, 6, 5), BF16, True, BF16, 0, 0, UPDATE),
    ((1, 8, 6, 5), F16, True, F32, 3, 0, UPDATE),
    ((2, 8, 6, 5), F32, True, F32, 0, 0, {**UPDATE, "relu": True}),
    ((2, 8, 6, 5), F32, False, F32, 0, 0, {**UPDATE, "relu": True, "residual": True}),
    ((2, 8, 6, 5), F32, False, F32, 1, 0, {**UPDATE, "relu": True, "residual": True}),
    ((2, 8, 6, 5), F32, False, F32, 0, 0, {**UPDATE, "residual": True}),
    ((2, 8, 6, 5), F32, False, F32, 0, 0, {**UPDATE, "use_batch_statistics": True}),
    ((2, 6, 6, 5), F32, False, F32, 0, 0, {**UPDATE, "use_batch_statistics": True}),
    ((3, 8, 1, 1), F32, False, F32, 0, 0, UPDATE),
    ((1, 16, 100, 100), F32, False, F32, 0, 0, UPDATE),  # the pixels are divided
    ((64, 512, 2, 2), F32, False, F32, 0, 0, UPDATE),  # a kernel of its own pools the moments
]
BRANCHES = [
    ((1, 8, 6, 5), F32, False, F32, 0),
    ((1, 8, 6, 5), BF16, True, F32, 1),
    ((2, 16, 16, 16), F32, False, F32, 0),
    ((1, 16, 100, 100), F16, False, F16, 0),
]


FILTERS = [
    # shapes, dtype, channels_last, dtype of the standardized filters, eps
    ([(8, 4, 3, 3), (6, 8, 1, 1)], F32, False, F32, 1e-5),
    ([(8, 4, 3, 3), (6, 8, 1, 1)], F32, False, F32, 1e-3),
    ([(8, 4, 3, 3), (6, 8, 1, 1)], F32, True, F32, 1e-5),
    ([(8, 4, 3, 3), (6, 8, 1, 1)], F32, False, BF16, 1e-5),
    ([(5, 3, 3, 3), (6, 7, 1, 1)], F32, False, F32, 1e-5),  # with gaps between the results
    ([(6, 8, 1, 1), (8, 4, 3, 3)], F32, False, F32, 1e-5),
]


ALL = CASES + BRANCHES + FILTERS


def launches(case, repeated):
    del LAUNCHED[:]
    STREAM[0] = ALL.index(case) % 2
    make = step_of_filters if case in FILTERS else step_of_a_branch if case in BRANCHES else step
    with mock.patch("wsbcn_d2.ops.launch._COMPILED_KERNELS_REPEAT", repeated):
        return make(*case)


# The current one, which is another one for every second case.
STREAM = [0]


@contextlib.contextmanager
def hook():
    """Context in which someone wants to be told of launches."""
    hooks, listener = triton.knobs.runtime, lambda *_: None
    if hasattr(hooks.launch_enter_hook, "add"):
        hooks.launch_enter_hook.add(listener)
        yield
        hooks.launch_enter_hook.remove(listener)
    else:
        with mock.patch.object(hooks, "launch_enter_hook", listener):
            yield


def counted(function):
    """A list that gets longer with each call of the function, and that. (A mock would keep the
    arguments, and autograd would copy the gradients among them.)"""
    calls = []
    return calls, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)


def main(has_extension):
    assert not triton_backend.INTERPRETED
    with contextlib.ExitStack() as stack:
        driver.set_active(NoDevice())
        stack.enter_context(mock.patch("wsbcn_d2.ops.backend._triton_fails", lambda *_: False))
        set_backend("triton")
        assert (extension() is not None) == has_extension
        stack.enter_context(
            mock.patch.object(triton_backend, "current_stream", lambda _: STREAM[0])
        )
        stack.enter_context(mock.patch.object(NoDevice, "get_current_stream", lambda *_: STREAM[0]))
        expected = [launches(case, repeated=False) for case in ALL]
        run, counted_run = counted(JITFunction.run)
        stack.enter_context(mock.patch.object(JITFunction, "run", counted_run))
        in_python = []
        for name in ("dense", "_filters_launch"):  # one of which each pass calls
            calls, counted_function = counted(getattr(triton_backend, name))
            stack.enter_context(mock.patch.object(triton_backend, name, counted_function))
            in_python.append(calls)
        total, passes = 0, 0
        # All once to find the kernels, then in other orders.
        for case in ALL + ALL[::-1] + ALL:
            got = launches(case, repeated=True)
            assert got == expected[ALL.index(case)], (case, got)
            total += len(got)
            passes += 5 if case in BRANCHES else 2
        repeated = total - len(run)
        without_python = passes - sum(map(len, in_python))
        with hook():  # whom the extension does not tell
            assert launches(ALL[0], repeated=True) == expected[0]
        assert passes + 2 - sum(map(len, in_python)) == without_python
    print(f"{repeated} of {total} launches repeated")
    known = "known" if _LAUNCHERS_ARE_KNOWN else "not known"
    print(f"{without_python} of {passes} passes without Python; launchers are {known}")


if __name__ == "__main__":
    sys.exit(main(has_extension=sys.argv[1] == "with"))
