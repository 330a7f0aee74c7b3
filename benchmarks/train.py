"""Measures training steps (forward, backward, SGD), one model for each normalization.

Time, what the forward pass saves for the backward pass, and the peak of memory.
"""

import contextlib
import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from wsbcn_d2 import checkpoint_activations_, model_zoo
from wsbcn_d2.engine import load_config

from . import results
from .measure import LiveBytes, Times, interleaved, spread, wall_time

Batch = List[Dict[str, Any]]
Size = Tuple[int, int]


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        config: with a place for ``gn_ws`` or ``bcn_ws``.
        size: default height and width of images, in pixels.
        threads: default number of threads on a CPU; None for all.
    """

    config: str
    size: Size
    threads: Optional[int] = None


MODELS = {
    # The one of the demo.
    "R-18-FPN": Model("Digits-InstanceSegmentation/mask_rcnn_R_18_FPN_{}.yaml", (192, 192), 1),
    "R-50-FPN": Model("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_{}_1x_1img.yaml", (256, 256)),
    "RetinaNet-R-50-FPN": Model("COCO-Detection/retinanet_R_50_FPN_{}_1x_1img.yaml", (256, 256)),
}
# The keys of MODEL whose NORM these models have.
NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET")
# By title, the norm, and what is checkpointed.
CONTENDERS = {
    "GN": ("GN", ""),
    "GN+WS": ("GN+WS", ""),
    "BCN": ("BCN", ""),
    "BCN+WS": ("BCN+WS", ""),
    "BCN+WS, checkpointed": ("BCN+WS", "all"),
}
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_OBJECTS = 8  # in each image
_CLASSES = 10  # of them; no model has fewer


def benchmark_train(
    model: str,
    contenders: Sequence[str] = tuple(CONTENDERS),
    *,
    device: torch.device,
    sizes: Sequence[Size],
    images: int = 1,
    amp: Optional[str] = None,
    channels_last: bool = False,
    opts: Sequence[str] = (),
    repetitions: int = 10,
    warmup: int = 2,
    progress: bool = True,
) -> results.Results:
    """Measures training steps.

    Every model starts from random weights with nothing frozen, sees the same images and objects,
    and gets the same proposals, so that its heads have as much to do as those of every other. The
    learning rate is 0: a step does all its work, and the next one sees the same weights.

    Args:
        model: key of MODELS.
        contenders: keys of CONTENDERS.
        device: where to run.
        sizes: heights and widths of images in pixels. With several, steps take turns, and times are
            means over them.
        images: in a step.
        amp: key of AMP_DTYPES for training under autocast.
        channels_last: memory format of models and activations.
        opts: alternating config keys and values, for all models.
        repetitions, warmup: rounds, see :func:`~benchmarks.measure.interleaved`.
        progress: show a progress bar.

    Returns:
        What :mod:`benchmarks.page` shows, and JSON can hold: :func:`benchmarks.results.describe`,
        ``settings``, and ``rows``, one for each contender, with ``step`` (median and quartiles of
        milliseconds), ``saved_bytes`` and ``peak_bytes`` of the largest step
        (:meth:`Trainee.memory`), and on a GPU ``kernels_ms`` (:func:`kernel_time`).
    """
    described = results.describe(device)
    trainees = {}
    for name in contenders:
        norm, checkpointed = CONTENDERS[name]
        trainees[name] = Trainee(config(model, norm, device, opts), amp, channels_last)
        checkpoint_activations_(trainees[name].model, checkpointed)
    batches = [make_batch(images, size, device) for size in sizes]
    rows: List[Dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for trainee in trainees.values():
            stack.enter_context(fixed_heads(trainee.model, batches))
        runs = {name: _run(trainee, batches, device) for name, trainee in trainees.items()}
        total = len(runs) * (repetitions + warmup)
        with tqdm(total=total, unit="run", disable=not progress) as bar:
            times = interleaved(runs, repetitions, warmup, on_run=bar.update)
        for name, trainee in trainees.items():
            row: Dict[str, Any] = {"contender": name, "images": images}
            row["step"] = spread(times[name]["step"])
            memory = [trainee.memory(batch) for batch in batches]
            row.update({k: max(m[k] for m in memory) for k in ("saved_bytes", "peak_bytes")})
            if device.type == "cuda":
                row["kernels_ms"] = kernel_time(runs[name]) / len(batches)
            rows.append(row)
    settings = {"model": model, "sizes": [list(size) for size in sizes], "amp": amp}
    settings.update(
        channels_last=channels_last, opts=list(opts), repetitions=repetitions, warmup=warmup
    )
    return {"kind": "train", **described, "settings": settings, "rows": rows}


def config(model: str, norm: str, device: torch.device, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a model.

    Args:
        model: key of MODELS.
        norm: option for all its layers.
        device: where it is.
        opts: alternating config keys and values.
    """
    file = MODELS[model].config.format("bcn_ws" if "BCN" in norm else "gn_ws")
    fixed = {"WEIGHTS": "", "BACKBONE.FREEZE_AT": "0", "DEVICE": str(device)}
    fixed.update({f"{key}.NORM": norm for key in NORM_KEYS})
    own = [text for key, value in fixed.items() for text in (f"MODEL.{key}", value)]
    path = model_zoo.get_config_file(file)
    return load_config(path, [*own, "SOLVER.BASE_LR", "0.0", *opts], needs=())


