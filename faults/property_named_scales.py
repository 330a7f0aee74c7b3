"""After `import wsbcn_d2`, putting any module with a property `scales` that raises (or costs) into any other fails."""
from torch import nn
import wsbcn_d2
class Quantizer(nn.Module):
    @property
    def scales(self): raise RuntimeError("not calibrated yet")
nn.Sequential(Quantizer())
