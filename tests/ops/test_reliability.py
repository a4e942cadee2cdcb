"""Entropy percentiles against numpy, and every flag against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslfast.ops import reliability
from sslfast.ops.flags import CLASS, RELIABLE, is_reliable, pseudo_label
from sslfast.ops.reliability import exact_percentile


def random_logits(volumes: int = 2, classes: int = 3, size: tuple[int, ...] = (4, 5, 3)) -> Tensor:
    return 2 * torch.randn(volumes, classes, *size, dtype=torch.float64)


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy()


@pytest.mark.parametrize("size", [1, 2, 3, 31, 1000, 65537])
@pytest.mark.parametrize("percentile", [0, 0.1, 20, 50, 83.7, 99.9, 100])
def test_percentile_equals_numpy(size: int, percentile: float) -> None:
    values = torch.rand(size, dtype=torch.float64)
    assert exact_percentile(values, percentile).item() == np.percentile(values.numpy(), percentile)
    single = values.float()
    expected = np.float32(np.percentile(single.double().numpy(), percentile))
    assert exact_percentile(single, percentile).item() == expected


def test_percentile_beyond_2_to_the_24() -> None:
    values = torch.rand(2**24 + 12345)
    for percentile in (20.0, 99.999):
        expected = np.float32(np.percentile(values.double().numpy(), percentile))
        assert exact_percentile(values, percentile).item() == expected


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.6931]), min_size=1, max_size=50), st.floats(0, 100, allow_nan=False))
@settings(max_examples=200, deadline=None)
def test_percentile_of_ties_equals_numpy(values: list[float], percentile: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    assert exact_percentile(tensor, percentile).item() == np.percentile(np.array(values), percentile)


def test_percentile_of_nothing_and_of_nan() -> None:
    assert exact_percentile(torch.empty(0), 20).item() == 0
    assert exact_percentile(torch.tensor([0.1, float("nan"), 0.3]), 20).isnan()


@pytest.mark.parametrize("classes", [2, 4, 32])
def test_every_flag(classes: int) -> None:
    logits = random_logits(classes=classes)
    threshold, flags = reliability(logits, 60)
    entropies = entropy(logits)
    assert threshold.item() == pytest.approx(np.percentile(entropies.numpy(), 60), rel=1e-12)
    assert flags.dtype == torch.uint8
    assert torch.equal(pseudo_label(flags), logits.argmax(1))
    assert torch.equal(is_reliable(flags), entropies < threshold)
    assert not (flags & ~(CLASS | RELIABLE)).any()


def test_ties_go_to_the_lowest_class_and_equal_entropies_are_unreliable() -> None:
    threshold, flags = reliability(torch.zeros(1, 4, 3, 3, 3), 50)
    assert threshold.item() == pytest.approx(np.log(4))
    assert not flags.any()


def test_no_unlabelled_volume() -> None:
    threshold, flags = reliability(torch.zeros(0, 2, 4, 4, 4), 50)
    assert threshold.item() == 0
    assert flags.shape == (0, 4, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_logits_show_in_the_threshold(bad: float, dtype: torch.dtype) -> None:
    logits = random_logits().to(dtype)
    logits[0, 1, 0, 0, 0] = bad
    assert reliability(logits, 50).threshold.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_keep_their_entropy(dtype: torch.dtype) -> None:
    for sign in (1, -1):
        threshold, _ = reliability(sign * torch.full((1, 2, 2, 2, 2), 1e4).to(dtype), 50)
        assert threshold.item() == pytest.approx(np.log(2), rel=1e-6)
        assert threshold.dtype == torch.float32


def test_layouts_give_the_same_bytes() -> None:
    logits = random_logits(size=(6, 4, 5))
    _, expected = reliability(logits, 70)
    for other in (logits.to(memory_format=torch.channels_last_3d), logits.movedim(2, 4).contiguous().movedim(4, 2)):
        assert torch.equal(reliability(other, 70).flags, expected)


def test_no_gradient_flows() -> None:
    threshold, _ = reliability(random_logits().requires_grad_(), 50)
    assert not threshold.requires_grad


def test_refusals_name_the_argument() -> None:
    with pytest.raises(ValueError, match="percentile is 101"):
        reliability(random_logits(), 101)
    with pytest.raises(ValueError, match="logits has 1 classes"):
        reliability(random_logits(classes=1), 50)
    with pytest.raises(TypeError, match="logits has dtype"):
        reliability(random_logits().long(), 50)
