"""Batch-channel normalization as one differentiable operation.

Batch normalization by given statistics (mean ``mu``, variance ``s2`` of each channel) followed
by channel normalization over groups of ``D = C / G`` channels (Qiao et al., arXiv 1903.10520v2,
Algorithm 1 and Eq. 15):

.. math::
    z = \\gamma \\frac{x - \\mu}{\\sqrt{s^2 + \\epsilon}} + \\beta, \\qquad
    y = \\gamma'_g \\frac{z - \\mathrm{mean}_g z}{\\sqrt{\\mathrm{var}_g z + \\epsilon}} + \\beta'_g

Both are affine in x once the statistics are known, and the group statistics follow from the mean
``m`` and the variance ``v`` of x in each image and channel. With ``t = x - m`` and
``a = gamma / sqrt(s2 + eps)``:

    mean z = a (m - mu) + beta,    var z = a^2 v      (image and channel)
    group mean and variance from those of the D channels;  d = mean z - group mean
    r = 1 / sqrt(group var + eps),   k = gamma'_g r
    y = k a t + (k d + beta'_g)

So the forward pass reads x twice and writes y once, and saves x and tables. For the backward
pass, with ``S1 = sum dy`` and ``S2 = sum dy t`` over H and W, ``M = H W``:

    u1 = sum_{c in g} S1 / (D M),   u2 = sum_{c in g} r (a S2 + d S1) / (D M)
    dz = k (dy - u1 - u2 r (a t + d))

and every other gradient is a sum of dz or dz t over H and W, which again are tables.

What follows a normalization in a residual network can be part of the operation, which saves its
passes over the activation: the addition of a residual, and ReLU.

Three operations are known to PyTorch, and so to torch.compile and the profiler:
``wsbcn_d2::batch_channel_norm`` and, with ``_backward`` and ``_again`` behind that name, two more.
Where nothing looks at them by name, what they do is called without them, which takes less time. A
backend (:mod:`.eager`, :mod:`.native_backend`, :mod:`.triton_backend`) has a function for each
with the same arguments. The forward one returns ``y`` and ``tables`` (:mod:`.tables`), with ``m,
v, d``, ``scale = k a`` and ``shift = k d + beta'_g`` for each image and channel, ``r`` for each
image and group, ``mu`` and ``rstd = 1 / sqrt(s2 + eps)`` for each channel, and ``count``, the
number of values behind ``mu`` if that is of the batch. The backward one takes them (y only where
it does not find out from x what ReLU let through) and returns the gradients of x, of the residual
(None, or empty, if it is that of y), and of the parameters, ``weight, bias, group_weight,
group_bias``, in one tensor. The third makes y from x and the tables once more, without a residual,
so that it need not be saved (:mod:`.branch`).
"""

from types import ModuleType
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .backend import call_on_device_of, kernels_for
from .extension import extension
from .library import LIBRARY
from .memory_format import dense
from .once import once_differentiable
from .state import PLAIN, in_backward, is_compiling, is_observed
from .tables import new_tables

