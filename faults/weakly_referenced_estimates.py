"""torch.__future__.set_swap_module_params_on_conversion(True): after activation checkpointing load_state_dict fails,
"Cannot swap t1 because it has weakref associated with it": ops/recomputation.py knows layers by running_mean. Not fixed."""
import torch
from torch.utils.checkpoint import checkpoint
from wsbcn_d2 import BatchChannelNorm
m = BatchChannelNorm(4, 2); x = torch.randn(2, 4, 5, 5, requires_grad=True)
checkpoint(m, x, use_reentrant=False).sum().backward()
torch.__future__.set_swap_module_params_on_conversion(True)
m.load_state_dict(BatchChannelNorm(4, 2).state_dict())
