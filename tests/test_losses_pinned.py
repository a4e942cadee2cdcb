"""The loss against pinned values: every term, the gradients and the voxel sample, in float64 and in float32.

`python tests/make_pins.py` writes the pins; do so only if the loss is meant to change.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helpers.options import TARGET, on_every_backend
from helpers.pins import PINS, compute, make_inputs, parse, voxels_with_gradient

CASES: dict[str, dict[str, Any]] = json.loads(PINS.read_text()) if PINS.exists() else {}


@pytest.mark.parametrize("case", CASES)
def test_the_references_values_and_gradients_in_float64_are_those_pinned(case: str) -> None:
    assert_pinned(case, torch.float64, "reference", "cpu")


@on_every_backend
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_values_and_gradients_in_float32_are_those_pinned(case: str) -> None:
    assert_pinned(case, torch.float32, TARGET.backend, TARGET.device)


def assert_pinned(case: str, dtype: torch.dtype, backend: str, device: str) -> None:
    pins = CASES[case]
    inputs = make_inputs(parse(case)[1], pins["seed"])
    assert inputs.digest() == pins["inputs"], "the inputs are not those of the pins"
    exact = dtype == torch.float64
    computed = compute(case, inputs, dtype, backend, device)

    assert computed.values.keys() >= pins["values"].keys()
    for name, expected in pins["values"].items():
        value = computed.values[name]
        if not value.is_floating_point():
            assert value.tolist() == expected, name
            continue
        pinned = torch.tensor(expected, dtype=torch.float64)
        in_float64 = exact and name != "kept_fraction"  # a ratio of two integers, float32 for every dtype
        rtol, atol = (1e-9, 1e-13) if in_float64 else (1e-6, 1e-7)  # Dice is 1 minus a ratio
        assert torch.allclose(value.double(), pinned, rtol=rtol, atol=atol), (name, value.tolist(), expected)

    for name, gradient in computed.gradients.items():
        pinned_gradient = pins["gradients"][name]
        norm = pinned_gradient["norm"]
        assert float(gradient.double().norm()) == pytest.approx(norm, rel=1e-9 if exact else 1e-6, abs=0), name
        rtol, atol = (1e-9, 1e-13) if exact else (1e-5, 1e-8 * norm)
        for index, expected in pinned_gradient["entries"]:
            assert float(gradient.flatten()[index]) == pytest.approx(expected, rel=rtol, abs=atol), (name, index)
        if "voxels" in pinned_gradient:
            assert voxels_with_gradient(gradient) == pinned_gradient["voxels"], name
