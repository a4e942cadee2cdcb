"""Philox4x32-10, the counter-based generator of the voxel sample: random bits are a function of (key, counter) alone.

Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast, each word in 0..2^32-1, least significant first.
        seed: the 64-bit key.

    Returns:
        Four int64 tensors, each in 0..2^32-1.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = seed & LOW, seed >> 32 & LOW
    for _ in range(ROUNDS):
        # The 64-bit product of two 32-bit words wraps in int64, with the bits of the unsigned product.
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> 32 & LOW) ^ x1 ^ key0,
            product1 & LOW,
            (product0 >> 32 & LOW) ^ x3 ^ key1,
            product0 & LOW,
        )
        key0, key1 = key0 + KEY_STEPS[0] & LOW, key1 + KEY_STEPS[1] & LOW
    return x0, x1, x2, x3


def voxel_priority(index: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
    """The 32-bit priorities int64 [M] of voxels in the draw (seed, step, stream); index: linear indices int64 [M]."""
    word = torch.full_like(index, 0)
    return philox((index & LOW, index >> 32 & LOW, word + (step & LOW), word + (stream & LOW)), seed)[0]
