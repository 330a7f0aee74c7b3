"""From a trained model to files that need nothing of this package."""

from .fold import fold

__all__ = ["fold"]
