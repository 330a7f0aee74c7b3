"""Whole training steps and inference of Mask R-CNN, one model for each normalization."""

import contextlib
import functools
import gc
import itertools
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ..engine import load_config
from ..layers import WeightStandardized
from .machine import describe_machine
from .measure import LiveBytes, Times, interleaved, largest, spread, wall_time

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-InstanceSegmentation"
# By title, the part of the config's name.
NORMS = {
    "GN": "gn",
    "GN+WS": "gn_ws",
    "BCN": "bcn",
    "BCN+WS": "bcn_ws",
    "BN": "bn",
    "SyncBN": "syncbn",
    "FrozenBN": "frozenbn",
}
DEFAULT_NORMS = ("GN", "GN+WS", "BCN", "BCN+WS", "SyncBN", "FrozenBN")
CHECKPOINTED = "BCN+WS, checkpointed"
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_OBJECTS = 8  # in each image
_MOST_IMAGES = 64  # tried for the largest batch


def benchmark_train(
    norms: Sequence[str] = DEFAULT_NORMS,
    *,
    device: torch.device,
    size: Tuple[int, int],
    images: Sequence[int] = (1,),
    amp: Optional[str] = None,
    channels_last: bool = False,
    checkpoint_activations: bool = False,
    memory_gib: Optional[float] = None,
    repetitions: int = 10,
    warmup: int = 3,
    opts: Sequence[str] = (),
    progress: bool = True,
) -> Dict[str, Any]:
    """Measures training steps (forward, backward, SGD) and inference.

    Every model starts from random weights with nothing frozen, sees the same images and objects,
    and gets the same proposals, so that its heads have as much to do as those of every other. The
    learning rate is 0: a step does all its work, and the next one sees the same weights.

    Args:
        norms: keys of NORMS.
        device: where to run.
        size: height and width of the images in pixels.
        images: batch sizes.
        amp: key of AMP_DTYPES for training and inference under autocast.
        channels_last: memory format of models and activations.
        checkpoint_activations: measure BCN+WS with that of the backbone too.
        memory_gib: find the largest batch that trains in so much memory of the GPU.
        repetitions, warmup: rounds, see :func:`~wsbcn_d2.benchmark.measure.interleaved`.
        opts: alternating config keys and values for all models.
        progress: show progress bars.

    Returns:
        What :mod:`wsbcn_d2.benchmark.report` shows, and JSON can hold: ``machine``, ``settings``,
        ``skipped`` (what -> reason), and ``rows``, one for each batch size and norm, with ``step``
        (median and quartiles of milliseconds), ``peak_bytes`` and ``saved_bytes`` of a step, on a
        GPU ``kernels`` and ``kernels_ms`` (:meth:`Trainee.kernels`),
        ``standardization`` (milliseconds, of models with WS), ``inference`` and
        ``inference_folded`` (milliseconds a batch), and ``largest_batch`` if asked for.

    Raises:
        ValueError: if ``amp`` or ``memory_gib`` is given and ``device`` is no GPU.
        wsbcn_d2.engine.ConfigError: from ``opts``.
    """
    if device.type != "cuda":
        for name, value in (("amp", amp), ("memory_gib", memory_gib)):
            if value is not None:
                raise ValueError(f"{name} needs a GPU, and the device is {device}")
    configs = _configs(norms, device, checkpoint_activations, opts)
    make: Dict[str, Callable[[], Trainee]] = {
        name: functools.partial(Trainee, cfg, device, amp, channels_last)
        for name, cfg in configs.items()
    }
    batches = [make_batch(count, size, device) for count in images]
    rows, skipped = _measure(make, batches, repetitions, warmup, progress)
    if memory_gib is not None:
        for name in make:
            own = [row for row in rows if row["norm"] == name]
            guess = _guessed_batch({row["images"]: row["peak_bytes"] for row in own}, memory_gib)
            most = _largest_batch(make[name], size, memory_gib, name, progress, guess)
            for row in own:
                row["largest_batch"] = most
    return {
        "kind": "train",
        "device": device.type,
        "machine": describe_machine(device),
        "settings": {
            "size": list(size),
            "amp": amp,
            "channels_last": channels_last,
            "memory_gib": memory_gib,
            "repetitions": repetitions,
            "warmup": warmup,
            "opts": list(opts),
        },
        "skipped": skipped,
        "rows": rows,
    }


