"""What batch-channel normalization is called with, apart from the activation."""

from typing import NamedTuple, Optional

from torch import Tensor


class Normalization(NamedTuple):
    """One call of a layer; see :mod:`.batch_channel_norm` for the equations.

    Attributes:
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
        layer: a tensor that belongs to the layer, by which its calls are known when activation
            checkpointing repeats them (:mod:`.recomputation`). None: a repetition needs nothing of
            the call, as calls do not differ in what they normalize by.
    """

    weight: Tensor
    bias: Tensor
    group_weight: Tensor
    group_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float = 1e-5
    use_batch_statistics: bool = False
    update_rate: Optional[float] = None
    skipped_updates: Optional[Tensor] = None
    seen_elements: Optional[Tensor] = None
    synchronize: bool = False
    layer: Optional[Tensor] = None

    @property
    def parameters(self) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
        """``weight, bias, group_weight, group_bias``."""
        return self[:4]
