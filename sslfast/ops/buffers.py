"""Memory for gradients, in the layout of their maps; and what becomes of memory on the CPU that is freed."""

from __future__ import annotations

import ctypes
import platform
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


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for its next allocations.

    By default, glibc returns blocks of more than 32 MB to the system when they are freed, and the system clears their
    pages when they are next used: a seventh of a training step with batch norm, whose activations are that large. The
    process then holds up to a half more than its tensors need at most, for the blocks do not fit one another exactly.
    Where the C library is another one, this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, most = ctypes.CDLL(None), 2**31 - 1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, most)
        reuse_blocks(0)


def reuse_blocks(kept: int) -> None:
    """Sets how many large blocks of gradients this module keeps for its next ones; 0 where the C library keeps them."""
    _blocks.kept = kept
    with _blocks.lock:
        del _blocks.blocks[kept:]


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


class _Blocks:
    """Keeps the last few large blocks of CPU memory, and reuses them once no tensor refers to them.

    torch returns such blocks to the system and allocates new ones at every step. Touching 256 MB of new memory takes
    100 ms, ten times as long as the kernel that writes it.
    """

    LEAST = 2**20  # bytes; the system's allocator reuses smaller blocks itself

    def __init__(self, kept: int) -> None:
        self.kept = kept  # number of blocks
        self.blocks: list[np.ndarray] = []
        self.lock = threading.Lock()
        self.unused = _references([np.empty(1, np.uint8)], 0)

    def take(self, size: int) -> Tensor:
        """Uninitialised bytes."""
        if size < self.LEAST or not self.kept:
            return torch.empty(size, dtype=torch.uint8)
        with self.lock:
            for i in range(len(self.blocks)):
                if self.blocks[i].nbytes == size and _references(self.blocks, i) == self.unused:
                    block = self.blocks.pop(i)
                    break
            else:
                block = np.empty(size, np.uint8)
            self.blocks = [block, *self.blocks[: self.kept - 1]]
            return torch.from_numpy(block)  # refers to the block for as long as a tensor uses its memory


def _references(blocks: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(blocks[i])


_blocks = _Blocks(6)


def _is_channels_last(values: Tensor) -> bool:
    return values.stride(1) == 1 and values.shape[1] > 1 and values.movedim(1, -1).is_contiguous()
