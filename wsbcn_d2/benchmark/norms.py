"""Normalization layers side by side, on the activations of a Mask R-CNN R-50-FPN."""

import math
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from tqdm import tqdm

from ..layers import BatchChannelNorm
from .machine import describe_machine
from .measure import KernelClock, Times, copy_bandwidth, interleaved, saved_bytes, spread

Shape = Tuple[int, int, int, int]

# What is normalized for an image of 800 x 1333 pixels, which Detectron2 pads to 800 x 1344, and in
# the heads for 512 proposals of which 128 have masks (the most there are in training). Of the
# inputs of a stage's three layers, "in" is that of its first block before the stride. p6 has a
# normalization layer in other detectors.
SHAPES: Dict[str, Shape] = {
    "stem": (1, 64, 400, 672),
    "res2": (1, 64, 200, 336),
    "res2 out, p2": (1, 256, 200, 336),
    "res3 in": (1, 128, 200, 336),
    "res3": (1, 128, 100, 168),
    "res3 out": (1, 512, 100, 168),
    "res4 in, p3": (1, 256, 100, 168),
    "res4, p4": (1, 256, 50, 84),
    "res4 out": (1, 1024, 50, 84),
    "res5 in": (1, 512, 50, 84),
    "res5": (1, 512, 25, 42),
    "res5 out": (1, 2048, 25, 42),
    "p5": (1, 256, 25, 42),
    "p6": (1, 256, 13, 21),
    "box head": (512, 256, 7, 7),
    "mask head": (128, 256, 14, 14),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class ReferenceBatchChannelNorm(nn.Module):
    """Estimated BCN by the operations of the authors' code, one after the other.

    The operations are those of ``EstBN`` and ``BCNorm`` in the README of
    github.com/joe-siyuan-qiao/Batch-Channel-Normalization, less one: they read the update rate from
    the device at every call, which would stall a GPU.
    """

    def __init__(
        self, num_channels: int, num_groups: int, eps: float = 1e-5, update_rate: float = 0.1
    ) -> None:
        """
        Args:
            num_channels, num_groups, eps, update_rate: those of
                :class:`wsbcn_d2.BatchChannelNorm`.
        """
        super().__init__()
        self.eps = eps
        self.update_rate = update_rate
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.group_weight = nn.Parameter(torch.ones(num_groups))
        self.group_bias = nn.Parameter(torch.zeros(num_groups))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, C, H, W)

        Returns:
            Tensor of the same shape.
        """
        if self.training:
            self._update(x)
        z = (x - _column(self.running_mean)) / _column(torch.sqrt(self.running_var + self.eps))
        z = _column(self.weight) * z + _column(self.bias)
        images, groups = x.shape[0], self.group_weight.numel()
        z = z.reshape(1, images * groups, -1)
        z = torch.batch_norm(z, None, None, None, None, True, 0.0, self.eps, True)
        z = z.view(images, groups, -1)
        return (self.group_weight[:, None] * z + self.group_bias[:, None]).view(x.shape)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        channels = x.transpose(0, 1).reshape(x.shape[1], -1)
        mean = channels.mean(dim=1)
        deviation = channels - self.running_mean[:, None]
        var = (deviation * deviation).mean(dim=1)
        self.running_mean.mul_(1 - self.update_rate).add_(self.update_rate * mean)
        self.running_var.mul_(1 - self.update_rate).add_(self.update_rate * var)


class WithReLU(nn.Module):
    """BCN and ReLU in one operation."""

    def __init__(self, norm: BatchChannelNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, relu=True)


class ThenReLU(nn.Module):
    """A layer and, in an operation of its own and in place, as in Detectron2's ResNet, ReLU."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(x))


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


def _batch_channel_norm(mode: str) -> Callable[[int, int, torch.device], nn.Module]:
    return lambda channels, groups, device: BatchChannelNorm(channels, groups, mode=mode)


