"""When filters are standardized: once for as long as they stay the same, and many at once.

A convolution that is called several times between two steps of the optimizer (a head on five
feature levels, several batches whose gradients accumulate, a recomputed stage) uses the same
standardized filters each time, and so does one that is evaluated on many images. What each
convolution remembers is valid for its weight tensor as it is: its identity, version and address,
``eps`` and the dtype. All of these are known to the host, so nothing waits for a GPU. PyTorch
counts a version for every change in place, also by ``load_state_dict`` and in-place operations
under ``no_grad``, but not for those of fused optimizers and through ``weight.data``; so after a
step of an optimizer, a backward pass, a change of mode or a conversion of the module, filters are
standardized anew in any case. Nor does it for what other processes write: collectives of
``torch.distributed`` that receive into a weight, shared memory.

The convolutions of one model share the work (:func:`standardize_together`): the first that needs
its filters has those of some megabytes of its neighbours standardized as well, by one operation,
whose gradient is one operation too.

The graph does not keep standardized filters (:class:`Kept`), which would be a second copy of the
weights while memory is fullest. They go with the last call of the forward pass, by the number of
calls in the one before, and those of some megabytes at a time are made once more as the backward
pass reaches them.
"""

import itertools
import threading
import weakref
from types import TracebackType
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple, Type

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    from torch.optim.optimizer import register_optimizer_step_post_hook
except ImportError:  # PyTorch 2.0
    register_optimizer_step_post_hook = None

from ..ops import in_backward, standardize_all, standardize_all_backward, standardize_weight

# Values in the weights that are standardized together. Their gradients are ready together as well,
# so the number is about that of a gradient bucket of DistributedDataParallel (25 MB).
_GROUP_SIZE = 6_000_000

# Whether PyTorch tells of hooks for saved tensors: older versions keep standardized filters.
_HOOKS_ARE_KNOWN = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")

_scope: Optional["StandardizeOnce"] = None

# Those whose standardized filters a graph needs and does not keep, and that have not been let go.
# The backward pass, which lets them go, runs in threads of its own.
_unsaved: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_unsaved_lock = threading.Lock()

# How many steps optimizers have made in this process.
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


if register_optimizer_step_post_hook is not None:
    register_optimizer_step_post_hook(_count_step)


class _Statistics(NamedTuple):
    """Of the filters of several convolutions, one after the other: what their gradients need.

    Attributes:
        mean, rstd: (number of all filters,).
        ends: for each convolution, where its filters end there.
    """

    mean: Tensor
    rstd: Tensor
    ends: List[int]


class Standardized:
    """The standardized filters of one convolution, and what they were made of.

    Attributes:
        value: None while there is no need of them.
        statistics, index: of all convolutions that were standardized together, and which of these
            this is.
    """

    def __init__(
        self, conv: nn.Module, weight: Tensor, value: Tensor, statistics: "_Statistics", index: int
    ) -> None:
        self.weight = weight
        self.version = weight._version
        self.address = weight.data_ptr()
        self.steps = _steps
        self.eps = conv.eps
        self.dtype = value.dtype
        self.value: Optional[Tensor] = value
        self.value_version = value._version
        self.statistics = statistics
        self.index = index
        self.scope = None if _scope is None else _scope.token
        # Whether a backward pass has come by: the optimizer may now change the weight.
        self.used = False
        # Calls of the convolution in forward passes of training: those to expect, those that have
        # been, and those whose backward pass is to come.
        self.expected_calls: int = conv._calls
        self.calls = 0
        self.pending = 0
        # Collects the gradients of all but the last of several backward passes.
        self.leaf: Optional[Tensor] = None

    def hold(self, value: Tensor) -> None:
        """Takes ``value`` for the standardized filters."""
        self.value = value
        self.value_version = value._version

    def check_weight(self) -> None:
        """Raises RuntimeError if the weight is no longer what it was."""
        if self.version != self.weight._version or self.address != self.weight.data_ptr():
            raise RuntimeError(
                "the weight of a standardized convolution was changed in place, or its data "
                "exchanged, between a forward pass and its backward pass"
            )

    def is_made_of(self, weight: Tensor, eps: float, dtype: torch.dtype) -> bool:
        """Whether ``weight`` is what it was when these were made of it."""
        return (
            self.weight is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.eps == eps
            and self.dtype == dtype
        )

    def is_at_hand(self, weight: Tensor, eps: float, dtype: torch.dtype) -> bool:
        """Whether these are the filters to use in one more forward pass of a step of training,
        which is most often so; otherwise :meth:`holds_for` tells."""
        value = self.value
        return (
            value is not None
            and self.value_version == value._version
            and self.weight is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.eps == eps
            and self.dtype == dtype
            and self.steps == _steps
            and not self.used
            and _scope is None
            and weight.requires_grad
            and torch.is_grad_enabled()
            and torch._C._current_graph_task_id() == -1  # not in a backward pass
            and (_peek_functorch is None or _peek_functorch() is None)
        )

    def holds_for(self, weight: Tensor, eps: float, dtype: torch.dtype) -> bool:
        """Whether these are still the standardized filters of ``weight``."""
        within_step = in_backward() or (_scope is not None and _scope.token is self.scope)
        if self.used and not within_step:
            return False
        value = self.value
        return (
            self.is_made_of(weight, eps, dtype)
            and (self.steps == _steps or not weight.requires_grad)
            and (value is None or self.value_version == value._version)
        )


