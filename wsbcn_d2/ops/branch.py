"""Convolutions and the normalization of their outputs as one differentiable operation.

It is the branch of a residual block: convolutions, each followed by batch-channel normalization and
ReLU, and at the end the addition of a residual. Results are those of the single operations. But
between two convolutions only the input of the normalization is saved: its output is made again by
the backward pass, from the tables that are there. That is a sixth less for a bottleneck
block. And with one image a step a GPU waits for the host, which has less to do for one
operation than for six.
"""

from typing import Any, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from .backend import call_on_device_of, kernels_for
from .batch_channel_norm import Named, parameter_gradients
from .extension import extension
from .once import once_differentiable
from .state import is_observed


class Filters(Protocol):
    """Filters that need not be saved. Must not refer to the result, nor to what is made of it."""

    def filters(self) -> Tensor:
        """The filters, once for each backward pass."""


class Link(NamedTuple):
    """A convolution without bias, and the normalization of its output.

    Attributes:
        filters: (C, C_in / groups, kh, kw), of the dtype of the input.
        again: what the backward pass gets the filters from; None: they are saved.
        geometry: ``stride, padding, dilation, groups`` of :func:`torch.conv2d`, in numbers.
        parameters: ``weight, bias, group_weight, group_bias``; these and what follows are arguments
            of :func:`.batch_channel_norm.batch_channel_norm`.
        state: ``running_mean, running_var, skipped_updates, seen_elements``.
        update_rate, eps, use_batch_statistics, synchronize: of the same name there.
    """

    filters: Tensor
    again: Optional[Filters]
    geometry: Tuple[Sequence[int], Sequence[int], Sequence[int], int]
    parameters: Tuple[Tensor, Tensor, Tensor, Tensor]
    state: Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]
    update_rate: Optional[float]
    eps: float
    use_batch_statistics: bool
    synchronize: bool


def branch(
    x: Tensor, links: Sequence[Link], residual: Optional[Tensor] = None, relu: bool = True
) -> Tensor:
    """``relu(norm(conv(... relu(norm(conv(x))) ...)) + residual)``.

    Not for what is traced (:func:`.state.is_traced`): the single operations are to be traced.

    Args:
        x: (N, C_in, H, W).
        links: at least one.
        residual: of the shape and dtype of the result.
        relu: whether ReLU is applied to the result, as it always is between two convolutions.

    Returns:
        (N, C_out, H_out, W_out).

    Raises:
        ValueError: if the residual has another shape.
    """
    compiled = extension()
    if compiled is not None:
        y = compiled.branch(kernels_for, Named, links, x, residual, relu)
        if y is not None:
            return y
    tensors = [t for link in links for t in (link.filters, *link.parameters)]
    # Inside of the function nothing says whether gradients are wanted.
    return _apply(links, relu, torch.is_grad_enabled(), x, residual, *tensors)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        links: Sequence[Link],
        relu: bool,
        grad_enabled: bool,
        x: Tensor,
        residual: Optional[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        kernels = kernels_for(x)
        # Without a residual, Triton finds out from x what ReLU let through.
        saved_y = relu and (residual is not None or kernels.SAVES_OUTPUT_OF_RELU)
        kernels = Named if is_observed(x) else kernels
        recorded = grad_enabled and any(ctx.needs_input_grad)
        y, saved = call_on_device_of(x, _forward, kernels, links, relu, x, residual, recorded)
        if not recorded:
            return y
        ctx.save_for_backward(x, y if saved_y else None, *saved)
        ctx.relu, ctx.has_residual = relu, residual is not None
        ctx.links = [
            (link.again, link.geometry, link.synchronize, tuple([p.dtype for p in link.parameters]))
            for link in links
        ]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        return _backward_once(ctx, grad)


# Without what ``apply`` itself adds, which is for transformations of functions.
_apply = super(torch.autograd.Function, _Branch).apply

# Arguments: where x is, and how many tensors a link has from the second after it on.
_X, _TENSORS = 3, 5

# What a link saves: the output of the convolution, weight, group_weight, tables and filters.
_SAVED = 5


def _forward(
    kernels: Any,
    links: Sequence[Link],
    relu: bool,
    x: Tensor,
    residual: Optional[Tensor],
    recorded: bool,
) -> Tuple[Tensor, List[Optional[Tensor]]]:
    """The result, and if it is recorded, for each link what it saves."""
    saved: List[Optional[Tensor]] = []
    last = links[-1]
    y = x
    for link in links:
        filters, parameters = link.filters, link.parameters
        z = torch.conv2d(y, filters, None, *link.geometry)
        added = residual if link is last else None
        if added is not None and added.shape != z.shape:
            raise ValueError(f"expected a residual of shape {z.shape}, got {added.shape}")
        y, tables = kernels.batch_channel_norm_forward(
            z,
            added,
            *parameters,
            *link.state,
            link.update_rate,
            link.eps,
            link.use_batch_statistics,
            relu or link is not last,
            link.synchronize,
        )
        if recorded:
            kept = filters if link.again is None else None
            saved += (z, parameters[0], parameters[2], tables, kept)
        del z  # which the next convolution has no need of
    return y, saved


def _gradients(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    # Nothing but this list keeps them, so that each is freed as soon as it has been used, as those
    # of single operations are.
    saved = list(ctx.saved_tensors)
    if hasattr(ctx, "maybe_clear_saved_tensors"):  # not PyTorch 2.0
        ctx.maybe_clear_saved_tensors()
    kernels = Named if is_observed(grad) else kernels_for(grad)
    return call_on_device_of(grad, _backward, ctx, kernels, grad, saved)


_backward_once = once_differentiable(_gradients)


def _backward(
    ctx: Any,
    kernels: Any,
    grad: Tensor,
    saved: List[Optional[Tensor]],
) -> Tuple[Optional[Tensor], ...]:
    x, y = saved[:2]
    saved[1] = None
    gradients: List[Optional[Tensor]] = []  # from the last to the first
    relu, has_residual = ctx.relu, ctx.has_residual
    grad_residual = grad if has_residual and not relu else None
    needed = ctx.needs_input_grad
    for index in range(len(ctx.links) - 1, -1, -1):
        again, (stride, padding, dilation, conv_groups), synchronize, dtypes = ctx.links[index]
        z, weight, group_weight, tables, filters = saved[-_SAVED:]
        del saved[-_SAVED:]
        grad, of_residual, of_parameters = kernels.batch_channel_norm_backward(
            grad, z, y, weight, group_weight, tables, relu, has_residual, synchronize
        )
        if of_residual is not None:
            grad_residual = of_residual
        gradients += parameter_gradients(of_parameters, weight, group_weight, dtypes)[::-1]
        z = y = None
        relu, has_residual = True, False
        if index:
            y = _output_again(kernels, *saved[-_SAVED:])
        if again is not None:
            filters = again.filters()
        grad, of_filters, _ = _convolution_backward(
            grad,
            y if index else x,
            filters,
            None,
            stride,
            padding,
            dilation,
            False,
            _NO_PADDING,
            conv_groups,
            (index > 0 or needed[_X], needed[_X + 2 + _TENSORS * index], False),
        )
        gradients.append(of_filters)
    return (None, None, None, grad, grad_residual, *gradients[::-1])


def _output_again(
    kernels: Any, z: Tensor, weight: Tensor, group_weight: Tensor, tables: Tensor, _: Any
) -> Tensor:
    return kernels.batch_channel_norm_again(z, tables, group_weight.shape[0], True)


_convolution_backward = torch.ops.aten.convolution_backward.default
_NO_PADDING = (0, 0)
