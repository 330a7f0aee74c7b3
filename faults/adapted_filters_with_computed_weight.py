"""keep_function=True, then pruning / weight_norm, save, load into a model built alike: strict load fails with
unexpected ws_scale, ws_shift; Detectron2's checkpointer (not strict) drops them, and outputs change."""
import torch, torch.nn as nn, wsbcn_d2
from torch.nn.utils import prune
mk = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
a = wsbcn_d2.convert(mk(), "BN+WS", keep_function=True); prune.l1_unstructured(a[0], "weight", 0.3)
b = wsbcn_d2.convert(mk(), "BN+WS"); prune.l1_unstructured(b[0], "weight", 0.3)
x = torch.randn(1, 3, 9, 9)
print(b.load_state_dict(a.state_dict(), strict=False)); print((a.eval()(x) - b.eval()(x)).abs().max().item())