class Neighbours:
    """Convolutions of one model that are standardized together."""

    def __init__(self, convs: Iterable[nn.Module]) -> None:
        # Weak, since the convolutions refer to this object.
        self._convs = [weakref.ref(conv) for conv in convs]

    def __iter__(self) -> Any:
        convs = [ref() for ref in self._convs]
        return iter([conv for conv in convs if conv is not None])


def standardize_together(convs: Iterable[nn.Module]) -> None:
    """Makes the weight-standardized convolutions of a model share the work.

    Args:
        convs: in the order of the model. Those that are copied or pickled later work on their own.
    """
    group: List[nn.Module] = []
    groups = [group]
    for conv in convs:
        if isinstance(conv, nn.ConvTranspose2d):  # whose filters are another dimension
            continue
        if sum(c.weight.numel() for c in group) >= _GROUP_SIZE:
            group = []
            groups.append(group)
        group.append(conv)
    for group in groups:
        neighbours = Neighbours(group)
        for conv in group:
            conv.__dict__["_neighbours"] = neighbours


class StandardizeOnce:
    """Context of several forward and backward passes for one step of the optimizer.

    Filters are standardized once, and the gradients of all but the last pass are carried on to the
    weights together. This is of all models of the process: no other thread may train meanwhile.

    Attributes:
        last: to be set when the last of the passes begins.
    """

    def __init__(self) -> None:
        self.token = object()
        self._last = False
        self._collecting: List[Standardized] = []

    @property
    def last(self) -> bool:
        return self._last

    @last.setter
    def last(self, value: bool) -> None:
        if value and not self._last:
            self._hand_on()
        self._last = value

    def __enter__(self) -> "StandardizeOnce":
        global _scope
        if _scope is not None:
            raise RuntimeError("StandardizeOnce cannot be nested")
        _scope = self
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        global _scope
        _scope = None
        if kind is None:
            self._hand_on()
        for record in self._collecting:
            record.used = True
            record.leaf = None
        self._collecting.clear()

    def _hand_on(self) -> None:
        """Carries the collected gradients on to the weights.

        Before the last pass, so that what reduces gradients behind it finds them in ``grad``, also
        those of weights which the last pass does not use. By a backward pass, for the sake of hooks
        of the weights; DistributedDataParallel ignores those outside of its own.
        """
        kinds: Dict[Any, List[Standardized]] = {}
        for record in self._collecting:
            if record.leaf is not None and record.leaf.grad is not None:
                kind = (record.weight.dtype, record.weight.device)
                kinds.setdefault(kind, []).append(record)
        for records in kinds.values():
            with torch.enable_grad():
                values = [r.leaf.detach().to(r.dtype) for r in records]
                outputs = _Connect.apply(records, values, *(r.weight for r in records))
            torch.autograd.backward(outputs, [r.leaf.grad.to(r.dtype) for r in records])
            for record in records:
                record.leaf = None

    def leaf_of(self, record: Standardized, value: Tensor) -> Tensor:
        """The standardized filters as the end of the graph of a pass that is not the last."""
        if record.leaf is None:
            # In the dtype of the weight, so that gradients are not summed in half precision.
            leaf = value.detach().to(record.weight.dtype)
            record.leaf = leaf.requires_grad_()
            self._collecting.append(record)
        return record.leaf


