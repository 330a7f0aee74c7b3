"""Training and evaluation with Detectron2's own loop."""

from .accumulation import accumulate_gradients
from .evaluation import build_evaluator
from .hooks import build_hooks
from .setup import ConfigError, load_config
from .statistics import recalibrate_estimates, synchronize_estimates
from .trainer import Trainer

__all__ = [
    "ConfigError",
    "Trainer",
    "accumulate_gradients",
    "build_evaluator",
    "build_hooks",
    "load_config",
    "recalibrate_estimates",
    "synchronize_estimates",
]
