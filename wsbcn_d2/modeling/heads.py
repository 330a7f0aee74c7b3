"""Detectron2's heads for regions, with their convolutions as one operation.

Parameters, names and results are those of the stock heads. With :class:`BatchChannelNorm` layers
they save little more than half as much for the backward pass; see :mod:`wsbcn_d2.ops.branch`.
"""

from typing import Any, Dict, Sequence, Type

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from ..layers import fusible_activation, run_branch
from .stock import stock_method

_FORWARD = stock_method(FastRCNNConvFCHead, "forward")
_LAYERS = stock_method(MaskRCNNConvUpsampleHead, "layers")


class FusedConvFCHead(FastRCNNConvFCHead):
    """The box head with convolutions (``MODEL.ROI_BOX_HEAD.NUM_CONV``)."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: features of regions, (R, C, H, W).

        Returns:
            (R, the last of ``MODEL.ROI_BOX_HEAD.FC_DIM``)
        """
        if torch.jit.is_scripting():
            for layer in self:
                x = layer(x)
            return x
        else:  # TorchScript does not compile what is in the branch not taken
            if FastRCNNConvFCHead.forward is not _FORWARD:
                return super().forward(x)
            return run_layers(list(self), x)


class FusedConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """The mask head."""

    def layers(self, x: Tensor) -> Tensor:
        """
        Args:
            x: features of regions, (R, C, H, W).

        Returns:
            Logits, (R, classes, 2 H, 2 W).
        """
        if torch.jit.is_scripting():
            for layer in self:
                x = layer(x)
            return x
        else:
            if MaskRCNNConvUpsampleHead.layers is not _LAYERS:
                return super().layers(x)
            return run_layers(list(self), x)


def run_layers(layers: Sequence[Any], x: Tensor) -> Tensor:
    """``layers`` one after the other; the convolutions that they begin with as one operation."""
    count = 0
    while (
        count < len(layers)
        and isinstance(layers[count], Conv2d)
        and fusible_activation(layers[count].activation) == "relu"
    ):
        count += 1
    if count:
        x = run_branch(layers[:count], x)
    for layer in layers[count:]:
        x = layer(x)
    return x


HEADS: Dict[Type[nn.Module], Type[nn.Module]] = {
    FastRCNNConvFCHead: FusedConvFCHead,
    MaskRCNNConvUpsampleHead: FusedConvUpsampleHead,
}
