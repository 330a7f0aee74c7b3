"""Pretraining of a detector's backbone: classification of digits, in large batches.

Detectors with batch-channel normalization are meant to start from a backbone that was pretrained
on a classification task with batch statistics, and then to be trained with estimates, few images
at a time (arXiv 1903.10520v2). This does the first half for the digits dataset in minutes, for any
norm option, so that the second half can be compared between norms without ImageNet.
"""

import argparse
import dataclasses
import inspect
import math
import sys
import time
from typing import Dict, Iterable, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from wsbcn_d2.command_line import HelpFormatter
from wsbcn_d2.engine import ConfigError, load_config
from wsbcn_d2.engine.checkpoint import atomic_write, check_output
from wsbcn_d2.norm_options import NormOption

from .digit_crops import DigitCrops
from .digits import CLASSES

# What each option is called when there is one large batch on one device. With estimates instead of
# batch statistics, or without any, these layers have the same parameters and buffers.
_LARGE_BATCH_FORMS = {
    "BCN": "BatchBCN",
    "SyncBCN": "BatchBCN",
    "FrozenBN": "BN",
    "SyncBN": "BN",
    "nnSyncBN": "BN",
    "naiveSyncBN": "BN",
    "naiveSyncBN_N": "BN",
}
# Parts of the training: of the steps in which the learning rate rises, and of the crops that are
# easier than those of the evaluation.
_WARMUP_FRACTION = 0.1
_EASY_FRACTION = 0.7


@dataclasses.dataclass(frozen=True)
class PretrainingResult:
    """What came of a pretraining.

    Attributes:
        norm: the norm option that the backbone was trained with.
        accuracy: of the classifier on crops of digits that it was not trained with, 0 to 1.
        loss: cross-entropy on the same crops, in nats.
        seconds: how long the training took, without the evaluation.
    """

    norm: str
    accuracy: float
    loss: float
    seconds: float