def shared_standardized_weight(conv: nn.Module) -> Tensor:
    """The standardized filters of a convolution, in the dtype in which it computes.

    Args:
        conv: a weight-standardized convolution whose filters are the first dimension of its weight.
    """
    weight = weight_of(conv)
    dtype = compute_dtype(weight)
    record, connected = conv._standardized, conv._connected
    if (
        connected is not None
        and connected[0] is record
        and record.is_at_hand(weight, conv.eps, dtype)
    ):
        conv.__dict__["_in_graph"] = True
        return connected[1]
    if not weight.is_leaf or weight.is_inference() or _is_transformed(weight):
        return standardize_weight(weight, conv.eps)
    made: List[nn.Module] = []
    if record is None or not record.holds_for(weight, conv.eps, dtype):
        made = _standardize(conv, weight, dtype)
        if not made:
            return standardize_weight(weight, conv.eps)
        record = conv._standardized
    value = record.value
    if value is None:
        value = _value_of(record, conv._neighbours)
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return value
    if _scope is not None and not _scope.last:
        return _scope.leaf_of(record, value)
    connected = conv._connected
    if connected is None or connected[0] is not record:
        connected = _connect(conv, record, value, made)
    if not in_backward():
        conv.__dict__["_in_graph"] = True
    return connected[1]


def kept_filters(conv: nn.Module, filters: Tensor) -> Optional["Kept"]:
    """What autograd is to keep in the place of the standardized filters of a convolution.

    It keeps what they are made of, and they are made once more when the backward pass needs them.

    Args:
        conv: a weight-standardized convolution, which is going to be called.
        filters: what :func:`shared_standardized_weight` gave for this call.

    Returns:
        None if it is to keep the filters, or will keep nothing.
    """
    record, connected = conv._standardized, conv._connected
    in_graph = connected is not None and connected[1] is filters
    if (
        record is None
        or not (in_graph or record.value is filters)
        or not (_HOOKS_ARE_KNOWN and conv.training and record.weight.requires_grad)
        or _scope is not None  # several passes share them, for each of which they would be made
    ):
        return None
    if in_backward():  # activation checkpointing repeats a call
        if record.pending:
            _finish_call(conv, record)
        else:
            _keep_for_now(conv)
        return None
    record.pending += 1
    record.calls += 1
    if record.calls == record.expected_calls:
        _drop(conv, record)
    else:
        _keep_for_now(conv)
    if not in_graph or _hooks_of_others():
        return None
    return Kept(conv, record, filters)


class Kept:
    """What a graph keeps of the standardized filters that one call of a convolution used.

    To be the context of that call, or to be asked for them by its backward pass.
    """

    def __init__(self, conv: nn.Module, record: Standardized, filters: Tensor) -> None:
        self._conv = weakref.ref(conv)  # a graph keeps tensors alive, and no modules
        self._neighbours = conv._neighbours
        self._record = record
        self._address, self._shape = filters.data_ptr(), filters.shape
        self._pending = True

    # As a context of the call; :class:`torch.autograd.graph.saved_tensors_hooks` does the same and
    # takes more time.
    def __enter__(self) -> None:
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, self.unpack)

    def __exit__(self, *_: Any) -> None:
        torch._C._autograd._pop_saved_tensors_default_hooks()

    def pack(self, saved: Tensor) -> Any:
        if saved.data_ptr() == self._address and saved.shape == self._shape:
            return self
        return saved, saved._version

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Kept):
            return packed.filters()
        saved, version = packed
        if saved._version != version:  # which autograd does not notice under hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation, the input of a standardized "
                "convolution, has been modified by an inplace operation"
            )
        return saved

    def filters(self) -> Tensor:
        """The filters, for the backward pass of the call."""
        record, conv = self._record, self._conv()
        if len(_unsaved):
            _let_go(conv, self._neighbours)
        value = record.value
        if value is None:
            value = _value_of(record, self._neighbours)
        if record.value_version != value._version:
            raise RuntimeError(
                "the standardized filters of a convolution have been modified by an inplace "
                "operation, between a forward pass and its backward pass"
            )
        if self._pending:  # else the graph was kept, and this is not its first backward pass
            self._pending = False
            _finish_call(conv, record)
        elif not record.pending:
            _drop(conv, record)
        return value


def _finish_call(conv: Optional[nn.Module], record: Standardized) -> None:
    """Notes that the backward pass of a call is there, and drops the filters with the last one."""
    if record.pending > 1:
        record.pending -= 1
    else:
        record.pending = 0
        _drop(conv, record)


