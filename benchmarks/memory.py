#!/usr/bin/env python
"""Peak memory and time of a training step, with and without activation checkpointing.

    python benchmarks/memory.py [--repetitions N] [--json FILE] [--picture FILE]

A step is forward, backward and SGD with momentum of a model from configs/, at full width and with
random weights, for images of noise. On a GPU the peak is that of PyTorch's allocator. On a CPU it
is that of tensors: parameters, gradients, momentum, and all that operations create. What kernels
allocate for themselves is not counted (workspaces of convolutions), nor PyTorch itself. Sizes do
not depend on values, so for the peak, though not for times, convolutions give zeros, in no time.

The table of the largest batches is a linear model: the peak of one image, plus, for each other
image, what the second one added; RESERVED_GIB of the memory are left for what is not counted.
"""

# The helpers of the other benchmarks (make_batch, LiveBytes) are those of wsbcn_d2/benchmark; this
# file stays on its own, so that it runs in any checkout.

import argparse
import contextlib
import itertools
import json
import math
import platform
import random
import statistics
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wsbcn_d2 import checkpoint_activations_
from wsbcn_d2.engine import load_config
from wsbcn_d2.modeling import CHECKPOINTED

ROOT = Path(__file__).resolve().parents[1]
# The config of each model, for each norm that has one; GN is made from that of GN+WS.
MODELS = {
    "Mask R-CNN R-50-FPN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_{}_1x_1img.yaml",
    "RetinaNet R-50-FPN": "COCO-Detection/retinanet_R_50_FPN_{}_1x_1img.yaml",
}
NORMS = ("GN", "GN+WS", "BCN+WS")
NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET")
GPU_GIB = (6, 8, 11, 16, 24)
# Of a GPU: its context, workspaces of cuDNN, and what the allocator cannot use.
RESERVED_GIB = 1.0

_OBJECTS = 8  # in each image
_GIB = 2**30


# ------------------------------------------------------------------------------- what is measured


