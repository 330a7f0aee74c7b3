"""TypeError "filters were multiplied by factors" for weights of 0, and for load_state_dict(assign=True) in eval mode
of weights that are another multiple of those that the model has."""
import torch, torch.nn as nn
from wsbcn_d2 import WSConv2d
c = WSConv2d(3, 4, 3).eval()
for factor in (0.0, 0.99):
    s = {k: v.clone() for k, v in c.state_dict().items()}; s["weight"] *= factor
    try: c.load_state_dict(s, assign=True); print(factor, "fine")
    except RuntimeError as e: print(factor, str(e)[:200])
