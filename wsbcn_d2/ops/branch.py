"""Several convolutions, each with BCN, as one differentiable operation on tensors.

:mod:`wsbcn_d2.layers.branch` calls it for modules.

It is the branch of a residual block: convolutions, each followed by batch-channel normalization and
ReLU, and at the end the addition of a residual. Results are those of the single operations. But
between two convolutions only the input of the normalization is saved: its output is made again by
the backward pass, from the tables that are there. That is a sixth less for a bottleneck block.
"""

from types import ModuleType
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .activation import let_through
from .backend import kernels_for
from .batch_channel_norm import check_arguments, gradients_by_kernels, statistics_of_call
from .differentiable import aliases, gradients_of
from .formula import batch_channel_norm_by
from .normalization import Normalization
from .recomputation import forward
from .state import free_saved_tensors, is_transformed, may_be_repeated

# ``stride, padding, dilation, groups`` of :func:`torch.conv2d`, in numbers.
Geometry = Tuple[Sequence[int], Sequence[int], Sequence[int], int]


class Link(NamedTuple):
    """A convolution without bias, and the normalization of its output.

    Attributes:
        weight: the filters, (C, C_in / groups, kh, kw).
        geometry: of the convolution.
        norm: see :func:`.batch_channel_norm.batch_channel_norm`.
    """

    weight: Tensor
    geometry: Geometry
    norm: Normalization


def branch(
    x: Tensor, links: Sequence[Link], residual: Optional[Tensor] = None, activation: str = "relu"
) -> Tensor:
    """``activation(norm(conv(... relu(norm(conv(x))) ...)) + residual)``.

    For plain tensors only (:func:`.state.is_plain`): the single operations are to be traced.

    Args:
        x: (N, C_in, H, W).
        links: at least one.
        residual: of the shape of the result.
        activation: of the result. Between two convolutions it is ReLU.

    Returns:
        (N, C_out, H_out, W_out).

    Raises:
        ValueError: if shapes do not fit together.
    """
    links = [link._replace(weight=_autocast(link.weight)) for link in links]
    tensors = [t for link in links for t in (link.weight, *link.norm.parameters)]
    # Inside of the function nothing says whether gradients are wanted.
    options = (activation, may_be_repeated(), torch.is_grad_enabled())
    return _Branch.apply(links, options, _autocast(x), residual, *tensors)


def _autocast(tensor: Tensor) -> Tensor:
    """An argument of a convolution in the dtype that autocast gives it, which leaves float64."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensor
    is_double = tensor.dtype == torch.float64
    return tensor if is_double else tensor.to(torch.get_autocast_dtype(kind))


class _Step(NamedTuple):
    """What the graph keeps of a link, apart from tensors."""

    geometry: Geometry
    eps: float
    synchronize: bool


# Arguments: where x is, and how many tensors a link has from the second after it on.
_X, _TENSORS = 2, 5
# What a link saves: the output of the convolution, tables, filters and the four parameters.
_SAVED = 7


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        links: Sequence[Link],
        options: Tuple[str, bool, bool],
        x: Tensor,
        residual: Optional[Tensor],
        *_: Tensor,
    ) -> Tensor:
        activation, repeatable, grad_enabled = options
        kernels = kernels_for(x)
        saved: List[Tensor] = []
        steps: List[_Step] = []
        recorded = grad_enabled and any(ctx.needs_input_grad)
        y = x
        for link in links:
            norm = link.norm
            z = torch.conv2d(y, link.weight, None, *link.geometry)
            last = link is links[-1]
            added = residual if last else None
            check_arguments(z, norm, added)
            after = activation if last else "relu"
            y, tables = forward(kernels, z, norm, added, after, repeatable, ctx)
            if recorded:
                saved += (z, tables, link.weight, *norm.parameters)
                steps.append(_Step(link.geometry, norm.eps, norm.synchronize))
            del z  # which the next convolution has no need of
        if recorded:
            reads_y = activation and (residual is not None or kernels.SAVES_ACTIVATED_OUTPUT)
            ctx.save_for_backward(x, y if reads_y else None, *saved)
            ctx.activation, ctx.has_residual, ctx.steps = activation, residual is not None, steps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        # Nothing but this list keeps them, so that each is freed as soon as it has been used, as
        # those of single operations are.
        saved = list(ctx.saved_tensors)
        free_saved_tensors(ctx)
        if torch.is_grad_enabled() or is_transformed(grad):
            return (None, None, *_differentiable_gradients(ctx, grad, saved))
        return (None, None, *_gradients(ctx, kernels_for(grad), grad, saved))


def _gradients(
    ctx: Any, kernels: ModuleType, grad: Any, saved: List[Any]
) -> Tuple[Optional[Tensor], ...]:
    """Of x, the residual, and filters and parameters of each link."""
    x, y = saved[:2]
    saved[1] = None
    activation, has_residual = ctx.activation, ctx.has_residual
    grad_residual = None
    gradients: List[Optional[Tensor]] = []  # from the last to the first
    for index, step in reversed(list(enumerate(ctx.steps))):
        z, tables, filters, *parameters = saved[-_SAVED:]
        del saved[-_SAVED:]
        grad, of_residual, *of_parameters = gradients_by_kernels(
            grad, z, y, tables, parameters, activation, has_residual, step.synchronize
        )
        if has_residual:
            grad_residual = of_residual
        z = y = None
        activation, has_residual = "relu", False
        if index:
            y = _output_again(kernels, *saved[-_SAVED:])
        needed = ctx.needs_input_grad
        needed = (index > 0 or needed[_X], needed[_X + 2 + _TENSORS * index], False)
        stride, padding, dilation, groups = step.geometry
        grad, of_filters, _ = torch.ops.aten.convolution_backward(
            grad,
            y if index else x,
            filters,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            needed,
        )
        gradients += (*of_parameters[::-1], of_filters)
    return (grad, grad_residual, *gradients[::-1])


def _output_again(
    kernels: ModuleType, z: Tensor, tables: Tensor, _: Tensor, *parameters: Tensor
) -> Tensor:
    return kernels.again(z, tables, parameters[2].shape[0], "relu")


def _differentiable_gradients(
    ctx: Any, grad: Tensor, saved: List[Any]
) -> Tuple[Optional[Tensor], ...]:
    """The same by differentiable operations: for second derivatives, or many gradients at once."""
    create_graph = torch.is_grad_enabled()
    needed = [ctx.needs_input_grad[_X], *ctx.needs_input_grad[_X + 2 :]]
    with torch.enable_grad():
        y = saved[1]
        inputs = aliases(saved[0])
        out = inputs[0]
        for index, step in enumerate(ctx.steps):
            _, tables, *tensors = saved[2 + _SAVED * index :][:_SAVED]
            filters, *parameters = tensors = aliases(*tensors)
            gamma, beta, group_weight, group_bias = parameters
            inputs += tensors
            z = torch.conv2d(out, filters, None, *step.geometry)
            mean, rstd = statistics_of_call(z, tables, parameters, step.eps, step.synchronize)
            between = "relu" if index < len(ctx.steps) - 1 else ""
            out = batch_channel_norm_by(
                z, mean, rstd, gamma, beta, group_weight, group_bias, step.eps, None, between
            )
        grad = let_through(grad, out if y is None else y, ctx.activation)
        grad_x, *others = gradients_of(out, inputs, needed, grad, create_graph)
    return (grad_x, grad if ctx.has_residual else None, *others)
