"""Measures normalization layers side by side, on the activations of a Mask R-CNN R-50-FPN.

For each input: time of the forward and backward pass in training, the share of the time that moving
the activation would take at the bandwidth of a copy, and what is saved for the backward pass.
"""

import math
import sys
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wsbcn_d2 import BatchChannelNorm

from . import results
from .measure import (
    KernelClock,
    Times,
    copy_bandwidth,
    interleaved,
    keep_freed_memory,
    saved_bytes,
    spread,
)

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
_QUICK = ("p5", "p6")
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


def _compiled_reference(channels: int, groups: int) -> nn.Module:
    torch._dynamo.reset()  # each shape gets its own code, and none falls victim to a limit
    return torch.compile(ReferenceBatchChannelNorm(channels, groups), dynamic=False)


# By title, what builds the layer for a number of channels and groups.
CONTENDERS: Dict[str, Callable[[int, int], nn.Module]] = {
    "BCN": lambda channels, groups: BatchChannelNorm(channels, groups),
    "GroupNorm": lambda channels, groups: nn.GroupNorm(groups, channels),
    "BatchNorm2d": lambda channels, groups: nn.BatchNorm2d(channels),
    "reference": ReferenceBatchChannelNorm,
    "reference, compiled": _compiled_reference,
}
OURS = "BCN"
# Those that are always measured, as others are compared with them.
_ALWAYS = (OURS, "GroupNorm", "reference")
# The compiled one needs a compiler, and seconds for each input.
DEFAULT_CONTENDERS = tuple(CONTENDERS)[:-1]


def benchmark_layers(
    shapes: Dict[str, Shape],
    *,
    device: torch.device,
    dtypes: Sequence[str] = tuple(DTYPES),
    memory_formats: Sequence[str] = tuple(MEMORY_FORMATS),
    contenders: Sequence[str] = DEFAULT_CONTENDERS,
    repetitions: int = 15,
    warmup: int = 3,
    copy_mebibytes: int = 512,
    progress: bool = True,
) -> results.Results:
    """Measures the forward and backward passes of layers in training mode.

    Args:
        shapes: of the inputs, by a title.
        device: where to run.
        dtypes: keys of DTYPES.
        memory_formats: keys of MEMORY_FORMATS.
        contenders: keys of CONTENDERS; BCN, GroupNorm and reference are measured in any case.
        repetitions, warmup: rounds, see :func:`~benchmarks.measure.interleaved`.
        copy_mebibytes: size of the tensor whose copy gives the bandwidth; more than caches hold.
        progress: show a progress bar.

    Returns:
        What :mod:`benchmarks.page` shows, and JSON can hold: :func:`benchmarks.results.describe`,
        ``settings``, ``copy_bandwidth`` (bytes/s), and ``rows``, one for each case and contender,
        with ``forward``, ``backward``, ``total`` and ``host`` (medians and quartiles of
        milliseconds; the last one is that of issuing the work), ``saved_bytes`` and, on a GPU,
        ``peak_bytes``.
    """
    described = results.describe(device)
    contenders = [name for name in CONTENDERS if name in (*_ALWAYS, *contenders)]
    cases = [(d, m, title) for d in dtypes for m in memory_formats for title in shapes]
    bandwidth = copy_bandwidth(device, copy_mebibytes)
    clock = KernelClock(device)
    rows: List[Dict[str, Any]] = []
    total = len(cases) * len(contenders) * (repetitions + warmup)
    with tqdm(total=total, unit="run", disable=not progress, smoothing=0.05) as bar:
        for dtype, memory_format, title in cases:
            bar.set_description(f"{title}, {dtype}, {memory_format}")
            x, grad = _tensors(shapes[title], DTYPES[dtype], MEMORY_FORMATS[memory_format], device)
            layers = {name: _build(name, x) for name in contenders}
            memory = {name: _memory(layer, x, grad) for name, layer in layers.items()}
            runs = {name: _run(layer, x, grad, clock) for name, layer in layers.items()}
            times = interleaved(runs, repetitions, warmup, on_run=bar.update)
            for name in layers:
                row = {"layer": title, "shape": list(shapes[title])}
                row.update(dtype=dtype, memory_format=memory_format, contender=name)
                row.update({phase: spread(values) for phase, values in times[name].items()})
                rows.append({**row, **memory[name]})
    settings = {"repetitions": repetitions, "warmup": warmup, "copy_mebibytes": copy_mebibytes}
    return {
        "kind": "layers",
        **described,
        "settings": settings,
        "copy_bandwidth": bandwidth,
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
    module = CONTENDERS[name](channels, math.gcd(32, channels)).train().to(x.device)
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


def main() -> int:
    parser = results.parser(__doc__, repetitions=15)
    results.add_device(parser)
    for option, choices, default in (
        ("--layers", SHAPES, SHAPES),
        ("--dtypes", DTYPES, DTYPES),
        ("--memory-formats", MEMORY_FORMATS, MEMORY_FORMATS),
        ("--contenders", CONTENDERS, DEFAULT_CONTENDERS),
    ):
        help_text = f"of {', '.join(choices)}"
        parser.add_argument(
            option, nargs="+", choices=choices, default=list(default), metavar="X", help=help_text
        )
    args = parser.parse_args()
    try:
        path = results.check(args, f"layers-{args.device}.json")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    keep_freed_memory()
    measured = benchmark_layers(
        {name: SHAPES[name] for name in (_QUICK if args.quick else args.layers)},
        device=torch.device(args.device),
        dtypes=args.dtypes,
        memory_formats=args.memory_formats,
        contenders=args.contenders,
        repetitions=args.repetitions,
        warmup=args.warmup,
        copy_mebibytes=16 if args.quick else 512,
    )
    results.write(measured, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
