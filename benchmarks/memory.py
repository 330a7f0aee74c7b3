"""Measures peak memory and time of training steps, with and without activation checkpointing.

On a CPU, where nothing is counted but tensors, GroupNorm under autocast computes in float32, as it
does on a GPU.
"""

import itertools
import sys
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wsbcn_d2 import checkpoint_activations_
from wsbcn_d2.modeling import CHECKPOINTED

from . import results, train
from .measure import Times, interleaved, spread, wall_time

# By title, keys of train.MODELS.
MODELS = {"Mask R-CNN": "R-50-FPN", "RetinaNet": "RetinaNet-R-50-FPN"}
NORMS = ("GN", "GN+WS", "BCN+WS")
DTYPES = {"float32": None, "bfloat16": "bfloat16"}  # the latter under autocast
# Keys of MODEL, for a trial: a small one.
_QUICK = {"RESNETS.DEPTH": "18", "RESNETS.RES2_OUT_CHANNELS": "64"}
_QUICK["ROI_HEADS.BATCH_SIZE_PER_IMAGE"] = "16"

GPUS = (6, 8, 11, 16, 24)  # GiB
# GiB of a GPU: for its context, workspaces of cuDNN, and what the allocator cannot use.
RESERVED = 1


def largest_batch(one: int, two: int, gib: float) -> int:
    """How many images fit: a linear model of the peak, with RESERVED GiB for what is not counted.

    Args:
        one, two: bytes at the peak of a step with one and with two images.
        gib: memory of the GPU.
    """
    room = (gib - RESERVED) * 2**30 - one
    return 0 if room < 0 else 1 + int(room // (two - one))


def benchmark_memory(
    models: Sequence[str] = tuple(MODELS),
    norms: Sequence[str] = NORMS,
    checkpointed: Sequence[str] = CHECKPOINTED,
    *,
    device: torch.device,
    dtypes: Sequence[str] = tuple(DTYPES),
    images: Sequence[int] = (1, 2),
    size: train.Size = (800, 1333),
    bitmasks: bool = False,
    opts: Sequence[str] = (),
    repetitions: int = 3,
    warmup: int = 1,
    progress: bool = True,
) -> results.Results:
    """Measures training steps as :func:`~benchmarks.train.benchmark_train` does.

    Args:
        models: keys of MODELS.
        norms: of NORMS.
        checkpointed: of :data:`wsbcn_d2.modeling.CHECKPOINTED`.
        device: where to run.
        dtypes: keys of DTYPES.
        images: numbers of them in a step.
        size: their height and width in pixels.
        bitmasks: masks are bitmaps and not polygons.
        opts: alternating config keys and values, for all models.
        repetitions: rounds of times; 0 for peaks alone.
        warmup: rounds before those.
        progress: show a progress bar.

    Returns:
        What :mod:`benchmarks.page` shows, and JSON can hold: :func:`benchmarks.results.describe`,
        ``settings``, and ``rows``, one for each case, with what
        :meth:`~benchmarks.train.Trainee.memory` says, and ``step`` (median and quartiles of
        milliseconds) unless there are no repetitions.
    """
    described = results.describe(device)
    rounds = repetitions + warmup if repetitions else 0
    cases = list(itertools.product(norms, checkpointed))
    rows: List[Dict[str, Any]] = []
    total = len(models) * len(dtypes) * len(images) * len(cases) * (1 + rounds)
    with tqdm(total=total, unit="step", disable=not progress, smoothing=0.05) as bar:
        for model, dtype in itertools.product(models, dtypes):
            trainees = {n: _trainee(MODELS[model], n, dtype, device, opts) for n in norms}
            for count in images:
                bar.set_description(f"{model}, {dtype}, {count} image{'s' * (count > 1)}")
                batch = train.make_batch(count, size, device, bitmasks)
                runs = {case: _run(trainees[case[0]], case[1], batch, device) for case in cases}
                measured: Dict[Tuple[str, str], Dict[str, Any]] = {}
                for norm, what in cases:
                    checkpoint_activations_(trainees[norm].model, what)
                    with train.fixed_heads(trainees[norm].model, [batch]):
                        measured[norm, what] = trainees[norm].memory(batch)
                    bar.update()
                if repetitions:
                    times = interleaved(runs, repetitions, warmup, on_run=bar.update)
                    for case in cases:
                        measured[case]["step"] = spread(times[case]["step"])
                for norm, what in cases:
                    row = {"model": model, "dtype": dtype, "images": count, "norm": norm}
                    rows.append({**row, "checkpointed": what, **measured[norm, what]})
    settings = {"size": list(size), "bitmasks": bitmasks, "opts": list(opts)}
    settings.update(repetitions=repetitions, warmup=warmup)
    return {"kind": "memory", **described, "settings": settings, "rows": rows}


def _trainee(
    model: str, norm: str, dtype: str, device: torch.device, opts: Sequence[str]
) -> train.Trainee:
    made = train.Trainee(train.config(model, norm, device, opts), DTYPES[dtype])
    if device.type == "cpu" and DTYPES[dtype]:
        for module in made.model.modules():
            if type(module) is nn.GroupNorm:
                module.register_forward_pre_hook(_in_float32)
    return made


def _in_float32(module: nn.Module, inputs: Tuple[Tensor]) -> Tensor:
    return inputs[0].float()


def _run(
    trainee: train.Trainee, what: str, batch: train.Batch, device: torch.device
) -> Callable[[], Times]:
    def run() -> Times:
        checkpoint_activations_(trainee.model, what)
        with train.fixed_heads(trainee.model, [batch]):
            return {"step": wall_time(lambda: trainee.step(batch), device)[1]}

    return run


def main() -> int:
    parser = results.parser(__doc__, repetitions=3)
    results.add_device(parser)
    for option, choices in (
        ("--models", MODELS),
        ("--norms", NORMS),
        ("--checkpointed", CHECKPOINTED),
        ("--dtypes", DTYPES),
    ):
        help_text = f"of {', '.join(map(repr, choices))}"
        parser.add_argument(
            option, nargs="+", choices=choices, default=list(choices), metavar="X", help=help_text
        )
    parser.add_argument(
        "--images", nargs="+", type=results.positive, default=[1, 2], metavar="N", help="in a step"
    )
    parser.add_argument("--size", default="800x1333", metavar="HxW", help="of images, in pixels")
    parser.add_argument("--bitmasks", action="store_true", help="instead of polygons")
    parser.add_argument("--peaks", action="store_true", help="measure no times")
    args = parser.parse_args()
    if args.quick:
        args.size, args.dtypes, args.images = "64x96", ["float32"], [1]
    try:
        size = train.parse_size(args.size)
        options = [name for name in ("peaks", "bitmasks") if getattr(args, name)]
        options += args.dtypes * (len(args.dtypes) == 1)
        options += [args.size] * (args.size != parser.get_default("size"))
        path = results.check(args, "-".join(["memory", args.device, *options]) + ".json")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    quick = [text for key, value in _QUICK.items() for text in (f"MODEL.{key}", value)]
    measured = benchmark_memory(
        args.models,
        args.norms,
        args.checkpointed,
        device=torch.device(args.device),
        dtypes=args.dtypes,
        images=args.images,
        size=size,
        bitmasks=args.bitmasks,
        opts=quick if args.quick else (),
        repetitions=0 if args.peaks else args.repetitions,
        warmup=args.warmup,
    )
    results.write(measured, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
