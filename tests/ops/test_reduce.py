"""Percentiles over several processes, which are found by counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sslfast.ops.reduce import SINGLE_PROCESS, Reducer, exact_percentiles


def test_one_process_gathers_its_own_values() -> None:
    values = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(SINGLE_PROCESS.gather(values), values.detach().unsqueeze(0))
    assert not SINGLE_PROCESS.gather(values).requires_grad


def test_a_second_derivative_of_a_sum_over_processes_raises(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        values = torch.ones(3, requires_grad=True)
        total = Reducer(dist.group.WORLD).sum(values)
        (gradient,) = torch.autograd.grad(total.square().sum(), values, create_graph=True)
        assert torch.equal(gradient, 2 * values)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
    finally:
        dist.destroy_process_group()


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
