"""The digits: data of the demo, the tutorial and the study in docs/results.md.

``python -m demo.digits`` makes the dataset, and ``python -m demo.pretraining`` a backbone for it.
Both are for a checkout: an installed package does not have them, and knows the dataset only from
the configs in ``configs/Digits-InstanceSegmentation``.
"""