def _hooks_of_others() -> bool:
    """Whether something else decides what autograd keeps, such as activation checkpointing."""
    hooks = torch._C._autograd
    if not hooks._saved_tensors_hooks_is_enabled():
        return True
    return hooks._top_saved_tensors_default_hooks(False) is not None


def _keep_for_now(conv: nn.Module) -> None:
    with _unsaved_lock:
        _unsaved.add(conv)


def _let_go(conv: Optional[nn.Module], neighbours: Iterable[nn.Module]) -> None:
    """Drops the standardized filters of all convolutions but one and its neighbours."""
    with _unsaved_lock:
        others = list(_unsaved)
        _unsaved.clear()
    for other in others:
        near = other is conv or (other._neighbours and other._neighbours is neighbours)
        record = other._standardized
        if record is not None and not near:
            _drop(other, record)


def _drop(conv: Optional[nn.Module], record: Standardized) -> None:
    record.value = None
    if conv is not None and conv._connected is not None and conv._connected[0] is record:
        conv.__dict__["_connected"] = None


def _value_of(record: Standardized, neighbours: Iterable[nn.Module]) -> Tensor:
    """The standardized filters, made once more after they have been dropped.

    With them those of neighbours: in a backward pass those that it will need next, and in a forward
    pass, which calls convolutions more often than was expected, all.
    """
    record.check_weight()
    only_pending = in_backward() and record.pending > 0
    records = [record]
    for conv in neighbours:
        other = conv._standardized
        if (
            other is not None
            and other is not record
            and other.value is None
            and (other.pending or not only_pending)
            and other.is_made_of(weight_of(conv), conv.eps, record.dtype)
            and other.weight.dtype == record.weight.dtype
            and other.weight.device == record.weight.device
        ):
            records.append(other)
    with torch.inference_mode(False), torch.no_grad():
        values, _, _ = standardize_all(
            [r.weight for r in records], [r.eps for r in records], record.dtype
        )
    for r, value in zip(records, values):
        r.hold(value)
    return values[0]


def forget_standardized_weight(conv: nn.Module) -> None:
    """Makes the next call standardize anew."""
    record = conv._standardized
    # Neither forward passes alone nor other uses of the filters say anything of the next step.
    if record is not None and record.used and record.calls:
        conv.__dict__["_calls"] = record.calls
    conv.__dict__["_standardized"] = None
    conv.__dict__["_connected"] = None


def _standardize(conv: nn.Module, weight: Tensor, dtype: torch.dtype) -> List[nn.Module]:
    """Standardizes the filters of a convolution and of its neighbours, where they are outdated.

    Returns:
        These convolutions; none if a mode is active in which tensors have no data.
    """
    convs, weights = [conv], [weight]
    requires_grad = weight.requires_grad
    for other in conv._neighbours:
        if other is conv:
            continue
        near, record = weight_of(other), other._standardized
        if (
            # Of GPU kernels all results are in one buffer: those of frozen filters would keep it.
            near.requires_grad == requires_grad
            and _matches(near, weight)
            and (record is None or not record.holds_for(near, other.eps, dtype))
        ):
            convs.append(other)
            weights.append(near)
    with torch.inference_mode(False), torch.no_grad():
        values, mean, rstd = standardize_all(weights, [c.eps for c in convs], dtype)
    if type(values[0]) is not Tensor:
        return []
    ends = list(itertools.accumulate([w.shape[0] for w in weights]))
    statistics = _Statistics(mean, rstd, ends)
    for index, (c, w, value) in enumerate(zip(convs, weights, values)):
        forget_standardized_weight(c)
        c.__dict__["_standardized"] = Standardized(c, w, value, statistics, index)
    return convs


def weight_of(conv: nn.Module) -> Tensor:
    """The weight of a convolution."""
    try:  # as an attribute it takes more time
        return conv._parameters["weight"]
    except KeyError:  # a replica of DataParallel, or FSDP, has a tensor in its place
        return conv.weight


