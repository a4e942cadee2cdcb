"""Sums and percentiles over the processes of a data-parallel run, exactly as if one process had the whole batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Reducer(NamedTuple):
    """Process group over which sums are all-reduced. Every rank must call every method, whatever its batch holds.

    A loss computed from such sums is the same on every rank. Its gradient is that of the sum of all ranks' losses,
    `size` times that of the loss. The mean over ranks in DistributedDataParallel then gives the gradient of the loss.
    """

    group: dist.ProcessGroup | None = None  # None: only this process

    def __deepcopy__(self, memo: object) -> Reducer:
        """Itself: the copy of a network has the same process group, which cannot be copied."""
        return self

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on every rank; the gradient is summed over them too."""
        return values if self.group is None else _Sum.apply(values, self.group)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all ranks [size, ...], without gradient."""
        if self.group is None:
            return values.detach().unsqueeze(0)
        gathered = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, values.detach().contiguous(), group=self.group)
        return torch.stack(gathered)


SINGLE_PROCESS = Reducer()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


DIGIT = 16  # bits per histogram


def exact_percentiles(values: Tensor, percentile: Tensor, reducer: Reducer) -> Tensor:
    """`numpy.percentile` with linear interpolation over the values of all ranks, by all-reduced histograms of bits.

    Args:
        values: [V] float32 or float64, each NaN or at least 0.
        percentile: [] float64, 0..100.

    Returns:
        [] of the dtype of `values`: NaN if any value is or the percentile is out of range, 0 if there are no values.
    """
    integer, width = (torch.int32, 31) if values.dtype == torch.float32 else (torch.int64, 63)
    bits = values.contiguous().view(integer).long() & 2**width - 1  # [V], in the same order as the values

    def count(member: Tensor, key: Tensor, bins: int) -> Tensor:
        """The number of members with each key over all ranks, [bins]."""
        histogram = torch.zeros(bins, dtype=torch.int64, device=values.device)
        histogram.scatter_add_(0, torch.where(member, key, 0), member.long())
        return reducer.sum(histogram)

    everything, nothing = torch.ones_like(bits, dtype=torch.bool), torch.zeros_like(bits)
    total, nan = count(everything, nothing, 1), count(values.isnan(), nothing, 1)  # [1]
    position = percentile / 100 * (total - 1).clamp_min(0).double()
    low = position.floor().long()
    statistics = []
    for wanted in (low, torch.minimum(low + 1, (total - 1).clamp_min(0))):
        prefix, rest, member = torch.zeros_like(wanted), wanted, everything
        for shift in range((width // DIGIT) * DIGIT, -1, -DIGIT):
            counts = count(member, bits >> shift & 2**DIGIT - 1, 2**DIGIT)
            upto = counts.cumsum(0)
            digit = torch.searchsorted(upto, rest, right=True).clamp_max(2**DIGIT - 1)
            rest = rest - (upto[digit] - counts[digit])
            prefix = prefix << DIGIT | digit
            member = bits >> shift == prefix
        statistics.append(prefix.to(integer).view(values.dtype).double())
    below, above = statistics
    fraction = position - low
    step = above - below
    value = torch.where(fraction < 0.5, below + step * fraction, above - step * (1 - fraction))
    spoiled = (nan > 0) | ~((percentile >= 0) & (percentile <= 100))
    value = torch.where(total == 0, 0, torch.where(spoiled, torch.nan, torch.where(fraction > 0, value, below)))
    return value.to(values.dtype).squeeze(0)
