"""Detectron2's ResNet blocks with ReLU and the addition of the shortcut inside the normalization.

Parameters, names and results are those of the stock blocks; with :class:`BatchChannelNorm` layers a
block makes one pass over an activation where the stock block makes two or three, and saves nothing
between two of its convolutions but what the first of them computed.
"""

from typing import Dict, List, Optional, Type

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from ..layers import BatchChannelNorm, run_branch
from .stock import stock_method

_STEM = stock_method(BasicStem, "forward")
_BASIC = stock_method(BasicBlock, "forward")
_BOTTLENECK = stock_method(BottleneckBlock, "forward")


class FusedBasicStem(BasicStem):
    """The stem of a ResNet."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: images, (N, 3, H, W).

        Returns:
            (N, 64, H / 4, W / 4)
        """
        if torch.jit.is_scripting():
            x = F.relu(self.conv1(x))
        else:  # TorchScript does not compile what is in the branch not taken
            if BasicStem.forward is not _STEM:
                return super().forward(x)
            x = run_branch([self.conv1], x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    """The block of ResNet-18 and 34."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).

        Returns:
            (N, out_channels, H / stride, W / stride)
        """
        if torch.jit.is_scripting():
            out = self.conv2(F.relu(self.conv1(x)))
            shortcut = x if self.shortcut is None else self.shortcut(x)
            return F.relu(out + shortcut)
        else:
            if BasicBlock.forward is not _BASIC:
                return super().forward(x)
            return _run_block([self.conv1, self.conv2], x, self.shortcut)


class FusedBottleneckBlock(BottleneckBlock):
    """The block of ResNet-50 and deeper."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).

        Returns:
            (N, out_channels, H / stride, W / stride)
        """
        if torch.jit.is_scripting():
            out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
            shortcut = x if self.shortcut is None else self.shortcut(x)
            return F.relu(out + shortcut)
        else:
            if BottleneckBlock.forward is not _BOTTLENECK:
                return super().forward(x)
            return _run_block([self.conv1, self.conv2, self.conv3], x, self.shortcut)


def _run_block(convs: List[nn.Module], x: Tensor, shortcut: Optional[nn.Module]) -> Tensor:
    residual = x if shortcut is None else run_branch([shortcut], x, activation="")
    return run_branch(convs, x, residual)


BLOCKS: Dict[Type[nn.Module], Type[nn.Module]] = {
    BasicStem: FusedBasicStem,
    BasicBlock: FusedBasicBlock,
    BottleneckBlock: FusedBottleneckBlock,
}


def zero_init_residual_(resnet: nn.Module) -> None:
    """Makes the residual blocks of a ResNet begin as the identity (or their shortcut), in place.

    The last factor of the last normalization of each branch becomes 0: that of the groups for
    BCN, whose channel normalization would divide by the standard deviation of zeros otherwise.

    Raises:
        ValueError: if a block has no trainable parameter for that: frozen, FrozenBN, no norm.
    """
    for name, block in resnet.named_modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "shortcut"):
            norm = (block.conv3 if hasattr(block, "conv3") else block.conv2).norm
            factor = "group_weight" if isinstance(norm, BatchChannelNorm) else "weight"
            weight = getattr(norm, factor, None)
            if weight is None or not weight.requires_grad:
                found = "none" if norm is None else type(norm).__name__
                raise ValueError(
                    f"MODEL.WSBCN.ZERO_INIT_RESIDUAL: the last norm of {name} ({found}) has no "
                    "trainable weight; set it to False, or MODEL.RESNETS.NORM to another norm"
                )
            nn.init.zeros_(weight)