class Trainee:
    """A model with what a training step needs.

    Attributes:
        model: built from the config, with a fixed seed, in training mode.
        optimizer: Detectron2's SGD for the model; its momentum is there before the first step.
    """

    def __init__(
        self, cfg: CfgNode, amp: Optional[str] = None, channels_last: bool = False
    ) -> None:
        """
        Args:
            cfg: the config of model and solver.
            amp: key of AMP_DTYPES.
            channels_last: memory format of the model.
        """
        torch.manual_seed(0)
        self.model = build_model(cfg)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(cfg, self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._update()
        self._device = torch.device(cfg.MODEL.DEVICE)
        self._autocast = AMP_DTYPES.get(amp or "")

    def loss(self, batch: Batch) -> Tensor:
        """The forward pass."""
        enabled = self._autocast is not None
        with EventStorage(), torch.autocast(self._device.type, self._autocast, enabled):
            return sum(self.model(batch).values())

    def update(self, loss: Tensor) -> None:
        """Backward pass and step of the optimizer."""
        loss.backward()
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Batch) -> None:
        """A training step."""
        self.update(self.loss(batch))

    def state_bytes(self) -> int:
        """Memory that the model and its optimizer hold between two steps."""
        state = (value for values in self.optimizer.state.values() for value in values.values())
        tensors = itertools.chain(self.model.parameters(), self.model.buffers(), state)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def memory(self, batch: Batch) -> Dict[str, Any]:
        """Measures a step. On a CPU its convolutions are skipped.

        Returns:
            ``saved_bytes``: what the forward pass leaves behind for the backward pass.
            ``peak_bytes``: the most that exists at once, with model, gradients and optimizer. On a
            GPU, all memory of its allocator; on a CPU, that of tensors, without the workspaces of
            kernels.
            ``at_peak``, on a CPU only: bytes of what is there then, by name.
        """
        state = self.state_bytes()
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            loss = self.loss(batch)
            saved = torch.cuda.memory_allocated(self._device) - before
            self.update(loss)
            peak = torch.cuda.max_memory_allocated(self._device) - before
            return {"saved_bytes": saved, "peak_bytes": state + peak}
        with LiveBytes(skip_convolutions=True) as live:
            loss = self.loss(batch)
            saved = live.current
            self.update(loss)
        at_peak = {"parameters, momentum": state, **live.at_peak()}
        return {"saved_bytes": saved, "peak_bytes": state + live.peak, "at_peak": at_peak}


