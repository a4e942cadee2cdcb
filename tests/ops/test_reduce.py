"""Percentiles over several processes, which are found by counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslfast.ops.reduce import SINGLE_PROCESS, exact_percentiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("percentile", [0, 12.5, 50, 99.9, 100])
def test_percentiles_by_counting_are_numpys(dtype: torch.dtype, percentile: float) -> None:
    values, wanted = torch.rand(1001, dtype=dtype), torch.tensor(percentile, dtype=torch.float64)
    values[::7] = values[3]  # ties
    expected = torch.tensor(np.percentile(values.double().numpy(), percentile)).to(dtype)
    assert exact_percentiles(values, wanted, SINGLE_PROCESS) == expected
    assert exact_percentiles(values[:0], wanted, SINGLE_PROCESS) == 0
    values[5] = torch.nan
    assert exact_percentiles(values, wanted, SINGLE_PROCESS).isnan()
