"""The mark in state dicts of folded models, by which our layers refuse to load them.

:mod:`wsbcn_d2.export.fold` does the folding.
"""

from typing import Any, Dict

# In the metadata of every module's entry in the state dict of a folded model.
FOLDED = "wsbcn_d2_folded"


def refuse_folded(metadata: Dict[str, Any], prefix: str) -> None:
    """To be called where a layer of this package loads a state dict.

    Args:
        metadata: what the state dict says of the layer.
        prefix: of the layer's entries.

    Raises:
        ValueError: if they come from a folded model.
    """
    if metadata.get(FOLDED):
        raise ValueError(
            f"the weights for {prefix[:-1] or 'the layer'} come from a folded model: "
            "standardization and estimates are baked into them, and here they would be applied "
            "once more. Load them with the config and load_model.py that were written beside them; "
            "to go on with training, use the checkpoint that was exported"
        )
