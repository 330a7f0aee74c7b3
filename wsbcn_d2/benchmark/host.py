"""What the layers cost the host, which issues the work of a GPU: measured without one.

With one or two images a step a GPU is often done before the host has issued the next operation, and
the time of a step is that of the host. Here the inputs are tiny tensors on the CPU, so that next to
nothing but the calls takes time, and Triton compiles its kernels for a GPU and goes through all of
a launch but the last: its driver is replaced by one that has no device. The layers of this package
are measured with their extension of PyTorch, and as Python does without it.
"""

import contextlib
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from unittest import mock

import torch
import triton
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..layers import BatchChannelNorm, WSConv2d, is_convolution, standardize_, standardize_together
from ..modeling import fuse_
from ..ops import backend, extension, set_backend, triton_backend
from .machine import describe_machine
from .measure import Times, interleaved, spread

# Convolutions of a model, more or less, that are standardized together.
_CONVOLUTIONS = 30
_BLOCKS = 10  # of 3 convolutions each
_MULTIPROCESSORS = 132  # of an H100


class _Launcher:
    """Takes the arguments of a launch, and does nothing with them."""

    launches = 0
    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, *_: Any) -> None:
        pass

    def launch(self, *_: Any) -> None:
        _Launcher.launches += 1

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        kind = (self.launch_cooperative_grid, self.launch_pdl)
        self.launch(x, y, z, stream, function, *kind, None, None, *rest)


class _Utilities:
    def load_binary(self, *_: Any) -> Any:
        results = 1, 1, 32, 0, 1024  # module, function, registers, spills, threads
        return results[:4] if triton.__version__.startswith("3.3.") else results

    def get_device_properties(self, _: int) -> Dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": _MULTIPROCESSORS}


class _NoDevice:
    """A driver of Triton that compiles for an H100 and launches nothing."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    """Context in which tensors on the CPU go to the kernels, which leave their outputs as they are.

    Raises:
        RuntimeError: if Triton has been imported as an interpreter.
    """
    if triton_backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: there are no launches to measure")
    active = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
    patches = [
        mock.patch.object(driver, active, _NoDevice()),
        mock.patch.object(backend, "_triton_fails", lambda *_: False),
        mock.patch.object(triton_backend, "_multiprocessors", lambda _: _MULTIPROCESSORS),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        set_backend("triton")
        stack.callback(set_backend, None)
        yield


class _Activated(nn.Module):
    """A layer and ReLU: one operation with BCN, two with others."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, BatchChannelNorm):
            return self.norm(x, relu=True)
        return nn.functional.relu_(self.norm(x))


def _convolutions(conv: Callable[..., nn.Module]) -> nn.Module:
    convs = [conv(16, 16, 1, bias=False) for _ in range(_CONVOLUTIONS)]
    if conv is WSConv2d:
        standardize_together(convs)
    return nn.Sequential(*convs)


def _blocks(norm: Callable[[int], nn.Module], standardized: bool) -> nn.Module:
    blocks = [BottleneckBlock(16, 16, bottleneck_channels=16, norm=norm) for _ in range(_BLOCKS)]
    model = nn.Sequential(*blocks)
    if standardized:
        convs = [m for m in model.modules() if is_convolution(m)]
        standardize_together([standardize_(conv) for conv in convs])
    fuse_(model)
    return model


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def _batch_channel_norm(channels: int) -> nn.Module:
    return BatchChannelNorm(channels, 4)


