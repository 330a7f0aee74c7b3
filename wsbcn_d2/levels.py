"""Gives a head that is called for one feature level after the other estimates for each level."""

from typing import List, Tuple

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from .layers import BatchChannelNorm


def separate_levels(head: nn.Module, num_levels: int) -> nn.Module:
    """Gives the BCN layers of a head estimates for each feature level, in place.

    For heads that are shared between the levels of a feature pyramid. With one set of estimates,
    training normalizes each level with an update that comes from it, and evaluation normalizes all
    with what is left of the last. It is done without being asked for where such a head is
    recognized: Detectron2's RetinaNet and FCOS; heads with a list ``scales``, as AdelaiDet and
    CenterNet2 have them; and, by ``convert``, torchvision's RetinaNet and FCOS, and what is called
    so with the ``example_inputs``.

    Args:
        head: calls each of its BCN layers once for each level, the levels in the same order, in
            one call of its own. A call that ends halfway does not shift the levels of the next.
        num_levels: of the feature pyramid.

    Returns:
        ``head``

    Raises:
        ValueError: if there is no BCN layer, or one with estimates for another number of levels.
    """
    norms = [m for m in head.modules() if isinstance(m, BatchChannelNorm)]
    if not norms or {norm.num_levels for norm in norms} - {1, num_levels}:
        found = ", ".join(sorted({str(norm.num_levels) for norm in norms})) or "no BCN layers"
        raise ValueError(
            f"{type(head).__name__}: expected BCN layers with estimates for 1 or {num_levels} "
            f"levels, found {found}"
        )
    for norm in norms:
        if norm.num_levels < num_levels:
            norm.set_num_levels(num_levels)
    restart_levels_before_forward(head)
    return head


def levels_of(head: nn.Module) -> int:
    """How many feature levels a head is for, if it is known to share its layers between them;
    otherwise 1."""
    if isinstance(head, RetinaNetHead):
        return head._num_features
    # A factor for each level, of FCOS and what is derived from it.
    scales = head.scales if "scales" in head._modules else None  # not a property of that name
    if not isinstance(scales, nn.ModuleList):
        return 1
    are_factors = all([p.numel() for p in scale.parameters()] == [1] for scale in scales)
    return len(scales) if are_factors else 1


def restart_levels_before_forward(head: nn.Module) -> None:
    """A forward pass of a head that ended halfway must not shift the levels of the next."""
    if _restart_levels not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_restart_levels)


def _restart_levels(self: nn.Module, inputs: Tuple[List[Tensor]]) -> None:
    # With the argument's type of RetinaNetHead.forward, so that TorchScript can compile it.
    if not torch.jit.is_scripting():
        for module in self.modules():
            if isinstance(module, BatchChannelNorm):
                module.restart_levels()