LIBRARY.define(
    "batch_channel_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, "
    "Tensor group_weight, Tensor group_bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!)? skipped_updates, Tensor(d!)? seen_elements, Tensor? update_rate, float eps, "
    "bool use_batch_statistics, bool relu, bool synchronize) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "batch_channel_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor weight, "
    "Tensor group_weight, Tensor tables, bool relu, bool has_residual, bool synchronize) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("batch_channel_norm_again(Tensor x, Tensor tables, int groups, bool relu) -> Tensor")


def batch_channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    use_batch_statistics: bool = False,
    update_rate: Optional[float] = None,
    skipped_updates: Optional[Tensor] = None,
    seen_elements: Optional[Tensor] = None,
    synchronize: bool = False,
    residual: Optional[Tensor] = None,
    relu: bool = False,
) -> Tensor:
    """Batch-channel normalization of an activation.

    Args:
        x: (N, C, H, W), any floating dtype and memory format; N may be 0.
        weight, bias: affine of the batch normalization, (C,).
        group_weight, group_bias: affine of the channel normalization, (G,); G divides C.
        running_mean, running_var: estimates, (C,), at least float32. Updated in place if
            ``update_rate`` is given.
        eps: added to both variances, inside the root.
        use_batch_statistics: False: estimated BCN. The batch is normalized by the estimates after
            their update, without gradient through them, and the new variance is taken around the
            old mean estimate. True: large-batch BCN. The batch is normalized by its own
            statistics, with gradient through them, and the estimate of the variance is unbiased,
            as in :class:`torch.nn.BatchNorm2d`.
        update_rate: fraction by which the estimates move towards the batch; None leaves them.
            A batch that would make any estimate non-finite changes none of them.
        skipped_updates: integer scalar, incremented in place for each such batch.
        seen_elements: scalar, incremented in place by the number of values behind each update,
            which is the weight of this rank when estimates are averaged over ranks.
        synchronize: with ``use_batch_statistics``, take the statistics over the batches of all
            ranks. Every rank must call; ranks whose batch is empty count for nothing.
        residual: of the shape and dtype of x, added to the result.
        relu: whether ReLU is applied to the result, after that addition.

    Returns:
        Tensor of the shape, dtype and memory format of x.

    Raises:
        RuntimeError: if parameters or residual are on another device than x; from the backward
            pass, if the gradients are differentiated.
    """
    synchronize = synchronize and use_batch_statistics
    options = (update_rate, eps, use_batch_statistics, relu, synchronize)
    if not is_compiling() and type(x) in PLAIN:
        compiled = extension()
        if compiled is not None:
            parameters = (weight, bias, group_weight, group_bias)
            state = (running_mean, running_var, skipped_updates, seen_elements)
            y = compiled.batch_channel_norm(
                kernels_for, Named, x, residual, parameters, state, options
            )
            if y is not None:
                return y
    # Kernels are given addresses, and would read elsewhere.
    if weight.device != x.device:
        raise RuntimeError(f"x is on {x.device}, but the parameters are on {weight.device}")
    if residual is not None and residual.device != x.device:
        raise RuntimeError(f"x is on {x.device}, but the residual is on {residual.device}")
    tensors = (
        x,
        residual,
        weight,
        bias,
        group_weight,
        group_bias,
        running_mean,
        running_var,
        skipped_updates,
        seen_elements,
    )
    if is_observed(x) or torch._C._are_functorch_transforms_active():
        return _BatchChannelNorm.apply(None, options, *tensors)
    return _apply(kernels_for(x), options, *tensors)


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each image and channel of (N, C, H, W): two tables (N, C)."""
    return call_on_device_of(x, kernels_for(x).moments, x)


def _gradients(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    saved = ctx.saved_tensors  # to be asked for only once, for activation checkpointing
    relu, has_residual, _ = ctx.options
    function = (Named if is_observed(grad) else kernels_for(grad)).batch_channel_norm_backward
    results = call_on_device_of(grad, function, grad, *saved, *ctx.options)
    grad_x, grad_residual, parameters = results
    if has_residual and not relu:
        grad_residual = grad
    of_parameters = parameter_gradients(parameters, *saved[2:4], ctx.parameter_dtypes)
    return (None, None, grad_x, grad_residual, *of_parameters, None, None, None, None)


def parameter_gradients(
    gradients: Tensor, weight: Tensor, group_weight: Tensor, dtypes: Tuple[torch.dtype, ...]
) -> Sequence[Tensor]:
    """The gradients of the four parameters, of their dtypes, out of the one tensor of a backend."""
    channels, groups = weight.shape[0], group_weight.shape[0]
    sizes = [channels, channels, groups, groups]
    if dtypes.count(dtypes[0]) == len(dtypes):
        if gradients.dtype != dtypes[0]:
            gradients = gradients.to(dtypes[0])
        # They share a storage but no element, and so need not be views that know of each other.
        return gradients.unsafe_split_with_sizes(sizes)
    return [part.to(dtype) for part, dtype in zip(gradients.split_with_sizes(sizes), dtypes)]


_backward_once = once_differentiable(_gradients)


class Named:
    """A backend whose functions are the operations that PyTorch knows by name."""

    SAVES_OUTPUT_OF_RELU = True

    @staticmethod
    def for_extension() -> Tuple[Any, ...]:
        return ()

    @staticmethod
    def batch_channel_norm_forward(x: Tensor, *args: Any) -> Tuple[Tensor, Tensor]:
        rate = args[_UPDATE_RATE]
        if rate is not None:
            # A tensor, but on the CPU, where reading it stalls nothing: torch.compile would take a
            # number for a constant and compile again whenever a schedule changes it.
            rate = torch.tensor(rate, dtype=torch.float64, device="cpu")
        args = (*args[:_UPDATE_RATE], rate, *args[_UPDATE_RATE + 1 :])
        return torch.ops.wsbcn_d2.batch_channel_norm(x, *args)

    @staticmethod
    def batch_channel_norm_backward(
        grad: Tensor, *args: Any
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        grad_x, of_residual, parameters = torch.ops.wsbcn_d2.batch_channel_norm_backward(
            grad, *args
        )
        relu, has_residual = args[-3:-1]
        return grad_x, of_residual if relu and has_residual else None, parameters

    @staticmethod
    def batch_channel_norm_again(x: Tensor, tables: Tensor, groups: int, relu: bool) -> Tensor:
        return torch.ops.wsbcn_d2.batch_channel_norm_again(x, tables, groups, relu)


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Optional[ModuleType],
        options: Tuple[Any, ...],
        x: Tensor,
        residual: Optional[Tensor],
        *tensors: Optional[Tensor],
    ) -> Tensor:
        _, _, _, relu, synchronize = options
        # Where ReLU let through is read from its output, or found again from x.
        found_again = False
        if kernels is None:
            y, tables = Named.batch_channel_norm_forward(x, residual, *tensors, *options)
            # torch.compile does not look for the kernels: it would trace the attempt to run them.
            # Nor does a tensor without data, with which none can run.
            if relu and residual is None and not is_compiling() and type(x) is Tensor:
                found_again = not kernels_for(x).SAVES_OUTPUT_OF_RELU
        else:
            forward = kernels.batch_channel_norm_forward
            y, tables = call_on_device_of(x, forward, x, residual, *tensors, *options)
            found_again = relu and residual is None and not kernels.SAVES_OUTPUT_OF_RELU
        weight, bias, group_weight, group_bias = tensors[:4]
        saved_y = y if relu and not found_again else None
        ctx.save_for_backward(x, saved_y, weight, group_weight, tables)
        ctx.options = (relu, residual is not None, synchronize)
        ctx.parameter_dtypes = (weight.dtype, bias.dtype, group_weight.dtype, group_bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        return _backward_once(ctx, grad)


# Without what ``apply`` itself adds, which is for transformations of functions.
_apply = super(torch.autograd.Function, _BatchChannelNorm).apply

# Position among the arguments after x.
_UPDATE_RATE = 9


def _forward(x: Tensor, *args: Any) -> Tuple[Tensor, ...]:
    if in_backward():
        # Compiled code that activation checkpointing runs again: it was traced when it ran first.
        args = (*args[:_UPDATE_RATE], None, *args[_UPDATE_RATE + 1 :])
    return call_on_device_of(x, kernels_for(x).batch_channel_norm_forward, x, *args)


def _backward(grad: Tensor, *args: Any) -> Tuple[Tensor, ...]:
    function = kernels_for(grad).batch_channel_norm_backward
    grad_x, grad_residual, parameters = call_on_device_of(grad, function, grad, *args)
    return grad_x, grad_x.new_empty(0) if grad_residual is None else grad_residual, parameters


def _again(x: Tensor, *args: Any) -> Tensor:
    return call_on_device_of(x, kernels_for(x).batch_channel_norm_again, x, *args)


def _forward_shapes(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    *args: Any,
) -> Tuple[Tensor, ...]:
    use_batch_statistics = args[-3]
    tables = new_tables(x, group_weight.shape[0], use_batch_statistics)
    return torch.empty_like(dense(x)), tables


def _backward_shapes(
    grad: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Tensor,
    group_weight: Tensor,
    tables: Tensor,
    *args: Any,
) -> Tuple[Tensor, ...]:
    relu, has_residual = args[-3:-1]
    x = dense(x)
    return (
        torch.empty_like(x),
        torch.empty_like(x) if has_residual and relu else x.new_empty(0),
        tables.new_empty(2 * weight.numel() + 2 * group_weight.numel()),
    )


def _again_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dense(x))


LIBRARY.impl("batch_channel_norm", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("batch_channel_norm_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("batch_channel_norm_again", _again, "CompositeExplicitAutograd")
LIBRARY.impl("batch_channel_norm", _forward_shapes, "Meta")
LIBRARY.impl("batch_channel_norm_backward", _backward_shapes, "Meta")
LIBRARY.impl("batch_channel_norm_again", _again_shape, "Meta")
