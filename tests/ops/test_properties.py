"""Ops on any input that hypothesis thinks of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.maps import random_flags
from sslfast.ops import sample_voxels
from sslfast.ops.flags import RELIABLE
from sslfast.ops.philox import voxel_priority
from sslfast.ops.reliability import exact_percentile

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.6931]), min_size=1, max_size=50), st.floats(0, 100, allow_nan=False))
@settings(max_examples=200, deadline=None)
def test_a_percentile_of_equal_values_is_numpys(values: list[float], percentile: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    assert exact_percentile(tensor, percentile).item() == np.percentile(np.array(values), percentile)


@given(
    classes=st.integers(2, 6),
    quota=st.integers(0, 40),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    role=st.sampled_from(["anchors", "negatives"]),
)
@settings(max_examples=40, deadline=None)
def test_a_sample_has_the_smallest_priorities_in_the_order_of_their_indices(
    classes: int, quota: int, seed: int, step: int, role: str
) -> None:
    flags = random_flags(2, classes, (6, 7, 5), reliable=0.5)
    quotas = [quota + c for c in range(classes)]
    indices, counts = sample_voxels(flags, quotas, seed, step, role=role)
    assert indices.shape == (classes, max(quotas))
    for c in range(classes):
        candidates = []
        for v, byte in enumerate(flags.flatten().tolist()):
            reliable, label = bool(byte & RELIABLE), byte & 31
            if (not reliable and label == c) if role == "anchors" else (reliable and label != c):
                candidates.append(v)
        stream = 2 * c + (role == "negatives")
        priority = voxel_priority(torch.tensor(candidates, dtype=torch.int64), seed, step, stream).tolist()
        drawn = sorted(v for _, v in sorted(zip(priority, candidates))[: quotas[c]])
        assert counts[c] == len(drawn)
        assert indices[c].tolist() == drawn + [-1] * (max(quotas) - len(drawn))