class Trainee:
    """A model with what a training step needs.

    Attributes:
        model: built from the config, with a fixed seed, in training mode.
        optimizer: Detectron2's SGD for the model.
    """

    def __init__(
        self,
        cfg: CfgNode,
        device: torch.device,
        amp: Optional[str] = None,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            cfg: the config of model and solver.
            device: where the model is.
            amp: key of AMP_DTYPES.
            channels_last: memory format of the model.
        """
        torch.manual_seed(0)
        self.model = build_model(cfg)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(cfg, self.model)
        self._device = device
        self._amp = amp
        self._scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")

    def autocast(self) -> ContextManager[Any]:
        """The context of forward passes."""
        if self._amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=AMP_DTYPES[self._amp])

    def loss(self, batch: List[Dict[str, Any]]) -> Tensor:
        """The forward pass."""
        with EventStorage(), self.autocast():
            return sum(self.model(batch).values())

    def update(self, loss: Tensor) -> None:
        """Backward pass and step of the optimizer."""
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: List[Dict[str, Any]]) -> None:
        """A training step."""
        self.update(self.loss(batch))

    def state_bytes(self) -> int:
        """Memory that the model and its optimizer hold between two steps."""
        state = (value for values in self.optimizer.state.values() for value in values.values())
        tensors = itertools.chain(self.model.parameters(), self.model.buffers(), state)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def standardized_convolutions(self) -> List[WeightStandardized]:
        """The convolutions with weight standardization."""
        return [m for m in self.model.modules() if isinstance(m, WeightStandardized)]

    def memory(self, batch: List[Dict[str, Any]]) -> Dict[str, int]:
        """Measures a step, which must not be the first.

        Returns:
            ``saved_bytes``: what the forward pass leaves behind for the backward pass.
            ``peak_bytes``: the most that exists at once, with model, gradients and optimizer. On a
            GPU, all memory of its allocator; on a CPU, that of tensors, without the workspaces of
            kernels.
        """
        for conv in self.standardized_convolutions():
            conv.forget_standardized_weight()  # it is memory of the step
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            loss = self.loss(batch)
            saved = torch.cuda.memory_allocated(self._device) - before
            self.update(loss)
            peak = torch.cuda.max_memory_allocated(self._device) - before
        else:
            with LiveBytes() as live:
                loss = self.loss(batch)
                saved = live.current
                self.update(loss)
            peak = live.peak
        return {"saved_bytes": saved, "peak_bytes": self.state_bytes() + peak}

    def kernels(self, batch: List[Dict[str, Any]]) -> Dict[str, float]:
        """Profiles a step on a GPU.

        Returns:
            ``kernels``, their number, and ``kernels_ms``, the milliseconds in which one of them ran
            (they run one after the other): what a step would take if the GPU never waited for the
            host.
        """
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.step(batch)
            torch.cuda.synchronize(self._device)
        on_gpu = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
        times = [event.device_time for event in on_gpu]
        return {"kernels": len(on_gpu), "kernels_ms": sum(times) / 1e3}

    def standardize(self) -> Optional[float]:
        """Standardizes all filters that need it, forward and backward.

        Returns:
            Milliseconds; None if there are no such filters.
        """
        convs = self.standardized_convolutions()
        if not convs:
            return None
        weights = [conv.weight for conv in convs]
        with torch.no_grad():
            for weight in weights:
                weight.add_(0)  # as a step of the optimizer does: nothing may be reused

        def run() -> None:
            with self.autocast():
                standardized = [conv.standardized_weight() for conv in convs]
            torch.autograd.grad(standardized, weights, [w.detach() for w in standardized])

        return wall_time(run, self._device)[1]


def make_batch(images: int, size: Tuple[int, int], device: torch.device) -> List[Dict[str, Any]]:
    """Images of noise, each with the same number of elliptic objects at random places.

    Args:
        images: how many.
        size: height and width in pixels.
        device: where the tensors are, so that no copy is measured.

    Returns:
        Inputs of a Detectron2 model in training.
    """
    height, width = size
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
    batch = []
    for _ in range(images):
        boxes = _random_boxes(_OBJECTS, size, generator)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, 80, (_OBJECTS,), generator=generator)
        center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        (cx, cy), (rx, ry) = (t[:, :, None, None].unbind(1) for t in (center, radius))
        instances.gt_masks = BitMasks(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
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
def fixed_heads(model: nn.Module, batch: List[Dict[str, Any]]) -> Iterator[None]:
    """Makes what the heads of an R-CNN have to do independent of its weights.

    The proposal generator does its work, but the heads get the proposals of :func:`make_proposals`,
    as many as it would select in training, and the box predictor is set to find an object in each
    of them and leave it in place (which it remains).
    """
    count = model.proposal_generator.post_nms_topk[True]  # of training
    boxes = [(i["instances"].gt_boxes.tensor, i["instances"].image_size) for i in batch]
    proposals = [make_proposals(gt_boxes, size, count) for gt_boxes, size in boxes]
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        for layer in (predictor.cls_score, predictor.bbox_pred):
            layer.weight.zero_()
            layer.bias.zero_()
        predictor.cls_score.bias[0] = 10
    handle = model.proposal_generator.register_forward_hook(
        lambda module, inputs, outputs: (proposals, outputs[1])
    )
    try:
        yield
    finally:
        handle.remove()


def _random_boxes(count: int, size: Tuple[int, int], generator: torch.Generator) -> Tensor:
    """(count, 4), between a sixteenth and a half of the image in height and width."""
    whole = torch.tensor([size[1], size[0]])
    extent = (1 / 16 + 7 / 16 * torch.rand(count, 2, generator=generator)) * whole
    corner = torch.rand(count, 2, generator=generator) * (whole - extent)
    return torch.cat([corner, corner + extent], dim=1)


def _configs(
    norms: Sequence[str], device: torch.device, checkpoint_activations: bool, opts: Sequence[str]
) -> Dict[str, CfgNode]:
    fixed = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "SOLVER.BASE_LR", "0.0"]
    fixed += ["MODEL.DEVICE", str(device)]
    checkpointed = ["MODEL.WSBCN.CHECKPOINT_ACTIVATIONS", "backbone"]

    def load(norm: str, *more: str) -> CfgNode:
        path = CONFIGS / f"mask_rcnn_R_50_FPN_{NORMS[norm]}_1x_1img.yaml"
        return load_config(str(path), [*fixed, *more, *opts], needs=())

    configs = {norm: load(norm) for norm in norms}
    if checkpoint_activations:
        configs[CHECKPOINTED] = load("BCN+WS", *checkpointed)
    return configs


def _measure(
    make: Dict[str, Callable[[], Trainee]],
    batches: Sequence[List[Dict[str, Any]]],
    repetitions: int,
    warmup: int,
    progress: bool,
) -> Tuple[List[Dict[str, Any]], Dict[str, str]]:
    """The rows but for the largest batch, and what was skipped for which reason. All models are in
    memory at the same time, so that they can take turns."""
    trainees = {name: build() for name, build in make.items()}
    folded, skipped = _folded(trainees)
    rows = []
    for batch in batches:
        results: Dict[str, Dict[str, Any]] = {name: {} for name in trainees}
        with contextlib.ExitStack() as stack:
            for model in (*(t.model for t in trainees.values()), *folded.values()):
                stack.enter_context(fixed_heads(model, batch))
            for title, runs in (
                ("training", _training_runs(trainees, batch)),
                ("inference", _inference_runs(trainees, folded, batch)),
            ):
                total = len(runs) * (repetitions + warmup)
                title = f"{title}, {len(batch)} image" + ("s" if len(batch) > 1 else "")
                with tqdm(total=total, desc=title, unit="run", disable=not progress) as bar:
                    times = interleaved(runs, repetitions, warmup, on_run=bar.update)
                for (name, _), phases in times.items():
                    results[name].update({key: spread(value) for key, value in phases.items()})
            for name, trainee in trainees.items():
                results[name].update(trainee.memory(batch))
                if batch[0]["image"].is_cuda:
                    results[name].update(trainee.kernels(batch))
        rows += [{"norm": name, "images": len(batch), **results[name]} for name in trainees]
    return rows, skipped


def _folded(trainees: Dict[str, Trainee]) -> Tuple[Dict[str, nn.Module], Dict[str, str]]:
    """Models of stock layers for inference, from those that have layers of this package, and what
    was skipped for which reason."""
    try:
        from ..export import fold
    except ImportError as error:
        return {}, {"inference, folded": str(error)}
    names = [n for n in trainees if n != CHECKPOINTED and ("BCN" in n or "+WS" in n)]
    folded = {name: fold(trainees[name].model.eval()) for name in names}
    for name in names:
        trainees[name].model.train()
    return folded, {}


def _training_runs(
    trainees: Dict[str, Trainee], batch: List[Dict[str, Any]]
) -> Dict[Tuple[str, str], Callable[[], Times]]:
    def training(trainee: Trainee) -> Callable[[], Times]:
        def run() -> Times:
            times = {"step": wall_time(lambda: trainee.step(batch), batch[0]["image"].device)[1]}
            standardization = trainee.standardize()
            if standardization is not None:
                times["standardization"] = standardization
            return times

        return run

    return {(name, "training"): training(trainee) for name, trainee in trainees.items()}


def _inference_runs(
    trainees: Dict[str, Trainee], folded: Dict[str, nn.Module], batch: List[Dict[str, Any]]
) -> Dict[Tuple[str, str], Callable[[], Times]]:
    """Inference ends with the masks of the boxes, before they are pasted into the image."""

    def inference(trainee: Trainee, model: nn.Module, phase: str) -> Callable[[], Times]:
        def run() -> Times:
            training = model.training
            model.eval()
            with torch.no_grad(), trainee.autocast():
                elapsed = wall_time(
                    lambda: model.inference(batch, do_postprocess=False), batch[0]["image"].device
                )[1]
            model.train(training)
            return {phase: elapsed}

        return run

    runs = {
        (name, "inference"): inference(trainee, trainee.model, "inference")
        for name, trainee in trainees.items()
        if name != CHECKPOINTED  # the same as without
    }
    for name, model in folded.items():
        runs[name, "folded"] = inference(trainees[name], model, "inference_folded")
    return runs


def _largest_batch(
    build: Callable[[], Trainee],
    size: Tuple[int, int],
    memory_gib: float,
    title: str,
    progress: bool,
    guess: int = 1,
) -> int:
    """The most images for which two training steps fit into the memory; the second has the state
    of the optimizer."""
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    trainee = build()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(memory_gib * 2**30 / total, 1.0), device)
    with tqdm(desc=f"largest batch, {title}", unit="trial", disable=not progress) as bar:

        def train(images: int) -> None:
            batch = make_batch(images, size, device)
            with fixed_heads(trainee.model, batch):
                for _ in range(2):
                    trainee.step(batch)

        def fits(images: int) -> bool:
            bar.set_postfix(images=images)
            bar.update()
            try:
                train(images)
            except torch.cuda.OutOfMemoryError:
                return False
            finally:
                trainee.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
            return True

        try:
            return largest(fits, _MOST_IMAGES, guess)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def _guessed_batch(peaks: Dict[int, int], memory_gib: float) -> int:
    """How many images may fit, by the peaks of steps with some numbers of them, in bytes."""
    (few, low), (many, high) = min(peaks.items()), max(peaks.items())
    slope = (high - low) / (many - few) if many > few else high / many
    return int(few + (memory_gib * 2**30 - low) / slope)
