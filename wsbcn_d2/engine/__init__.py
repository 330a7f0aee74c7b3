"""Training and evaluation with Detectron2's own loop."""

from ..config import ConfigError
from .accumulation import accumulate_gradients
from .checkpoint import AtomicCheckpointer
from .evaluation import build_evaluator
from .hooks import build_hooks
from .recalibration import recalibrate_checkpoint
from .setup import check_model, load_config
from .statistics import recalibrate_estimates, synchronize_estimates
from .trainer import Trainer

__all__ = [
    "AtomicCheckpointer",
    "ConfigError",
    "Trainer",
    "accumulate_gradients",
    "build_evaluator",
    "build_hooks",
    "check_model",
    "load_config",
    "recalibrate_checkpoint",
    "recalibrate_estimates",
    "synchronize_estimates",
]
