"""Which of several trained models is better, by how much, whether it is noise, and why.

``tools/compare.py``, ``tools/analyze_norms.py`` and ``tools/visualize.py`` are the commands; see
``docs/evaluation.md``. Nothing here needs a run to have been made with this package.

- :mod:`.runs` reads the folder of a run, :mod:`.coco` evaluates its detections,
- :mod:`.comparison` puts runs side by side, and :mod:`.comparison_page` shows it,
- :mod:`.norms` and :mod:`.probe` look into a model, :mod:`.norm_analysis` into a checkpoint, and
  :mod:`.norms_page` shows it,
- :mod:`.page` is what both pages are made of, and :mod:`.files` reads their JSON files.
"""

from .coco import CocoEvaluation, resample_images
from .comparison import compare_runs
from .norm_analysis import analyze_checkpoint, analyze_model
from .norms import analyze_layers, estimate_drift, filter_statistics
from .probe import probe_loss
from .runs import Run, read_run

__all__ = [
    "CocoEvaluation",
    "Run",
    "analyze_checkpoint",
    "analyze_layers",
    "analyze_model",
    "compare_runs",
    "estimate_drift",
    "filter_statistics",
    "probe_loss",
    "read_run",
    "resample_images",
]