def benchmark_host(repetitions: int = 300, warmup: int = 30) -> Dict[str, Any]:
    """Measures the host's time for layers in training.

    Args:
        repetitions, warmup: rounds, see :func:`~wsbcn_d2.benchmark.measure.interleaved`.

    Returns:
        ``machine``, and ``rows`` with ``layer``, ``forward`` and ``backward`` (medians and
        quartiles of microseconds for each layer), and ``launches``, of Triton, for both; for layers
        of this package also ``in_python``, with ``forward`` and ``backward`` without the extension.

    Raises:
        RuntimeError: if Triton has been imported as an interpreter.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _launching_nothing():
            return _measure(repetitions, warmup)
    finally:
        torch.set_num_threads(threads)


def _measure(repetitions: int, warmup: int) -> Dict[str, Any]:
    models: Dict[str, Tuple[Callable[[], nn.Module], int]] = {
        "GroupNorm": (lambda: nn.GroupNorm(32, 256), 1),
        "BCN": (lambda: BatchChannelNorm(256), 1),
        "GroupNorm, ReLU": (lambda: _Activated(nn.GroupNorm(32, 256)), 1),
        "BCN+ReLU": (lambda: _Activated(BatchChannelNorm(256)), 1),
        "Conv2d": (lambda: _convolutions(nn.Conv2d), _CONVOLUTIONS),
        "WSConv2d": (lambda: _convolutions(WSConv2d), _CONVOLUTIONS),
        "bottleneck block, GN": (lambda: _blocks(_group_norm, False), _BLOCKS),
        "bottleneck block, GN+WS": (lambda: _blocks(_group_norm, True), _BLOCKS),
        "bottleneck block, BCN": (lambda: _blocks(_batch_channel_norm, False), _BLOCKS),
        "bottleneck block, BCN+WS": (lambda: _blocks(_batch_channel_norm, True), _BLOCKS),
    }
    launches: Dict[str, List[int]] = {}
    runs = {}
    for name, (make, layers) in models.items():
        ours = "BCN" in name or "WS" in name
        for key in [name, _in_python(name)] if ours else [name]:
            model = make()
            x = torch.randn(1, 256 if layers == 1 else 16, 2, 2, requires_grad=True)
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            run = _run(model, x, optimizer, layers, launches.setdefault(key, []))
            runs[key] = run if key == name else _without_extension(run)
    times = interleaved(runs, repetitions, warmup)
    rows = []
    for name, (_, layers) in models.items():
        row = {"layer": name, **_spreads(times[name]), "launches": launches[name][-1] / layers}
        if _in_python(name) in times:
            row["in_python"] = _spreads(times[_in_python(name)])
        rows.append(row)
    machine = describe_machine(torch.device("cpu"))
    machine["software"] += f", Triton {triton.__version__}"
    return {"kind": "host", "machine": machine, "repetitions": repetitions, "rows": rows}


def _in_python(name: str) -> str:
    return f"{name}, in Python"


def _without_extension(run: Callable[[], Times]) -> Callable[[], Times]:
    def without() -> Times:
        with mock.patch.object(extension, "load", lambda: None):
            return run()

    return without


def _spreads(times: Dict[str, List[float]]) -> Dict[str, Dict[str, float]]:
    return {phase: spread(values) for phase, values in times.items()}


def _run(
    model: nn.Module,
    x: Tensor,
    optimizer: torch.optim.Optimizer,
    layers: int,
    launches: List[int],
) -> Callable[[], Times]:
    grad = torch.ones_like(x)

    def run() -> Times:
        before = _Launcher.launches
        start = time.perf_counter()
        y = model(x)
        middle = time.perf_counter()
        y.backward(grad)
        end = time.perf_counter()
        launches.append(_Launcher.launches - before)
        optimizer.step()  # the filters change
        optimizer.zero_grad()
        return {
            "forward": (middle - start) / layers * 1e6,
            "backward": (end - middle) / layers * 1e6,
        }

    return run


def markdown(results: Dict[str, Any]) -> str:
    """The results as a table."""
    lines = [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [
        "",
        "| layer | forward, µs (quartiles) | backward, µs (quartiles) | launches of Triton "
        "| forward, in Python | backward, in Python |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        cells = [*_cells(row), f"{row['launches']:.1f}", *_cells(row.get("in_python"))]
        lines.append(f"| {row['layer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(times: Optional[Dict[str, Dict[str, float]]]) -> List[str]:
    if times is None:
        return ["", ""]
    return [
        f"{times[phase]['median']:.0f} ({times[phase]['q1']:.0f}–{times[phase]['q3']:.0f})"
        for phase in ("forward", "backward")
    ]