class BackboneClassifier(nn.Module):
    """The ResNet of a detector, global average pooling, standardization, and a linear layer.

    Attributes:
        bottom_up: the ResNet, built as the config says: that of an FPN, or the whole backbone.
        prefix: of its parameters' names in the detector.
    """

    def __init__(self, cfg: CfgNode, num_classes: int) -> None:
        """
        Args:
            cfg: a config of Detectron2.
            num_classes: outputs of the linear layer.
        """
        super().__init__()
        backbone = build_backbone(cfg)
        has_neck = hasattr(backbone, "bottom_up")
        self.bottom_up = backbone.bottom_up if has_neck else backbone
        self.prefix = "backbone.bottom_up." if has_neck else "backbone."
        shapes = self.bottom_up.output_shape()
        self._coarsest = max(shapes, key=lambda name: shapes[name].stride)
        channels = shapes[self._coarsest].channels
        self.center = nn.BatchNorm1d(channels, affine=False)
        self.predict = nn.Linear(channels, num_classes)
        nn.init.normal_(self.predict.weight, std=0.5)
        self._reverse_channels = cfg.INPUT.FORMAT == "BGR"
        for name, values in (
            ("pixel_std", cfg.MODEL.PIXEL_STD),
            ("pixel_mean", cfg.MODEL.PIXEL_MEAN),
        ):
            # Named and shaped as in Detectron2's models.
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: (N, 3, H, W), uint8 RGB.

        Returns:
            (N, num_classes), logits.
        """
        if self._reverse_channels:
            images = images.flip(1)
        features = self.bottom_up((images - self.pixel_mean) / self.pixel_std)
        pooled = features[self._coarsest].mean((2, 3))
        # What the features of all images have in common is most of them if no layer of the ResNet
        # sees more than one image, and keeps the linear layer from learning anything else. The
        # scale makes it stable at learning rates that suit the ResNet: its curvature grows with
        # the squared length of its input.
        return self.predict(self.center(pooled) / math.sqrt(pooled.shape[1]))


def large_batch_form(norm: str) -> str:
    """The norm option to pretrain with, for one to train a detector with.

    Args:
        norm: a norm option; ``""`` for none.

    Returns:
        The option with batch statistics instead of estimates, frozen statistics or statistics of
        several devices: ``"BatchBCN+WS"`` for ``"BCN+WS"``. Others, such as GN, are returned as
        they are.

    Raises:
        ValueError: if it is no norm option.
    """
    if not norm:
        return norm
    option = NormOption.parse(norm)
    name = _LARGE_BATCH_FORMS.get(option.name, option.name)
    return str(dataclasses.replace(option, name=name))


def pretrain_backbone(
    cfg: CfgNode,
    output: str,
    *,
    steps: int = 600,
    batch_size: int = 64,
    crop_size: int = 32,
    learning_rate: float = 0.1,
    eval_crops: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> PretrainingResult:
    """Trains the ResNet of a detector to classify digits and writes its weights.

    It starts from random weights, nothing is frozen, and ``MODEL.RESNETS.NORM`` is replaced by its
    :func:`large_batch_form`. SGD as ``SOLVER`` says (momentum, weight decay of norms and others),
    with a learning rate that rises over the first tenth of the steps and then falls as a cosine.
    The same arguments give the same result on the same machine.

    Args:
        cfg: of the detector. Its datasets, weights and schedule are not used.
        output: file to write, for ``MODEL.WEIGHTS`` of the config: it has the detector's names for
            everything in the ResNet, and for nothing else. Appears when complete.
        steps: number of steps.
        batch_size: crops in a step.
        crop_size: width and height of the crops in pixels; see :class:`.DigitCrops`.
        learning_rate: the highest.
        eval_crops: number of crops of held-out digits for the accuracy.
        seed: of weights and crops, at least 0.
        progress: show a progress bar.

    Raises:
        ValueError: if a number is too small, or ``MODEL.RESNETS.NORM`` is no norm option.
        OSError: if ``output`` cannot be written.
        FloatingPointError: if the loss becomes infinite or NaN.
        ImportError: scikit-learn is not installed.
    """
    # The head's batch normalization needs two crops.
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    check_output(output)
    train_crops = DigitCrops("train", steps * batch_size, crop_size, seed, _EASY_FRACTION)
    val_crops = DigitCrops("val", eval_crops, crop_size, seed)

    detector_keys = set(_state_of_backbone(_build(cfg, seed)))
    cfg = _pretraining_config(cfg, steps, learning_rate)
    model = _build(cfg, seed)
    start = time.perf_counter()
    # Loaders draw a seed for their workers, of which there are none, from the global generator
    # unless they are given one.
    unused = torch.Generator()
    _train(model, cfg, DataLoader(train_crops, batch_size, generator=unused), progress)
    seconds = time.perf_counter() - start
    accuracy, loss = _evaluate(model, DataLoader(val_crops, batch_size, generator=unused))
    result = PretrainingResult(cfg.MODEL.RESNETS.NORM, accuracy, loss, seconds)

    # BN counts its batches, FrozenBN does not
    state = {k: v for k, v in _state_of_backbone(model).items() if k in detector_keys}
    with atomic_write(output) as file:
        torch.save({"model": state, "pretraining": dataclasses.asdict(result)}, file)
    return result


def _pretraining_config(cfg: CfgNode, steps: int, learning_rate: float) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.NORM = large_batch_form(cfg.MODEL.RESNETS.NORM)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.SOLVER.BASE_LR = learning_rate
    cfg.SOLVER.MAX_ITER = steps
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.WARMUP_ITERS = round(_WARMUP_FRACTION * steps)
    return cfg


def _build(cfg: CfgNode, seed: int) -> BackboneClassifier:
    with torch.random.fork_rng(devices=[]):  # weights are initialized on the CPU
        torch.manual_seed(seed)
        return BackboneClassifier(cfg, len(CLASSES)).to(cfg.MODEL.DEVICE)


def _state_of_backbone(model: BackboneClassifier) -> Dict[str, Tensor]:
    return {model.prefix + k: v.cpu() for k, v in model.bottom_up.state_dict().items()}


def _train(
    model: BackboneClassifier,
    cfg: CfgNode,
    batches: Iterable[Tuple[Tensor, Tensor]],
    progress: bool,
) -> None:
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    model.train()
    with tqdm(batches, "pretraining", unit="step", disable=not progress) as bar:
        for step, (images, labels) in enumerate(bar):
            logits = model(images.to(model.pixel_mean.device))
            loss = F.cross_entropy(logits, labels.to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            value = loss.item()
            if not torch.isfinite(loss.detach()):
                raise FloatingPointError(
                    f"the loss is {value} in step {step}; a lower learning rate may help"
                )
            bar.set_postfix(loss=f"{value:.2f}", refresh=False)


@torch.no_grad()
def _evaluate(
    model: BackboneClassifier, batches: Iterable[Tuple[Tensor, Tensor]]
) -> Tuple[float, float]:
    """Returns accuracy and cross-entropy."""
    model.eval()
    count, correct, loss = 0, 0, 0.0
    for images, labels in batches:
        logits = model(images.to(model.pixel_mean.device)).cpu()
        count += len(labels)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct / count, loss / count


def main() -> int:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(pretrain_backbone).parameters.items()
    }
    parser = argparse.ArgumentParser(
        prog="python -m demo.pretraining",
        description="Pretrains the backbone of a config by classifying crops of handwritten digits "
        "at a large batch. The config is then trained from it with MODEL.WEIGHTS OUTPUT. It needs "
        "scikit-learn, from which the images come, and no dataset.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="config of the detector")
    parser.add_argument("--output", required=True, help="checkpoint to write")
    for option, help_text in [
        ("--steps", "number of steps"),
        ("--batch-size", "crops in a step"),
        ("--crop-size", "width and height of the crops in pixels"),
        ("--learning-rate", "the highest; it rises, and then falls as a cosine"),
        ("--eval-crops", "crops of held-out digits to report the accuracy on"),
        ("--seed", "seed of everything random"),
    ]:
        default = defaults[option[2:].replace("-", "_")]
        parser.add_argument(option, type=type(default), default=default, help=help_text)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change"
    )
    args = vars(parser.parse_args())
    try:
        opts = [*args.pop("opts"), "MODEL.WEIGHTS", ""]  # those of the detector
        cfg = load_config(args.pop("config_file"), opts, needs=())
        result = pretrain_backbone(cfg, progress=True, **args)
    except (ConfigError, FloatingPointError, ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(
        f"{args['output']}: {result.norm}, accuracy {100 * result.accuracy:.1f} % on "
        f"{args['eval_crops']} crops of held-out digits, {result.seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
