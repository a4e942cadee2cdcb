"""Entropy percentiles against numpy, and every bit of the byte map against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslfast.ops import reliability
from sslfast.ops.reliability import exact_percentile
from sslfast.ops.state import CLASS, RELIABLE, SURE_A, SURE_B


def random_pair(volumes: int = 2, classes: int = 3, size: tuple[int, ...] = (4, 5, 3)) -> tuple[Tensor, Tensor]:
    a, b = (2 * torch.randn(volumes, classes, *size, dtype=torch.float64) for _ in range(2))
    return a, b


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


@pytest.mark.parametrize("mode", ["winner", "union", "both"])
@pytest.mark.parametrize("winner", [0, 1])
@pytest.mark.parametrize("classes", [2, 4, 32])
def test_every_bit(mode: str, winner: int, classes: int) -> None:
    a, b = random_pair(classes=classes)
    thresholds, state = reliability(a, b, 60, mode=mode, winner=torch.tensor(winner))
    entropies = [entropy(logits) for logits in (a, b)]
    expected = [np.percentile(h.numpy(), 60) for h in entropies]
    assert thresholds.tolist() == pytest.approx(expected, rel=1e-12)
    below = [h < t for h, t in zip(entropies, thresholds)]
    reliable = {"winner": below[winner], "union": below[0] | below[1], "both": below[0] & below[1]}[mode]
    label = (a, b)[winner].argmax(1)
    assert state.dtype == torch.uint8
    assert torch.equal((state & CLASS).long(), label)
    assert torch.equal((state & RELIABLE) > 0, reliable)
    assert torch.equal((state & SURE_A) > 0, below[0])
    assert torch.equal((state & SURE_B) > 0, below[1])


def test_labels_of_the_options() -> None:
    a, b = random_pair()
    _, union = reliability(a, b, 50, winner=0, label="union")
    assert torch.equal((union & CLASS).long(), torch.maximum(a.argmax(1), b.argmax(1)))
    _, loser = reliability(a, b, 50, winner=0, anchor_label="loser")
    reliable = (loser & RELIABLE) > 0
    assert torch.equal((loser & CLASS).long(), torch.where(reliable, a.argmax(1), b.argmax(1)))


def test_a_percentile_for_each_class() -> None:
    a, b = random_pair(classes=3, size=(8, 8, 8))
    thresholds, state = reliability(a, b, 30, winner=1, per_class=True)
    assert thresholds.shape == (2, 3)
    h, predicted = entropy(b), b.argmax(1)
    for c in range(3):
        assert thresholds[1, c].item() == pytest.approx(np.percentile(h[predicted == c].numpy(), 30), rel=1e-12)
    below = thresholds[1][predicted] - h
    clear = below.abs() > 1e-12  # a voxel may lie on its threshold, but for the rounding of the entropy computed here
    assert torch.equal(((state & RELIABLE) > 0)[clear], (below > 0)[clear])
    assert (~clear).sum() <= 3


def test_ties_go_to_the_lowest_class_and_equal_entropies_are_unreliable() -> None:
    flat = torch.zeros(1, 4, 3, 3, 3)
    thresholds, state = reliability(flat, flat, 50, winner=0)
    assert thresholds.tolist() == pytest.approx([np.log(4)] * 2)
    assert not state.any()


def test_no_unlabelled_volume() -> None:
    empty = torch.zeros(0, 2, 4, 4, 4)
    thresholds, state = reliability(empty, empty, 50, winner=0)
    assert thresholds.tolist() == [0, 0]
    assert state.shape == (0, 4, 4, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_logits_show_in_the_threshold(bad: float) -> None:
    a, b = random_pair()
    a[0, 1, 0, 0, 0] = bad
    thresholds, _ = reliability(a, b, 50, winner=0)
    assert thresholds.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_keep_their_entropy(dtype: torch.dtype) -> None:
    logits = torch.full((1, 2, 2, 2, 2), 1e4).to(dtype)
    thresholds, _ = reliability(logits, -logits, 50, winner=0)
    assert thresholds.tolist() == pytest.approx([np.log(2)] * 2, rel=1e-6)
    assert thresholds.dtype == torch.float32


def test_layouts_give_the_same_bytes() -> None:
    a, b = random_pair(size=(6, 4, 5))
    _, expected = reliability(a, b, 70, winner=1)
    _, other = reliability(
        a.to(memory_format=torch.channels_last_3d), b.movedim(2, 4).contiguous().movedim(4, 2), 70, winner=1
    )
    assert torch.equal(expected, other)


def test_refusals_name_the_argument() -> None:
    a, b = random_pair()
    with pytest.raises(ValueError, match="percentile is 101"):
        reliability(a, b, 101, winner=0)
    with pytest.raises(ValueError, match="mode is 'best'"):
        reliability(a, b, 50, winner=0, mode="best")
    with pytest.raises(ValueError, match="logits_b has shape"):
        reliability(a, b[:, :2], 50, winner=0)
