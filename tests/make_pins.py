"""Writes tests/pins.json: today's values of the loss, for inputs in which rounding to float32 decides nothing."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import torch
from torch import Tensor

from helpers.pins import LABELLED, MAPS, PINS, Computed, Inputs, compute, make_inputs, parse, voxels_with_gradient

TEACHERS = {"recommended": ("", "-teacher"), "paper": ("", "-teacher"), "as-released": ("",)}
CLASSES = (2, 3, 14)
ENTRIES = 4  # pinned of each gradient
THRESHOLD = 0.6  # the loss's default


def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(1)).sum(1)


def is_clear(case: str, inputs: Inputs, computed: Computed) -> bool:
    """No voxel within rounding of a decision; several reliable and unreliable classes, a mask and a contrast."""
    _, _, teacher = parse(case)
    maps = {name: torch.tensor(values) for name, values in inputs.maps.items()}
    for name in ("logits_a", "logits_b", "teacher"):
        first, second = maps[name].topk(2, dim=1).values.unbind(1)
        if (first - second).min() < 5e-4:
            return False
    for name in MAPS[:2]:
        if (maps[name][:LABELLED].softmax(1).amax(1) - THRESHOLD).abs().min() < 1e-5:
            return False
    unlabelled = [maps["teacher"]] * 2 if teacher else [maps[name][LABELLED:] for name in MAPS[:2]]
    thresholds = computed.values["thresholds"]
    for threshold, logits in zip(thresholds, unlabelled):
        if ((entropy(logits) - threshold).abs() / threshold).min() < 1e-5:
            return False
    values = computed.values
    return bool(
        (values["dice"][0] - values["dice"][1]).abs() > 1e-3
        and thresholds.min() > 0.02
        and values["mask_voxels"] > 0
        and values["contrast"] > 0
        and (values["reliable"] > 0).sum() > 1
        and (values["anchors"] > 0).sum() > 1
    )


def entries(gradient: Tensor) -> list[tuple[int, float]]:
    """Some large entries, evenly spread, from labelled and unlabelled volumes where both have any."""
    size = gradient[:LABELLED].numel()
    halves = [(0, gradient[:LABELLED].flatten()), (size, gradient[LABELLED:].flatten())]
    halves = [(start, half) for start, half in halves if half.any()]
    sampled = []
    for start, half in halves:
        large = (half.abs() > 0.2 * half.abs().max()).nonzero().squeeze(1)
        indices = torch.linspace(0, len(large) - 1, ENTRIES // len(halves) + 2)[1:-1].long()
        sampled += [(start + int(i), float(half[i])) for i in large[indices]]
    return sampled


def pin(inputs: Inputs, seed: int, computed: Computed) -> dict[str, Any]:
    gradients: dict[str, dict[str, Any]] = {}
    for name, gradient in computed.gradients.items():
        gradients[name] = {"norm": float(gradient.norm()), "entries": entries(gradient)}
        if name.startswith("features"):
            gradients[name]["voxels"] = voxels_with_gradient(gradient)
    values = {name: value.tolist() for name, value in computed.values.items()}
    return {"seed": seed, "inputs": inputs.digest(), "values": values, "gradients": gradients}


def make_pins(classes: int) -> dict[str, dict[str, Any]]:
    """The cases of so many classes, on the inputs of the first seed that suits them all."""
    cases = [f"{preset}-{classes}{teacher}" for preset, teachers in TEACHERS.items() for teacher in teachers]
    for seed in count():
        inputs, pins = make_inputs(classes, seed), {}
        for case in cases:
            computed = compute(case, inputs, torch.float64, "reference")
            if not is_clear(case, inputs, computed):
                break
            pins[case] = pin(inputs, seed, computed)
        else:
            return pins
    raise AssertionError


def as_text(value: Any, depth: int = 3) -> str:
    """JSON with one line for each dictionary entry up to this depth."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    indent = " " * (4 - depth)
    lines = [f"{indent}{json.dumps(name)}: {as_text(entry, depth - 1)}" for name, entry in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent[1:]}}}"


if __name__ == "__main__":
    pins_by_classes = [make_pins(classes) for classes in CLASSES]
    PINS.write_text(as_text({case: pins for each in pins_by_classes for case, pins in each.items()}) + "\n")
