"""Memory for gradients, in the layout of their maps; large blocks are reused on the CPU."""

from __future__ import annotations

import sys
import threading

import numpy as np
import torch
from torch import Tensor


def empty_like(values: Tensor) -> Tensor:
    """Uninitialised gradient of a voxel map [N, channels, *spatial]: channels last if the map is, else contiguous."""
    order = [0, *range(2, values.ndim), 1] if _is_channels_last(values) else list(range(values.ndim))
    shape = [values.shape[i] for i in order]
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        flat = _blocks.take(values.numel() * values.element_size()).view(values.dtype).view(shape)
    else:
        flat = torch.empty(shape, dtype=values.dtype, device=values.device)
    return flat.permute([order.index(i) for i in range(values.ndim)])


def zeros_like(values: Tensor) -> Tensor:
    """`empty_like`, filled with zeros."""
    return empty_like(values).zero_()


class _Blocks:
    """Keeps the last few large blocks of CPU memory, and reuses them once no tensor refers to them.

    torch returns such blocks to the system and allocates new ones at every step. Touching 256 MB of new memory takes
    100 ms, ten times as long as the kernel that writes it.
    """

    LEAST = 2**20  # bytes; the system's allocator reuses smaller blocks itself
    KEPT = 6

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.lock = threading.Lock()
        self.unused = _references([np.empty(1, np.uint8)], 0)

    def take(self, size: int) -> Tensor:
        """Uninitialised bytes."""
        if size < self.LEAST:
            return torch.empty(size, dtype=torch.uint8)
        with self.lock:
            for i in range(len(self.blocks)):
                if self.blocks[i].nbytes == size and _references(self.blocks, i) == self.unused:
                    block = self.blocks.pop(i)
                    break
            else:
                block = np.empty(size, np.uint8)
            self.blocks = [block, *self.blocks[: self.KEPT - 1]]
            return torch.from_numpy(block)  # refers to the block for as long as a tensor uses its memory


def _references(blocks: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(blocks[i])


_blocks = _Blocks()


def _is_channels_last(values: Tensor) -> bool:
    return values.stride(1) == 1 and values.shape[1] > 1 and values.movedim(1, -1).is_contiguous()