class Step:
    """A model with what a training step needs; the same weights before every step."""

    def __init__(self, model: str, norm: str, device: str, amp: bool) -> None:
        torch.manual_seed(0)
        fixed = {"WEIGHTS": "", "BACKBONE.FREEZE_AT": "0", "DEVICE": device}
        fixed.update({f"{key}.NORM": norm for key in NORM_KEYS})
        opts = [x for key, value in fixed.items() for x in (f"MODEL.{key}", value)]
        file = MODELS[model].format("bcn_ws" if norm.startswith("BCN") else "gn_ws")
        cfg = load_config(str(ROOT / "configs" / file), [*opts, "SOLVER.BASE_LR", "0.0"], needs=())
        self.model = build_model(cfg)
        self.optimizer = build_optimizer(cfg, self.model)
        self._device = torch.device(device)
        self._amp = amp
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._update()  # which makes the momentum

    def __call__(self, batch: List[Dict[str, Any]]) -> None:
        with EventStorage():
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
                loss = sum(self.model(batch).values())
            loss.backward()
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, batch: List[Dict[str, Any]]) -> float:
        self._wait()
        start = time.perf_counter()
        self(batch)
        self._wait()
        return time.perf_counter() - start

    def peak(self, batch: List[Dict[str, Any]]) -> Tuple[int, Dict[str, int]]:
        """Bytes at the peak of a step, and on a CPU what is there."""
        state = (value for values in self.optimizer.state.values() for value in values.values())
        held = itertools.chain(self.model.parameters(), self.model.buffers(), state)
        held_bytes = sum(t.nbytes for t in held if isinstance(t, Tensor))
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self(batch)
            return held_bytes + torch.cuda.max_memory_allocated(self._device) - before, {}
        with LiveBytes() as live:
            self(batch)
        return held_bytes + live.peak, {"parameters, momentum": held_bytes, **live.at_peak()}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _to_zeros(value: Any) -> Any:
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations create inside this context, on a CPU.

    Attributes:
        current: bytes of the tensors that exist now.
        peak: the most there have been at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._live: Dict[int, Tuple[int, str]] = {}
        self._at_peak: Dict[int, Tuple[int, str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in _CONVOLUTIONS:
            on_meta = tree_map(_to_meta, (args, kwargs or {}))
            result = tree_map(_to_zeros, func(*on_meta[0], **on_meta[1]))
        else:
            result = func(*args, **(kwargs or {}))
        # An output may share the memory of an input, which is either known or from before.
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        old = {t.untyped_storage()._cdata for t in inputs}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in old and storage._cdata not in self._live:
                shape = "x".join(map(str, tensor.shape))
                self._live[storage._cdata] = (storage.nbytes(), f"{func} {shape}")
                self.current += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        if self.current > self.peak:
            self.peak, self._at_peak = self.current, dict(self._live)
        return result

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key)[0]

    def at_peak(self, most: int = 12) -> Dict[str, int]:
        """Bytes of what was there at the peak, by operation and shape: the largest ones."""
        sizes: Counter = Counter()
        for size, name in self._at_peak.values():
            sizes[name] += size
        return dict(sizes.most_common(most))


def make_batch(
    images: int, size: Tuple[int, int], device: str, bitmasks: bool = False
) -> List[Dict[str, Any]]:
    """Images of noise with elliptic objects at random places."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    angles = torch.linspace(0, 2 * math.pi, 33)[:-1]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    batch = []
    for _ in range(images):
        extent = (1 / 16 + 7 / 16 * torch.rand(_OBJECTS, 2, generator=generator)) * torch.tensor(
            [width, height]
        )
        corner = torch.rand(_OBJECTS, 2, generator=generator) * (
            torch.tensor([width, height]) - extent
        )
        center, radius = corner + extent / 2, extent / 2
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(0, 80, (_OBJECTS,), generator=generator)
        ellipses = center[:, None] + radius[:, None] * circle
        masks: Any = PolygonMasks([[ellipse.flatten().double().numpy()] for ellipse in ellipses])
        if bitmasks:
            masks = BitMasks.from_polygon_masks(masks, height, width)
        instances.gt_masks = masks
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image.to(device), "instances": instances.to(device)})
    return batch


@contextlib.contextmanager
def full_heads(model: nn.Module, batch: List[Dict[str, Any]]) -> Iterator[None]:
    """Gives the heads of an R-CNN as many regions with an object as they can take, as a trained
    RPN does: a third of the proposals are the objects, moved a little."""
    if not hasattr(model, "proposal_generator"):
        yield
        return
    generator = torch.Generator().manual_seed(1)
    proposals = []
    for image in batch:
        boxes = image["instances"].gt_boxes.tensor.cpu()
        near = boxes.repeat(40, 1)
        shift = 0.1 * torch.rand(len(near), 2, generator=generator) - 0.05
        near = near + (shift * (near[:, 2:] - near[:, :2])).repeat(1, 2)
        corner = torch.rand(640, 2, generator=generator) * boxes.max() / 2
        far = torch.cat([corner, corner + 16 + 100 * torch.rand(640, 2, generator=generator)], 1)
        every = Boxes(torch.cat([near, far]))
        size = image["instances"].image_size
        every.clip(size)
        logits = torch.zeros(len(every))
        one = Instances(size, proposal_boxes=every, objectness_logits=logits)
        proposals.append(one.to(image["image"].device))
    handle = model.proposal_generator.register_forward_hook(
        lambda module, inputs, outputs: (proposals, outputs[1])
    )
    try:
        yield
    finally:
        handle.remove()


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """The rows: one for each model, norm, dtype, number of images and setting."""
    rows: List[Dict[str, Any]] = []
    for model, dtype, images in itertools.product(args.models, args.dtypes, args.images):
        batch = make_batch(images, tuple(args.size), args.device, args.bitmasks)
        steps: Dict[str, Step] = {}
        cases = list(itertools.product(args.norms, args.settings))
        for norm in args.norms:
            steps[norm] = Step(model, norm, args.device, dtype == "bfloat16")
        times: Dict[Tuple[str, str], List[float]] = {case: [] for case in cases}
        peaks = {}
        for turn in range(-1, args.repetitions):
            random.Random(turn).shuffle(cases)
            for norm, what in cases:
                step = steps[norm]
                checkpoint_activations_(step.model, what)
                with full_heads(step.model, batch):
                    if turn >= 0:
                        times[norm, what].append(step.seconds(batch))
                        continue
                    peaks[norm, what] = step.peak(batch)
                print(f"{model}, {dtype}, {images}: {norm} {what!r}", peaks[norm, what][0] / _GIB)
        for norm, what in itertools.product(args.norms, args.settings):
            peak, at_peak = peaks[norm, what]
            row = {"model": model, "dtype": dtype, "images": images, "norm": norm, "what": what}
            row.update(peak_bytes=peak, at_peak=at_peak, seconds=times[norm, what])
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------- results


def largest_batch(peaks: Dict[int, int], gib: float) -> int:
    """The number of images whose step fits, by the linear model.

    Args:
        peaks: bytes for 1 and for 2 images.
        gib: memory of the GPU.
    """
    room = (gib - RESERVED_GIB) * _GIB - peaks[1]
    return 0 if room < 0 else 1 + int(room // (peaks[2] - peaks[1]))


def markdown(results: Dict[str, Any]) -> str:
    """The tables of peaks and times, and of the largest batches."""
    groups: Dict[Any, Dict[int, Dict[str, Any]]] = {}
    for row in results["rows"]:
        key = (row["model"], row["dtype"], row["norm"], row["what"])
        groups.setdefault(key, {})[row["images"]] = row
    lines = ["| model | dtype | norm | checkpointed | GiB, 1 image | 2 images | of GN's | time |"]
    lines[0] += "".join(f" {gib} GiB |" for gib in GPU_GIB)
    lines.append("|" + "---|" * 4 + "---:|" * (4 + len(GPU_GIB)))
    for (model, dtype, norm, what), rows in groups.items():
        if 1 not in rows:
            continue
        base = groups.get((model, dtype, "GN", ""), {}).get(1)
        peaks = {images: row["peak_bytes"] for images, row in rows.items()}
        cells = [model, dtype, norm, what or "nothing", f"{peaks[1] / _GIB:.2f}"]
        cells.append(f"{peaks[2] / _GIB:.2f}" if 2 in peaks else "")
        cells.append(f"{peaks[1] / base['peak_bytes']:.2f}" if base else "")
        is_timed = base and base["seconds"]
        cells.append(f"{_seconds(rows[1]) / _seconds(base):.2f}" if is_timed else "")
        for gib in GPU_GIB:
            cells.append(str(largest_batch(peaks, gib)) if 2 in peaks else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(row: Dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def draw(results: Dict[str, Any], path: str) -> None:
    """The picture: GiB of one image against time, one line for each norm."""
    from matplotlib.figure import Figure

    rows = [r for r in results["rows"] if r["images"] == 1 and r["seconds"]]
    panels = list(dict.fromkeys((r["model"], r["dtype"]) for r in rows))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        own = [r for r in rows if (r["model"], r["dtype"]) == panel]
        base = next(r for r in own if r["norm"] == "GN" and r["what"] == "")
        for norm, marker in zip(dict.fromkeys(r["norm"] for r in own), "os^Dv"):
            line = [r for r in own if r["norm"] == norm]
            x = [_seconds(r) / _seconds(base) for r in line]
            y = [r["peak_bytes"] / _GIB for r in line]
            axes.plot(x, y, marker=marker, label=norm)
            for row, at in zip(line, zip(x, y)):
                text = row["what"] or "nothing"
                axes.annotate(text, at, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set(title=", ".join(panel), xlabel="time of a step, GN = 1", ylim=(0, None))
        axes.set_ylabel("peak memory of 1 image, GiB")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--norms", nargs="+", default=list(NORMS))
    parser.add_argument("--settings", nargs="+", choices=CHECKPOINTED, default=list(CHECKPOINTED))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1333], metavar="PIXELS")
    parser.add_argument(
        "--bitmasks", action="store_true", help="masks as INPUT.MASK_FORMAT 'bitmask' has them"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of times; 0: peaks only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--picture", help="PNG file of GiB against time")
    args = parser.parse_args()
    if args.picture and not args.repetitions:
        parser.error("--picture shows times: --repetitions must be at least 1")
    on_gpu = args.device.startswith("cuda")
    results = {
        "machine": torch.cuda.get_device_name() if on_gpu else platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": vars(args),
        "rows": measure(args),
    }
    print(markdown(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
