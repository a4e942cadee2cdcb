"""Whether CUDA's compiler is there."""

from __future__ import annotations

import pytest

from sslfast.kernel_library import BuildError, find_nvcc


def has_nvcc() -> bool:
    try:
        find_nvcc()
    except BuildError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