def _connect(
    conv: nn.Module, record: Standardized, value: Tensor, made: List[nn.Module]
) -> Tuple[Standardized, Tensor]:
    """Gives the standardized filters of a convolution a place in the graph.

    Those of its neighbours that the graph of the last pass contained share it. Others must not: a
    backward pass visits every weight behind a node, and DistributedDataParallel would take that of
    a stage under reentrant checkpointing, which has a graph of its own, for done.

    Args:
        made: convolutions that have just been standardized; the filters of others may be outdated.
    """
    convs, records, values = [conv], [record], [value]
    if not in_backward():
        for other in made or conv._neighbours:
            near = other._standardized
            near_value = None if near is None else near.value
            if (
                other is not conv
                and near_value is not None
                and other._in_graph
                and near.weight.requires_grad
                and (other._connected is None or other._connected[0] is not near)
                and (
                    made
                    or _matches(weight_of(other), record.weight)
                    and near.holds_for(weight_of(other), other.eps, record.dtype)
                )
            ):
                other.__dict__["_in_graph"] = False
                convs.append(other)
                records.append(near)
                values.append(near_value)
    outputs = _Connect.apply(records, values, *[r.weight for r in records])
    for c, r, output in zip(convs, records, outputs):
        c.__dict__["_connected"] = (r, output)
    return conv._connected


class _Connect(torch.autograd.Function):
    """From weights to their standardized values, which are there already.

    The graph keeps plain references instead of saved tensors: several forward passes share this
    node, and the backward pass of each may come on its own.
    """

    @staticmethod
    def forward(
        ctx: Any, records: List[Standardized], values: List[Tensor], *weights: Tensor
    ) -> Tuple[Tensor, ...]:
        ctx.records = records
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        outputs: List[Optional[Tensor]] = [None] * len(grads)
        given = [i for i, grad in enumerate(grads) if grad is not None]
        results = _weight_gradients([ctx.records[i] for i in given], [grads[i] for i in given])
        for i, result in zip(given, results):
            outputs[i] = result
        for record in ctx.records:
            record.used = True
        return (None, None, *outputs)


def _weight_gradients(records: List[Standardized], grads: List[Tensor]) -> List[Tensor]:
    for record in records:
        record.check_weight()
    if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
        return [
            torch.autograd.grad(
                standardize_weight(r.weight, r.eps), r.weight, grad.to(r.weight), create_graph=True
            )[0]
            for r, grad in zip(records, grads)
        ]
    if len({grad.dtype for grad in grads}) > 1:
        grads = [grad.to(r.weight.dtype) for r, grad in zip(records, grads)]
    if not records:
        return []
    return standardize_all_backward(grads, [r.weight for r in records], *_statistics_of(records))


def _statistics_of(records: List[Standardized]) -> Tuple[Tensor, Tensor]:
    """Means and reciprocal deviations of all filters, one convolution after the other."""
    statistics = records[0].statistics
    in_order = [r.statistics is statistics and r.index == i for i, r in enumerate(records)]
    if len(records) == len(statistics.ends) and all(in_order):
        return statistics.mean, statistics.rstd
    parts = []
    for r in records:
        end = r.statistics.ends[r.index]
        part = slice(end - r.weight.shape[0], end)
        parts.append((r.statistics.mean[part], r.statistics.rstd[part]))
    mean, rstd = zip(*parts)
    return torch.cat(mean), torch.cat(rstd)


def _matches(a: Tensor, b: Tensor) -> bool:
    """Whether a weight can be standardized with another one, of which that is known."""
    if a.dtype != b.dtype or a.device != b.device or not a.is_leaf or a.is_inference():
        return False
    return _has_data(a)


if hasattr(torch, "get_autocast_dtype"):

    def compute_dtype(weight: Tensor) -> torch.dtype:
        """The dtype in which a convolution with these filters computes."""
        kind = weight.device.type
        if weight.dtype == torch.float64:  # which autocast leaves alone
            return weight.dtype
        if kind not in ("cuda", "cpu") and not torch.amp.is_autocast_available(kind):
            return weight.dtype  # tensors without data
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

else:  # PyTorch 2.0 to 2.3

    def compute_dtype(weight: Tensor) -> torch.dtype:
        """The dtype in which a convolution with these filters computes."""
        kind = weight.device.type
        if weight.dtype == torch.float64:
            return weight.dtype
        if kind == "cuda" and torch.is_autocast_enabled():
            return torch.get_autocast_gpu_dtype()
        if kind == "cpu" and torch.is_autocast_cpu_enabled():
            return torch.get_autocast_cpu_dtype()
        return weight.dtype


def _is_transformed(weight: Tensor) -> bool:
    """Whether a tensor stands for another one, or has a tangent, or torch.func is at work."""
    return _functorch_is_active() or forward_ad._current_level >= 0 or not _has_data(weight)


def _has_data(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
        return True
    except RuntimeError:
        return False


def _functorch_is_active() -> bool:
    return _peek_functorch is not None and _peek_functorch() is not None


_peek_functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
