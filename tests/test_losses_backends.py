"""The loss of a whole step, on each backend: the reference's values and gradients, finite, repeatable, compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers.compare import ROUNDING, SMALLEST, with_gradients, with_threads
from helpers.loss_step import PRESETS, gradients_of, step_inputs, whole_step
from helpers.maps import DTYPES, random_map
from helpers.options import kernels_and_reference, not_on, on_every_backend, only_on, some
from helpers.processes import run_python
from sslfast.ops import masked_consistency
from sslfast.ops.backend import backend

pytestmark = on_every_backend
with_and_without_teacher = pytest.mark.parametrize("with_teacher", [False, True], ids=["no teacher", "teacher"])
percentile_of_the_preset_or_ramp = pytest.mark.parametrize(
    "percentile", [None, (80.0, 100.0)], ids=["percentile of the preset", "percentile 80 to 100"]
)


@pytest.mark.parametrize("classes", some([2, 4, 14], 2))
@pytest.mark.parametrize("dtype", some(DTYPES, 2))
@with_and_without_teacher
@pytest.mark.parametrize("preset", PRESETS)
def test_values_and_gradients_are_the_references(
    preset: str, with_teacher: bool, classes: int, dtype: torch.dtype
) -> None:
    maps, labels = step_inputs(classes, (8, 9, 10), dtype)
    teacher = random_map(2, classes, (8, 9, 10)) if with_teacher else None
    compute = whole_step(labels, preset=preset, teacher=teacher)
    ours = gradients_of(compute, maps)
    with backend("reference"):
        plain = gradients_of(compute, maps)
    for mine, other in zip(ours, plain):
        if mine.is_floating_point():
            scale = float(other.abs().max())
            torch.testing.assert_close(
                mine, other, rtol=4 * max(ROUNDING[mine.dtype], 1e-5), atol=1e-5 * scale + 2 * SMALLEST[mine.dtype]
            )
        else:
            assert torch.equal(mine, other)


@with_and_without_teacher
def test_without_a_contrastive_loss_no_feature_is_read(with_teacher: bool) -> None:
    maps, labels = step_inputs(3, (8, 9, 10))
    for features in maps[2:]:
        features.fill_(torch.nan)
    compute = whole_step(labels, teacher=random_map(2, 3, (8, 9, 10)) if with_teacher else None, contrast_weight=0.0)
    ours = gradients_of(compute, maps)
    with backend("reference"):
        plain = gradients_of(compute, maps)
    for mine, other in zip(ours, plain):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    assert not any(of_features.any() for of_features in ours[-2:])


@pytest.mark.parametrize("preset", PRESETS)
@kernels_and_reference()
def test_network_a_is_the_winner_of_a_tie_in_dice(name: str, preset: str) -> None:
    maps, labels = step_inputs(3, (8, 9, 10))
    maps[1] = maps[0].clone()
    with backend(name):
        result = sslfast.DualContrastiveLoss(3, preset=preset)(*maps, labels)
    assert result.terms["dice"][0] == result.terms["dice"][1]
    assert result.terms["winner"] == 0


@percentile_of_the_preset_or_ramp
@pytest.mark.parametrize("preset", PRESETS)
@kernels_and_reference()
def test_a_step_number_that_only_the_device_knows_gives_the_same_as_one_that_the_host_knows(
    name: str, preset: str, percentile: tuple[float, float] | None
) -> None:
    maps, labels = step_inputs(3, (8, 9, 10))
    teacher = random_map(2, 3, (8, 9, 10))
    with backend(name):
        for step in some([333, 0, 1000, 2**31 + 1], 1):
            ours, plain = (
                gradients_of(
                    whole_step(labels, number, teacher, preset=preset, percentile=percentile), [m.clone() for m in maps]
                )
                for number in (torch.tensor(step), step)
            )
            for mine, other in zip(ours, plain):
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_unlabelled_volume_gives_finite_values_and_gradients(preset: str) -> None:
    maps, labels = step_inputs(3, (4, 5, 6), unlabelled=0)
    assert all(v.isfinite().all() for v in gradients_of(whole_step(labels, preset=preset), maps))


@pytest.mark.parametrize("preset", PRESETS)
def test_huge_logits_stay_finite_and_give_what_the_reference_gives(preset: str) -> None:
    maps, labels = step_inputs(3, (6, 7, 8))
    for m in maps[:2]:
        m.mul_(1e4 / 3)
    ours = gradients_of(whole_step(labels, preset=preset), maps)
    with backend("reference"):
        plain = gradients_of(whole_step(labels, preset=preset), maps)
    tiny = torch.finfo(torch.float32).tiny  # vectors flush what is smaller
    for mine, other in zip(ours, plain):
        assert mine.isfinite().all()
        atol = max(1e-5 * float(other.abs().max()), tiny)
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("where", ["labelled", "unlabelled", "teacher"])
def test_nan_and_infinite_logits_make_the_loss_nan(where: str, preset: str, bad: float) -> None:
    maps, labels = step_inputs(3, (6, 7, 8))
    labels.clamp_min_(0)
    teacher = random_map(2, 3, (6, 7, 8)) if where == "teacher" else None
    for network in (0, 1):
        spoiled = [m.clone() for m in maps]
        if teacher is None:
            spoiled[network][0 if where == "labelled" else 3, 1, 2, 3, 4] = bad
        else:
            teacher[1, 1, 2, 3, 4] = bad
        assert whole_step(labels, preset=preset, teacher=teacher)(*spoiled)[0][network].isnan()


@with_and_without_teacher
@pytest.mark.parametrize("preset", PRESETS)
@only_on("cpu")
def test_thread_counts_give_the_same_bits(preset: str, with_teacher: bool) -> None:
    maps, labels = step_inputs(3, (37, 41, 29))
    teacher = random_map(2, 3, (37, 41, 29)) if with_teacher else None
    compute = whole_step(labels, preset=preset, teacher=teacher)
    first, *others = with_threads(lambda: gradients_of(compute, maps), 1, 2, 3)
    for other in others:
        assert all(map(torch.equal, first, other))


DIGEST = """
import hashlib, torch, sslfast
torch.manual_seed(7)
maps = [torch.randn(4, c, 19, 20, 21).requires_grad_() for c in (3, 3, 6, 6)]
labels = torch.randint(-1, 3, (2, 19, 20, 21))
digest = hashlib.sha256()
for preset in ("recommended", "paper"):
    with sslfast.backend("cpu"):
        criterion = sslfast.DualContrastiveLoss(3, preset=preset, gate=(0, 0), contrast_weight=0.1, ramp_steps=10)
        loss = criterion(*maps, labels, step=9).loss
    for value in (loss.detach(), *torch.autograd.grad(loss, maps, materialize_grads=True)):
        digest.update(value.numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="one instruction set here")
