"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for its next allocation.

    By default, glibc returns each block of more than 32 MB to the system when it is freed, and the system clears its
    pages when they are next used: a tenth of a training step on a CPU, whose activations are that large. Where the C
    library is another one, this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
