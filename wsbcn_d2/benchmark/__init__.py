"""What the normalization layers cost: measured side by side, and the page that shows it.

``tools/benchmark_norms.py`` and ``tools/benchmark_train.py`` are the commands, and
``python -m wsbcn_d2.benchmark`` runs those behind ``docs/benchmarks.md`` and rewrites it.
"""
