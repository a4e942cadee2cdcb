"""What the contrastive loss compares: sampled voxels and prototypes of the loser's features."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast.ops.class_prototypes import class_prototypes
from sslfast.ops.reduce import Reducer
from sslfast.ops.sample_voxels import gather_over_ranks, gather_voxels, sample_voxels


class Rows(NamedTuple):
    """What `voxel_infonce` compares. Only the anchors have a gradient."""

    anchors: Tensor  # [C, A, K] features of the loser, of this process
    anchor_counts: Tensor  # [C]
    prototypes: Tensor  # [C, K] sums, of all processes, as are the fields below
    negatives: Tensor  # [C, Q, K]
    negative_counts: Tensor  # [C]


class Loser(NamedTuple):
    """The loser's features: `other` if `second` is not 0, else `features`; both None if the host knows the loser."""

    features: Tensor  # [U, K, *spatial]
    other: Tensor | None
    second: Tensor | None  # []

    @classmethod
    def of(cls, winner: Tensor, a: Tensor, b: Tensor) -> Loser:
        """From the features of networks a and b, and 0 if a is the winner, else 1."""
        if is_known(winner):
            return cls(a if winner else b, None, None)
        return cls(b, a, winner)

    def gather(self, indices: Tensor) -> Tensor:
        """See `gather_voxels`."""
        rows = gather_voxels(self.features, indices)
        if self.other is None or self.second is None:
            return rows
        return torch.where(self.second != 0, gather_voxels(self.other, indices), rows)

    def draw(
        self,
        flags: Tensor,
        num_classes: int,
        anchors: int,
        negatives: int,
        seed: int,
        step: int | Tensor,
        reducer: Reducer,
    ) -> tuple[Rows, Tensor, Tensor]:
        """The rows of a step, the number of reliable voxels [C] of all processes, and the anchors' voxels [C, A]."""
        prototypes, reliable = class_prototypes(
            self.features, flags, num_classes, other=self.other, second=self.second, reducer=reducer
        )
        drawn = functools.partial(sample_voxels, flags, seed=seed, step=step, reducer=reducer)
        indices, anchor_counts = drawn([anchors] * num_classes, role="anchors")
        sample = drawn([negatives] * num_classes, role="negatives")
        with torch.no_grad():
            keys = gather_over_ranks(self.gather(sample.indices), sample.counts, reducer)
        return Rows(self.gather(indices), anchor_counts, prototypes, *keys), reliable, indices


def is_known(value: Tensor) -> bool:
    """True if the host can read the value without synchronisation or a graph break."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()