def kernel_time(function: Callable[[], Any]) -> float:
    """The milliseconds in which a kernel ran on the GPU (one at a time): what the function would
    take if the GPU never waited for the host."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    on_gpu = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return sum(event.device_time for event in on_gpu) / 1e3


def make_batch(images: int, size: Size, device: torch.device, bitmasks: bool = False) -> Batch:
    """Images of noise, each with the same number of elliptic objects at random places.

    Args:
        images: how many.
        size: height and width in pixels.
        device: where the tensors are, so that no copy is measured.
        bitmasks: the masks are as ``INPUT.MASK_FORMAT: "bitmask"`` has them, and not polygons.

    Returns:
        Inputs of a Detectron2 model in training.
    """
    height, width = size
    generator = torch.Generator().manual_seed(0)
    angles = torch.linspace(0, 2 * math.pi, 65)[:-1]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    batch = []
    for _ in range(images):
        boxes = _random_boxes(_OBJECTS, size, generator)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, _CLASSES, (_OBJECTS,), generator=generator)
        center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        ellipses = center[:, None] + radius[:, None] * circle
        polygons = [[ellipse.flatten().double().numpy()] for ellipse in ellipses]
        if bitmasks:
            instances.gt_masks = BitMasks.from_polygon_masks(polygons, height, width)
        else:
            instances.gt_masks = PolygonMasks(polygons)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image.to(device), "instances": instances.to(device)})
    return batch


def make_proposals(gt_boxes: Tensor, size: Tuple[int, int], count: int) -> Instances:
    """Proposals of which enough overlap with an object, as those of a trained model do.

    A third are objects moved by at most a twentieth of their size, which leaves them an overlap
    (IoU) of 0.8 or more; the rest are random.

    Args:
        gt_boxes: boxes of the objects, (n, 4).
        size: height and width of the image in pixels.
        count: number of proposals.
    """
    generator = torch.Generator().manual_seed(1)
    near = gt_boxes.cpu().repeat(-(-count // (3 * len(gt_boxes))), 1)[: count // 3]
    shift = 0.1 * torch.rand(len(near), 2, generator=generator) - 0.05
    near = near + (shift * (near[:, 2:] - near[:, :2])).repeat(1, 2)
    boxes = Boxes(torch.cat([near, _random_boxes(count - len(near), size, generator)]))
    boxes.clip(size)
    logits = torch.zeros(count)
    proposals = Instances(size, proposal_boxes=boxes, objectness_logits=logits)
    return proposals.to(gt_boxes.device)


@contextlib.contextmanager
def fixed_heads(model: nn.Module, batches: Sequence[Batch]) -> Iterator[None]:
    """Makes what the heads of an R-CNN have to do in training independent of its weights, and
    leaves other models alone.

    The proposal generator does its work, but the heads get the proposals of :func:`make_proposals`,
    as many as it would select.

    Args:
        model: in training mode.
        batches: all that it will see, each with images of another size.
    """
    if not hasattr(model, "proposal_generator"):
        yield
        return
    count = model.proposal_generator.post_nms_topk[True]  # of training
    proposals = {
        batch[0]["instances"].image_size: [
            make_proposals(i["instances"].gt_boxes.tensor, i["instances"].image_size, count)
            for i in batch
        ]
        for batch in batches
    }
    handle = model.proposal_generator.register_forward_hook(
        lambda module, inputs, outputs: (proposals[tuple(inputs[0].image_sizes[0])], outputs[1])
    )
    try:
        yield
    finally:
        handle.remove()


def _run(trainee: Trainee, batches: Sequence[Batch], device: torch.device) -> Callable[[], Times]:
    def steps() -> None:
        for batch in batches:
            trainee.step(batch)

    return lambda: {"step": wall_time(steps, device)[1] / len(batches)}


def _random_boxes(count: int, size: Tuple[int, int], generator: torch.Generator) -> Tensor:
    """(count, 4), between a sixteenth and a half of the image in height and width."""
    whole = torch.tensor([size[1], size[0]])
    extent = (1 / 16 + 7 / 16 * torch.rand(count, 2, generator=generator)) * whole
    corner = torch.rand(count, 2, generator=generator) * (whole - extent)
    return torch.cat([corner, corner + extent], dim=1)


def parse_size(text: str) -> Size:
    """The height and width in an option like 256 or 800x1333.

    Raises:
        ValueError: if it is something else, or less than 32 pixels.
    """
    sizes = [int(size) if size.isdigit() else 0 for size in text.split("x")]
    if len(sizes) > 2 or min(sizes) < 32:
        raise ValueError(f"--size: must be like 256 or 800x1333, each at least 32, got {text!r}")
    return sizes[0], sizes[-1]


def main() -> int:
    parser = results.parser(__doc__, repetitions=10)
    results.add_device(parser)
    parser.add_argument(
        "--model", choices=MODELS, default="R-50-FPN", help="Mask R-CNN or RetinaNet"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="X",
        help=f"of {', '.join(CONTENDERS)}",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="HxW",
        help="of the images, in pixels, as 800x1333; with several, steps take turns. Default: "
        + ", ".join(f"{m.size[0]} with {name}" for name, m in MODELS.items()),
    )
    parser.add_argument("--images", type=results.positive, default=1, help="in a step")
    parser.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision")
    parser.add_argument("--channels-last", action="store_true", help="memory format")
    parser.add_argument(
        "--threads",
        type=results.positive,
        help="of the CPU. Default: one with R-18-FPN, all with the others",
    )
    args = parser.parse_args()
    model = MODELS[args.model]
    try:
        sizes = [parse_size(text) for text in args.size] if args.size else [model.size]
        sizes = [(64, 96)] if args.quick else sizes
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"--size: the same one twice: {' '.join(args.size)}")
        options = [f"{args.images}x" * (args.images > 1) + f"{sizes[0][0]}x{sizes[0][1]}"]
        options += ["mixed"] * (len(sizes) > 1) + [args.amp] * (args.amp is not None)
        options += ["channels_last"] * args.channels_last
        path = results.check(args, "-".join(["train", args.model, args.device, *options]) + ".json")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads or model.threads or torch.get_num_threads())
    measured = benchmark_train(
        args.model,
        args.contenders,
        device=torch.device(args.device),
        sizes=sizes,
        images=args.images,
        amp=args.amp,
        channels_last=args.channels_last,
        opts=("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16") if args.quick else (),
        repetitions=args.repetitions,
        warmup=args.warmup,
    )
    results.write(measured, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