@only_on("cpu")
def test_instruction_sets_give_the_same_bits() -> None:
    capabilities = ("avx512", "avx2")
    outputs = [run_python("-c", DIGEST, ATEN_CPU_CAPABILITY=capability).split()[-2:] for capability in capabilities]
    (first, digest), (second, other) = outputs
    assert first != second
    assert digest == other


@pytest.mark.parametrize(
    ("preset", "contrast_weight", "with_teacher", "dynamic"),
    some(
        [
            ("recommended", 0.1, True, True),
            ("recommended", 0.0, True, False),
            ("recommended", 0.0, False, True),
            ("paper", 0.1, False, True),
        ],
        1,
    ),
)
@not_on("reference")
def test_it_compiles_to_one_graph(preset: Any, contrast_weight: float, with_teacher: bool, dynamic: bool) -> None:
    torch.compiler.reset()  # it counts compilations of the same function, of all cases
    maps, labels = step_inputs(3, (4, 5, 6))
    weights = {"contrast_weight": contrast_weight, "gate": (0.1, 0.9)}
    criteria = [sslfast.DualContrastiveLoss(3, preset=preset, ramp_steps=10, **weights) for _ in range(2)]
    teacher = torch.randn_like(maps[0][len(labels) :]) if with_teacher else None

    def compute(criterion: sslfast.DualContrastiveLoss, *inputs: Tensor) -> list[Tensor]:
        result = criterion(*inputs, labels, step=9, teacher=teacher)
        return [result.loss, masked_consistency(*inputs[:2]).loss, result.terms["gate"]]

    compiled = torch.compile(compute, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = [with_gradients(partial(f, c), *maps) for f, c in zip((compiled, compute), criteria, strict=True)]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
