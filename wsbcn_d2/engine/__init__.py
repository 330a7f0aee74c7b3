"""Training and evaluation with Detectron2's own loop."""

from .evaluation import build_evaluator
from .setup import ConfigError, load_config
from .trainer import Trainer

__all__ = ["ConfigError", "Trainer", "build_evaluator", "load_config"]
