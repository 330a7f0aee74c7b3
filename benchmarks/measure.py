"""Time, memory and bandwidth.

Contenders are measured in one process and take turns, so that a machine that gets slower or faster
meanwhile does so for all of them.
"""

import ctypes
import random
import statistics
import sys
import time
import weakref
from collections import Counter
from typing import (
    Any,
    Callable,
    Dict,
    Hashable,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)
# What one run of a contender took: milliseconds of each of its phases.
Times = Dict[str, float]

# More than the second-level cache of any GPU.
_FLUSHED_BYTES = 256 * 2**20
# Clock cycles, about 1 ms, in which the host gets ahead of the GPU.
_HEAD_START = 2_000_000
# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def spread(values: Sequence[float]) -> Dict[str, float]:
    """Median and quartiles, linearly interpolated: ``{"median": , "q1": , "q3": }``."""
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def interleaved(
    contenders: Mapping[Name, Callable[[], Times]],
    repetitions: int,
    warmup: int = 3,
    on_run: Optional[Callable[[], Any]] = None,
) -> Dict[Name, Dict[str, List[float]]]:
    """Runs every contender once per round, in an order that is shuffled (with a fixed seed) anew
    for each round, since what runs before leaves its traces in caches and allocators.

    Args:
        contenders: by name, what to run; it returns the time of each of its phases.
        repetitions: number of rounds.
        warmup: number of rounds before those, whose times are dropped.
        on_run: called after every run, for a progress bar.

    Returns:
        For each contender and phase the times, one a round.
    """
    times: Dict[Name, Dict[str, List[float]]] = {name: {} for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for index in range(-warmup, repetitions):
        shuffle(order)
        for name in order:
            for phase, value in contenders[name]().items():
                if index >= 0:
                    times[name].setdefault(phase, []).append(value)
            if on_run is not None:
                on_run()
    return times


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, with the allocator of glibc.

    By default, large tensors go back to the system and come again page by page, or not, by chance:
    0 to 8,400 page faults in a run of one layer, which take more than half of the time of a stem.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


def wall_time(function: Callable[[], T], device: torch.device) -> Tuple[T, float]:
    """Runs ``function`` and returns its result and the milliseconds until the device is done."""
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


class KernelClock:
    """Measures what the device itself needs for a few operations, their data not in its cache.

    On a GPU the second-level cache is flushed, and the GPU is kept busy until the host has issued
    the operations, as it is in the middle of a network: the time is that between two CUDA events.
    On a CPU it is the time of the call.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the operations run.
        """
        self._device = device
        self._scratch: Optional[Tensor] = None
        if device.type == "cuda":
            self._scratch = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], T]) -> Tuple[T, float, float]:
        """
        Returns:
            The result of ``function``, the milliseconds of the device, and those of the host to
            issue the operations (on a CPU they are the same).
        """
        if self._scratch is None:
            result, elapsed = wall_time(function, self._device)
            return result, elapsed, elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        self._scratch.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        start = time.perf_counter()
        result = function()
        host = (time.perf_counter() - start) * 1e3
        end.record()
        torch.cuda.synchronize(self._device)
        return result, begin.elapsed_time(end), host


def copy_bandwidth(device: torch.device, mebibytes: int = 512, repetitions: int = 20) -> float:
    """Bytes per second, read and written, of copying one tensor onto another of the same size.

    Args:
        device: where the tensors are.
        mebibytes: size of each; should be far more than the caches hold.
        repetitions: the median of so many copies is taken.
    """
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.zeros_like(source)
    clock = KernelClock(device)
    times = [clock(lambda: target.copy_(source))[1] for _ in range(repetitions + 2)]
    return 2 * mebibytes * 2**20 / (statistics.median(times[2:]) * 1e-3)


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of ``forward``.

    Every storage counts once, however many tensors share it, and in full.

    Args:
        forward: computes something with gradients.
        parameters: tensors whose storages do not count, since they are there anyway.
    """
    storages: Dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: one that is an output would keep itself alive.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept until the end, so that no address is used twice
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations create inside this context.

    For CPU, where PyTorch keeps no such statistics. What a kernel allocates for itself is not seen.

    Attributes:
        current: bytes of the tensors that exist now.
        peak: the most there have been at once.
    """

    def __init__(self, skip_convolutions: bool = False) -> None:
        """
        Args:
            skip_convolutions: let them and their gradients be zeros, made in no time, since sizes
                do not depend on values.
        """
        super().__init__()
        self.current = self.peak = 0
        self._skipped = _CONVOLUTIONS if skip_convolutions else ()
        # By storage, its bytes and what has made it.
        self._live: Dict[int, Tuple[int, str]] = {}
        self._at_peak: List[Tuple[int, str]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Tuple[Any, ...] = (),
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._skipped:
            args_on_meta, kwargs_on_meta = tree_map_only(
                Tensor, lambda t: t.to("meta"), (args, kwargs)
            )
            result = func(*args_on_meta, **kwargs_on_meta)
            result = tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), result)
        else:
            result = func(*args, **kwargs)
        # An output may share the memory of an input, which is either known or from before.
        old = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in old and storage._cdata not in self._live:
                what = f"{func} {'x'.join(map(str, tensor.shape))}"
                self._live[storage._cdata] = (storage.nbytes(), what)
                self.current += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        if self.current > self.peak:
            self.peak, self._at_peak = self.current, list(self._live.values())
        return result

    def at_peak(self, most: int = 12) -> Dict[str, int]:
        """Bytes of what there was at the peak, by operation and shape: the largest."""
        sizes: Counter[str] = Counter()
        for size, what in self._at_peak:
            sizes[what] += size
        return dict(sizes.most_common(most))

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key)[0]


def _tensors(tree: Any) -> List[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
