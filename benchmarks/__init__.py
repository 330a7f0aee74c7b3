"""What the normalization layers cost, measured side by side; for a checkout of the repository.

Each of ``python -m benchmarks.layers``, ``benchmarks.train``, ``benchmarks.memory`` and
``benchmarks.import_time`` measures and writes one JSON file, and ``python -m benchmarks.page``
shows those of ``benchmarks/results`` in ``docs/benchmarks.md`` and ``docs/memory.md``. ``make
benchmark`` runs all five.
"""
