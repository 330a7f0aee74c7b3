"""The operations of this package that PyTorch knows by name, as ``torch.ops.wsbcn_d2``."""

import torch

LIBRARY = torch.library.Library("wsbcn_d2", "DEF")
