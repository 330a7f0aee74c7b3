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
from .backend import kernels_for, kernels_for_weight
from .batch_channel_norm import check_arguments, gradients_by_kernels, statistics_of_call
from .differentiable import aliases, gradients_of
from .formula import batch_channel_norm_by, standardize_weight
from .normalization import Normalization
from .recomputation import forward
from .standardized_convolution import Geometry, cast_input, compute_dtype, conv2d_backward
from .state import free_saved_tensors, is_transformed, may_be_repeated


class Link(NamedTuple):
    """A convolution without bias, and the normalization of its output.

    Attributes:
        weight: (C, C_in / groups, kh, kw).
        eps: that of the standardization of the weight; None: it is used as it is.
        geometry: ``stride, padding, dilation, groups`` of :func:`torch.conv2d`, in numbers.
        norm: see :func:`.batch_channel_norm.batch_channel_norm`.
    """

    weight: Tensor
    eps: Optional[float]
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
    tensors = [t for link in links for t in (link.weight, *link.norm.parameters)]
    # Inside of the function nothing says whether gradients are wanted.
    options = (activation, may_be_repeated(), torch.is_grad_enabled())
    return _Branch.apply(links, options, cast_input(x), residual, *tensors)


class _Step(NamedTuple):
    """What the graph keeps of a link, apart from tensors."""

    eps: Optional[float]
    dtype: torch.dtype
    geometry: Geometry
    norm_eps: float
    synchronize: bool


# Arguments: where x is, and how many tensors a link has from the second after it on.
_X, _TENSORS = 2, 5
# What a link saves: the output of the convolution, tables, weight and the four parameters.
_SAVED = 7


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        links: Sequence[Link],
        options: Tuple[str, Optional[bool], bool],
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
            norm, filters, dtype = link.norm, link.weight, compute_dtype(link.weight)
            if link.eps is not None:
                standardize = kernels_for_weight(link.weight).standardize
                filters, _ = standardize(link.weight, link.eps)
            z = torch.conv2d(y, filters.to(dtype), None, *link.geometry)
            last = link is links[-1]
            added = residual if last else None
            check_arguments(z, norm, added)
            after = activation if last else "relu"
            y, tables = forward(kernels, z, norm, added, after, repeatable, ctx)
            if recorded:
                saved += (z, tables, link.weight, *norm.parameters)
                steps.append(_Step(link.eps, dtype, link.geometry, norm.eps, norm.synchronize))
            del z, filters  # which the next convolution has no need of
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
    """Of x, the residual, and weight and parameters of each link."""
    x, y = saved[:2]
    saved[1] = None
    activation, has_residual = ctx.activation, ctx.has_residual
    grad_residual = None
    gradients: List[Optional[Tensor]] = []  # from the last to the first
    for index, step in reversed(list(enumerate(ctx.steps))):
        z, tables, weight, *parameters = saved[-_SAVED:]
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
        grad, of_weight, _ = conv2d_backward(
            grad, y if index else x, weight, step.eps, step.dtype, step.geometry, needed
        )
        gradients += (*of_parameters[::-1], of_weight)
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
            weight, *parameters = tensors = aliases(*tensors)
            gamma, beta, group_weight, group_bias = parameters
            inputs += tensors
            filters = weight if step.eps is None else standardize_weight(weight, step.eps)
            z = torch.conv2d(out, filters.to(step.dtype), None, *step.geometry)
            mean, rstd = statistics_of_call(z, tables, parameters, step.norm_eps, step.synchronize)
            between = "relu" if index < len(ctx.steps) - 1 else ""
            out = batch_channel_norm_by(
                z, mean, rstd, gamma, beta, group_weight, group_bias, step.norm_eps, None, between
            )
        grad = let_through(grad, out if y is None else y, ctx.activation)
        grad_x, *others = gradients_of(out, inputs, needed, grad, create_graph)
    return (grad_x, grad if ctx.has_residual else None, *others)
