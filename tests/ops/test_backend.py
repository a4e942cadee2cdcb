"""Which backend computes: one that is asked for by name computes, or says why it cannot."""

from __future__ import annotations

import pytest
import torch

from helpers.maps import random_map
from helpers.options import on_every_backend, only_on
from sslfast.ops import dual_supervised
from sslfast.ops.backend import backend, unavailable

pytestmark = [on_every_backend, only_on("cpu")]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'gpu'; it must be auto or one of"), backend("gpu"):
        pass
    with pytest.raises(ValueError, match="backend is 'gpu'; it must be one of"):
        unavailable("gpu")


def test_a_backend_that_cannot_run_here_says_why() -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot run here"), backend("triton"):
        pass


def test_float64_is_refused_by_kernels_and_computed_by_the_reference() -> None:
    a = random_map(1, 2, (3, 3, 3)).double()
    labels = torch.zeros(1, 3, 3, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="float32, bfloat16 and float16"), backend("cpu"):
        dual_supervised(a, a, labels)
    with backend("auto"):
        assert dual_supervised(a, a, labels).ce.dtype == torch.float64
