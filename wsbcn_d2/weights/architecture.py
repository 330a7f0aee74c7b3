"""Which norms and heads a checkpoint has, and the keys of a config that has the same."""

import re
from typing import Any, Dict, Iterable, Mapping, Tuple

Shapes = Mapping[str, Tuple[int, ...]]

_PARTS = {
    "MODEL.RESNETS": r"(?:.*\.)?(?:stem|res\d)\.",
    "MODEL.FPN": r"backbone\.fpn_",
    "MODEL.ROI_BOX_HEAD": r"roi_heads\.box_head\.",
    "MODEL.ROI_MASK_HEAD": r"roi_heads\.mask_head\.",
}
_SCORES = r"roi_heads\.box_predictor\.cls_score\.weight"
# Norms of the model that have a place for those of the file.
_TAKES = {"": ("",), "BN": ("BN", "BCN"), "GN": ("GN",), "BCN": ("BCN",)}


def keys_that_fit(file: Shapes, model: Shapes) -> Dict[str, Any]:
    """Changes of the config that give the model a place for all norms and heads of a file.

    Args:
        file: shapes of the weights in the file by their names in the model.
        model: shapes of the weights of the model.
    """
    keys: Dict[str, Any] = {}
    for part, pattern in _PARTS.items():
        source, target = ([n for n in names if re.match(pattern, n)] for names in (file, model))
        if not source or not target:
            continue
        norm = _kind_of_norm(source)
        if _kind_of_norm(target) not in _TAKES[norm]:
            keys[f"{part}.NORM"] = "BCN" if norm == "BN" else norm
            if norm and any(name.endswith(".ws_eps") for name in target):
                keys[f"{part}.NORM"] += "+WS"
        if part == "MODEL.ROI_BOX_HEAD":
            for layer in ("conv", "fc"):
                counts = [_count(rf".*\.{layer}\d+\.weight", names) for names in (source, target)]
                if counts[0] != counts[1]:
                    keys[f"{part}.NUM_{layer.upper()}"] = counts[0]
    scores = [next((s[n] for n in s if re.fullmatch(_SCORES, n)), None) for s in (file, model)]
    if scores[0] and scores[1] and scores[0][0] != scores[1][0]:
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = scores[0][0] - 1
    return keys


def _kind_of_norm(names: Iterable[str]) -> str:
    entries = {name.rpartition(".norm.")[2] for name in names if ".norm." in name}
    if "group_weight" in entries:
        return "BCN"
    return "BN" if "running_mean" in entries else "GN" if "weight" in entries else ""


def _count(pattern: str, names: Iterable[str]) -> int:
    return sum(bool(re.fullmatch(pattern, name)) for name in names)
