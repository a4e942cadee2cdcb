"""The loss of a whole step against the reference, at any shape and option that hypothesis thinks of."""

from __future__ import annotations

import pytest
import torch

from helpers.loss_step import PRESETS, TERMS, gradients_of, step_inputs, whole_step
from helpers.maps import random_map
from helpers.options import TARGET, not_on, on_every_backend
from sslfast.ops.backend import backend

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies


@on_every_backend
@not_on("triton-interpreted")
@settings(
    max_examples=8 if TARGET.name == "triton" else 60,  # Triton compiles its kernels for each number of classes
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@given(
    classes=st.integers(2, 6),
    size=st.lists(st.integers(1, 19), min_size=1, max_size=3),
    unlabelled=st.integers(0, 3),
    width=st.integers(2, 20),  # unit vectors of one feature cancel exactly or by rounding: no direction to compare
    percentile=st.floats(0, 100),
    preset=st.sampled_from(PRESETS),
    with_teacher=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients_are_the_references(
    classes: int,
    size: list[int],
    unlabelled: int,
    width: int,
    percentile: float,
    preset: str,
    with_teacher: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    maps, labels = step_inputs(classes, tuple(size), unlabelled=unlabelled, width=width)
    maps[2:] = [m + m.sign() for m in maps[2:]]  # a direction's gradient is rounded by 1 / |f|
    teacher = random_map(unlabelled, classes, tuple(size)) if with_teacher else None
    compute = whole_step(labels, teacher=teacher, preset=preset, percentile=percentile, seed=seed)
    ours = gradients_of(compute, maps)
    with backend("reference"):
        plain = gradients_of(compute, maps)
    reliable, kept = (TERMS.index(name) + 1 for name in ("reliable", "kept_fraction"))
    apart = float((ours[reliable] - plain[reliable]).abs().sum())
    apart += 2 * maps[0][len(labels) :, 0].numel() * abs(float(ours[kept]) - float(plain[kept]))
    assert apart < 5, "voxels"
    if apart > 0.5:
        return  # an entropy at the very threshold, rounded to its other side; exactness has its own tests
    for i, (mine, other) in enumerate(zip(ours, plain)):
        scale = float(other.abs().max()) if other.numel() else 0.0
        rounding = 1e-6 if i <= len(TERMS) else 1e-7  # of losses and entropies, of gradients
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=1e-5 * scale + rounding)