def _compiled_reference(channels: int, groups: int, device: torch.device) -> nn.Module:
    torch._dynamo.reset()  # each shape gets its own code, and none falls victim to a limit
    return torch.compile(ReferenceBatchChannelNorm(channels, groups), dynamic=False)


def _liger_group_norm(channels: int, groups: int, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    try:
        from liger_kernel.transformers.group_norm import LigerGroupNorm
    except ImportError as error:
        raise Unavailable(f"pip install liger-kernel ({error})") from error
    return LigerGroupNorm(channels, groups, eps=1e-5)


# By title, what builds the layer for a number of channels and groups.
CONTENDERS: Dict[str, Callable[[int, int, torch.device], nn.Module]] = {
    "BCN": _batch_channel_norm("estimate"),
    "BatchBCN": _batch_channel_norm("batch"),
    "BCN, ReLU": lambda *args: ThenReLU(_batch_channel_norm("estimate")(*args)),
    "BCN+ReLU": lambda *args: WithReLU(_batch_channel_norm("estimate")(*args)),
    "reference": lambda channels, groups, device: ReferenceBatchChannelNorm(channels, groups),
    "reference, compiled": _compiled_reference,
    "GroupNorm": lambda channels, groups, device: nn.GroupNorm(groups, channels),
    "GroupNorm, ReLU": lambda channels, groups, device: ThenReLU(nn.GroupNorm(groups, channels)),
    "BatchNorm2d": lambda channels, groups, device: nn.BatchNorm2d(channels),
    "FrozenBN": lambda channels, groups, device: FrozenBatchNorm2d(channels),
    "Liger GroupNorm": _liger_group_norm,
}
OURS = ("BCN", "BatchBCN", "BCN, ReLU", "BCN+ReLU")


def benchmark_norms(
    shapes: Dict[str, Shape],
    *,
    device: torch.device,
    dtypes: Sequence[str] = ("float32",),
    memory_formats: Sequence[str] = ("nchw",),
    contenders: Sequence[str] = tuple(CONTENDERS),
    repetitions: int = 15,
    warmup: int = 3,
    copy_mebibytes: int = 512,
    progress: bool = True,
) -> Dict[str, Any]:
    """Measures the forward and backward passes of layers in training mode.

    Args:
        shapes: of the inputs, by a title.
        device: where to run.
        dtypes: keys of DTYPES.
        memory_formats: keys of MEMORY_FORMATS.
        contenders: keys of CONTENDERS.
        repetitions, warmup: rounds, see :func:`~wsbcn_d2.benchmark.measure.interleaved`.
        copy_mebibytes: size of the tensor whose copy gives the bandwidth.
        progress: show a progress bar.

    Returns:
        What :mod:`wsbcn_d2.benchmark.report` shows, and JSON can hold: ``machine``, ``settings``,
        ``copy_bandwidth`` (bytes/s), ``skipped`` (contender -> reason), and ``rows``, one for each
        case and contender, with ``forward``, ``backward``, ``total`` and ``host`` (medians and
        quartiles of milliseconds), ``saved_bytes`` and, on a GPU, ``peak_bytes``.
    """
    cases = [(d, m, title) for d in dtypes for m in memory_formats for title in shapes]
    bandwidth = copy_bandwidth(device, copy_mebibytes)
    clock = KernelClock(device)
    rows: List[Dict[str, Any]] = []
    skipped: Dict[str, str] = {}
    total = len(cases) * len(contenders) * (repetitions + warmup)
    with tqdm(total=total, unit="run", disable=not progress, smoothing=0.05) as bar:
        for dtype, memory_format, title in cases:
            bar.set_description(f"{title}, {dtype}, {memory_format}")
            case = {
                "layer": title,
                "shape": list(shapes[title]),
                "dtype": dtype,
                "memory_format": memory_format,
            }
            x, grad = _tensors(shapes[title], DTYPES[dtype], MEMORY_FORMATS[memory_format], device)
            runs: Dict[str, Callable[[], Times]] = {}
            memory: Dict[str, Dict[str, int]] = {}
            for name in contenders:
                try:
                    module = _build(name, x)
                    memory[name] = _memory(module, x, grad)
                except Exception as error:
                    # Others may lack a compiler or a dtype, which must not end the benchmark.
                    if name in OURS:
                        raise
                    skipped.setdefault(name, _reason(error, case))
                    bar.update(repetitions + warmup)
                    continue
                runs[name] = _run(module, x, grad, clock)
            times = interleaved(runs, repetitions, warmup, on_run=bar.update)
            for name in runs:
                phases = {phase: spread(values) for phase, values in times[name].items()}
                rows.append({**case, "contender": name, **phases, **memory[name]})
    settings = {"repetitions": repetitions, "warmup": warmup, "copy_mebibytes": copy_mebibytes}
    return {
        "kind": "norms",
        "device": device.type,
        "machine": describe_machine(device),
        "settings": settings,
        "copy_bandwidth": bandwidth,
        "skipped": skipped,
        "rows": rows,
    }


def floor_ms(shape: Sequence[int], dtype: str, bandwidth: float) -> Dict[str, float]:
    """The time that moving the activation takes at the bandwidth of a copy, in milliseconds.

    Forward it is read for its statistics, then read and written; backward it and the gradient are
    read for the sums, then both are read and the gradient of the input is written.
    """
    pass_ms = math.prod(shape) * torch.finfo(DTYPES[dtype]).bits / 8 / bandwidth * 1e3
    return {"forward": 3 * pass_ms, "backward": 5 * pass_ms, "total": 8 * pass_ms}


def _column(table: Tensor) -> Tensor:
    return table.view(1, -1, 1, 1)


def _tensors(
    shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> Tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (
        torch.randn(shape, generator=generator, device=device)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    return x.requires_grad_(), grad


def _build(name: str, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    module = CONTENDERS[name](channels, math.gcd(32, channels), x.device).train().to(x.device)
    # In training with mixed precision parameters are of float32, which BatchNorm and BCN take;
    # GroupNorm on a GPU wants them in the dtype of its input.
    keeps = any(isinstance(m, (nn.BatchNorm2d, BatchChannelNorm)) for m in module.modules())
    return module if keeps else module.to(x.dtype)


def _inputs(module: nn.Module, x: Tensor) -> List[Tensor]:
    return [x, *(p for p in module.parameters() if p.requires_grad)]


def _memory(module: nn.Module, x: Tensor, grad: Tensor) -> Dict[str, int]:
    inputs = _inputs(module, x)
    for _ in range(2):  # the first time may compile
        torch.autograd.grad(module(x), inputs, grad)
    parameters = [*module.parameters(), *module.buffers()]
    memory = {"saved_bytes": saved_bytes(lambda: module(x), parameters)}
    if x.is_cuda:
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        torch.autograd.grad(module(x), inputs, grad)
        memory["peak_bytes"] = torch.cuda.max_memory_allocated(x.device) - before
    return memory


def _run(module: nn.Module, x: Tensor, grad: Tensor, clock: KernelClock) -> Callable[[], Times]:
    inputs = _inputs(module, x)

    def run() -> Times:
        y, forward, forward_host = clock(lambda: module(x))
        _, backward, backward_host = clock(lambda: torch.autograd.grad(y, inputs, grad))
        return {
            "forward": forward,
            "backward": backward,
            "total": forward + backward,
            "host": forward_host + backward_host,
        }

    return run


def _reason(error: Exception, case: Dict[str, Any]) -> str:
    if isinstance(error, Unavailable):
        return str(error)
    text = str(error).strip().splitlines()
    first = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return f"{case['layer']}, {case['dtype']}, {case['memory_format']}: {first}"
