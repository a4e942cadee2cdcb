"""The loss as its authors released it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.maps import DTYPES
from helpers.methods import SIZE
from sslfast.methods.as_released import as_released_loss


@pytest.mark.parametrize("gap", [3, 30, 200, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_finite_and_unlabelled_voxels_give_no_gradient(dtype: torch.dtype, gap: float) -> None:
    logits = [(gap * nn.functional.one_hot(torch.randint(0, 3, (4, *SIZE)), 3)).movedim(-1, 1) for _ in range(2)]
    maps = [z + torch.rand(4, 3, *SIZE) for z in logits] + [torch.randn(4, 5, *SIZE) for _ in range(2)]
    leaves = [m.to(dtype).requires_grad_() for m in maps]
    result = as_released_loss(*leaves, torch.randint(-1, 3, (2, *SIZE)), 10, ramp_steps=10)
    assert result.loss.isfinite()
    assert all(value.isfinite().all() and not value.requires_grad for value in result.terms.values())
    result.loss.backward()
    for leaf in leaves[:2]:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:2].any()
        assert not leaf.grad[2:].any()
    assert all(leaf.grad is None for leaf in leaves[2:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("volume", [0, 3])
def test_nan_and_infinite_logits_make_the_loss_nan(bad: float, volume: int) -> None:
    maps = [torch.randn(4, channels, *SIZE) for channels in (3, 3, 5, 5)]
    maps[0][volume, 1, 2, 3, 4] = bad
    assert as_released_loss(*maps, torch.randint(0, 3, (2, *SIZE)), 10, ramp_steps=10).loss_a.isnan()


def test_an_argument_of_the_wrong_kind_is_named() -> None:
    maps = [torch.randn(4, channels, *SIZE) for channels in (3, 3, 5, 5)]
    with pytest.raises(TypeError, match=r"^features_b is None; it must be a torch\.Tensor$"):
        as_released_loss(*maps[:3], None, torch.randint(0, 3, (2, *SIZE)), 10)
    with pytest.raises(TypeError, match=r"^step is 1\.5; it must be a whole number"):
        as_released_loss(*maps, torch.randint(0, 3, (2, *SIZE)), 1.5)
