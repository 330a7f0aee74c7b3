"""Weight Standardization and Batch-Channel Normalization for Detectron2.

Importing this package makes its norm options (``NORM: "BCN+WS"``) and backbones known to
Detectron2; :func:`unregister` undoes it.
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ImportError(
        "wsbcn_d2 is a plugin for Detectron2, which is not installed in this environment. "
        "Install it from https://github.com/facebookresearch/detectron2, or run `make setup` in a "
        "checkout of wsbcn_d2."
    ) from error
else:
    from .version import __version__, check_versions

    check_versions()

from . import model_zoo
from .config import add_wsbcn_config
from .conversion import convert
from .detectron2_hooks import is_registered, register, unregister
from .export import fold
from .layers import BatchChannelNorm, ChannelNorm, WSConv2d, WSConvTranspose2d
from .levels import separate_levels
from .modeling import checkpoint_activations_
from .norm_options import get_norm, list_norm_options
from .ops import standardize_weight
from .summary import summarize

__all__ = [
    "BatchChannelNorm",
    "ChannelNorm",
    "WSConv2d",
    "WSConvTranspose2d",
    "__version__",
    "add_wsbcn_config",
    "checkpoint_activations_",
    "convert",
    "fold",
    "get_norm",
    "is_registered",
    "list_norm_options",
    "model_zoo",
    "register",
    "separate_levels",
    "standardize_weight",
    "summarize",
    "unregister",
]

register()
