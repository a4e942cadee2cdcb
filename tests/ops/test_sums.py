"""The kernels against the references in float64: sums, losses, gradients, layouts, dtypes, empty sets, threads, instruction sets."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from sslfast.ops import (
    class_prototypes,
    dual_supervised,
    gather_voxels,
    masked_consistency,
    pseudo_supervised,
    rectified_consistency,
    reliability,
    sample_voxels,
    voxel_infonce,
)
from sslfast.ops.backend import backend, has_linear_logits, kernels, unavailable
from sslfast.ops.buffers import empty_like, zeros_like
from sslfast.ops.dual_supervised import OP as SUPERVISED
from sslfast.ops.flags import RELIABLE
from sslfast.ops.linear_logits import LinearLogits
from sslfast.ops.masked_consistency import OP as MASKED
from sslfast.ops.pseudo_supervised import OP as PSEUDO
from sslfast.ops.rectified_consistency import OP as RECTIFIED
from sslfast.ops.registry import LIBRARIES, OPS
from sslfast.ops.reliability import reliability_ref
from sslfast.ops.sample_voxels import sample_voxels_ref

BACKEND = os.environ.get("SSLFAST_TEST_BACKEND", "cpu")
DEVICE = os.environ.get("SSLFAST_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow; and cuts a bfloat16 off where the hardware rounds it
EMULATED = os.environ.get("SSLFAST_TEST_EMULATED") == "1"  # the CUDA kernels' code in the place of the C++ kernels
cpp_only = pytest.mark.skipif(BACKEND != "cpu" or EMULATED, reason="about the C++ kernels")


def some(values: list[Any], few: int) -> list[Any]:
    """All of them, or the first few where each costs seconds."""
    return values[:few] if INTERPRETED else values


SIZES = some([(7, 3, 5), (33,), (1, 1, 1), (16, 16, 17), (5, 31), (20, 21, 41)], 3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}
SMALLEST = {  # float16 has nothing between 0 and 2^-24
    torch.float32: 1e-12,
    torch.bfloat16: 1e-12,
    torch.float16: 2.0**-24,
}
TERMS = (
    *("ce", "dice", "discrepancy", "mask_voxels", "winner", "thresholds", "pseudo", "pseudo_dice", "contrast"),
    *("kept_fraction", "reliable", "anchors"),
)
PRESETS = ("recommended", "paper")

Compute = Callable[..., list[Tensor]]


@pytest.fixture(scope="module", autouse=True)
def fused() -> Iterator[None]:
    assert unavailable(BACKEND) is None
    with backend(BACKEND), torch.device(DEVICE):
        yield


def random_map(volumes: int, channels: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(volumes, channels, *size)).to(dtype)


def random_flags(volumes: int, classes: int, size: tuple[int, ...], reliable: float = 0.6) -> Tensor:
    label = torch.randint(0, classes, (volumes, *size))
    return (label + RELIABLE * (torch.rand(volumes, *size) < reliable)).to(torch.uint8)


def reference(compute: Compute, *maps: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values and gradients of the specification on the same numbers in `dtype`."""
    with backend("reference"):
        return with_gradients(compute, *(m.detach().to(dtype) for m in maps))


def with_gradients(compute: Compute, *maps: Tensor) -> list[Tensor]:
    """The values, and the gradients of a weighted sum of those that have one; zeros for a map without one."""
    leaves = [m.detach().requires_grad_() for m in maps]
    values = compute(*leaves)
    smooth = [v for v in values if v.requires_grad]
    total = sum((v * torch.linspace(1, 2, max(v.numel(), 1)).view_as(v).to(v.dtype)).sum() for v in smooth)
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True) if smooth else map(torch.zeros_like, leaves)
    return [*(v.detach() for v in values), *gradients]


def assert_as_good_as_eager(compute: Compute, *maps: Tensor, terms: Sequence[Tensor | float] | None = None) -> None:
    """|ours - float64| <= 2 |eager float32 - float64| + rounding of the dtype, elementwise and in the relative L2 norm.

    `terms`: for each map, how large the terms are that cancel in its gradient; else its largest gradient stands for them.
    """
    ours = with_gradients(compute, *maps)
    exact = reference(compute, *maps)
    eager = reference(compute, *maps, dtype=torch.float32)
    assert len(ours) == len(exact)
    values = len(ours) - len(maps)
    for i, (mine, truth, plain) in enumerate(zip(ours, exact, eager)):
        assert mine.shape == truth.shape
        if not truth.is_floating_point():
            assert torch.equal(mine, truth)
            continue
        truth, mine, plain = truth.double(), mine.double(), plain.double()
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        scale = max(scale, 1.0) if i < values else scale  # values are means and sums of terms of order 1
        rounding = ROUNDING[maps[0].dtype if truth.shape == maps[0].shape else torch.float32]
        bound = 2 * (plain - truth).abs() + rounding * truth.abs() + 1e-6 * scale + SMALLEST[maps[0].dtype]
        if terms and i >= values:
            bound = bound + 1e-6 * terms[i - values]
        assert ((mine - truth).abs() <= bound).all()
        assert torch.linalg.norm(mine - truth) <= torch.linalg.norm(bound)


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same numbers laid out otherwise."""
    found = {"sliced batch": torch.cat((values, values))[: len(values)]}
    padded = torch.zeros(*values.shape[:-1], values.shape[-1] + 3, dtype=values.dtype)
    padded[..., : values.shape[-1]] = values
    found["sliced axis"] = padded[..., : values.shape[-1]]
    found["transposed axes"] = values.transpose(2, -1).contiguous().transpose(2, -1)
    found["channels last"] = values.movedim(1, -1).contiguous().movedim(-1, 1)
    found["every other channel"] = values.repeat_interleave(2, 1)[:, ::2]
    return found


def sums_otherwise(layout: str) -> bool:
    """True where sums are added up in another order: Triton spreads a tile over a warp by the layout and the dtypes it loads."""
    return layout in ("channels last", "labels' dtype") and BACKEND == "triton" and not INTERPRETED


def assert_same(result: Sequence[Tensor], plain: Sequence[Tensor], layout: str) -> None:
    """The same bits, or within rounding where the sums are added up in another order."""
    for mine, other in zip(result, plain, strict=True):
        if sums_otherwise(layout):
            torch.testing.assert_close(mine, other)
        else:
            assert torch.equal(mine, other), layout


# Ops from maps to sums


SUMS_OPS = {op.name: op for op in (SUPERVISED, PSEUDO, RECTIFIED, MASKED)}


def clear_threshold(*logits: Tensor) -> float:
    """A threshold above 0.5 that no confidence comes near, so that rounding decides neither a confident class nor the mask."""
    confidences = torch.cat([z.double().softmax(1).amax(1).flatten() for z in logits])
    candidates = torch.linspace(0.51, 0.6, 91, dtype=torch.float64)
    return float(candidates[(candidates[:, None] - confidences).abs().amin(1).argmax()])


def limit_between(teacher: Tensor) -> float:
    """An entropy that no voxel's is close to, so that rounding decides nothing."""
    q = teacher.double().softmax(1)
    entropy = torch.special.entr(q).sum(1).flatten().sort().values
    gap = int(entropy.diff().argmax()) if len(entropy) > 1 else 0
    return float(entropy[gap : gap + 2].mean()) + (1e-3 if len(entropy) == 1 else 0.0)


def labels_with_errors(volumes: int, classes: int, size: tuple[int, ...]) -> Tensor:
    """Of every class, ignored (-1), and out of range."""
    return torch.randint(-2, classes + 1, (volumes, *size))


def sums_arguments(name: str, a: Tensor, b: Tensor) -> list[tuple[Any, ...]]:
    """What an op takes besides the maps, in which rounding decides nothing."""
    volumes, classes, *size = a.shape
    if name == "dual_supervised":
        return [(labels_with_errors(volumes, classes, tuple(size)), clear_threshold(a, b), -1)]
    if name == "masked_consistency":
        return [(0.5, math.inf), (1.0, limit_between(b))]
    return [(random_flags(volumes, classes, tuple(size)),)]


@pytest.mark.parametrize("classes", some([2, 14, 3, 32], 2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SUMS_OPS)
def test_sums_and_their_gradient(name: str, classes: int, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    op = SUMS_OPS[name]
    maps = [random_map(2, classes, size, dtype) for _ in op.maps]
    largest = 2 * float(max(m.abs().max() for m in maps))  # KL and cross-entropy are as large as the logits are apart
    for rest in sums_arguments(name, maps[0], maps[-1]):
        assert_as_good_as_eager(lambda *m, r=rest: [op(m, *r)], *maps, terms=[largest] * len(maps))
        sums, exact = op(maps, *rest), op.ref(*(m.double() for m in maps), *rest)
        whole = exact == exact.round()
        assert torch.equal(sums[whole], exact[whole]), "counts, and sums over nothing"


@pytest.mark.parametrize("dtype", some(DTYPES, 1))
@pytest.mark.parametrize("classes", some([3, 2], 1))
def test_layouts_give_the_same_bits(classes: int, dtype: torch.dtype) -> None:
    size = (9, 10, 11)
    a, b, f = (random_map(3, c, size, dtype) for c in (classes, classes, 6))
    rest = {name: sums_arguments(name, a, b)[-1] for name in SUMS_OPS}
    flags = reliability(a, 50.0).flags

    def everything(a: Tensor, b: Tensor, f: Tensor) -> list[Tensor]:
        found = list(class_prototypes(f, flags, classes))
        for name, op in SUMS_OPS.items():
            found += with_gradients(lambda *m, o=op, n=name: [o(m, *rest[n])], *(a, b)[: len(op.maps)])
        return found

    plain = everything(a, b, f)
    of = {name: [layouts(m)[name] for m in (a, b, f)] for name in layouts(a)}
    for name, maps in of.items():
        differs = reliability(maps[0], 50.0).flags != flags
        assert differs.float().mean() < (1e-2 if sums_otherwise(name) else 1e-9), name
        assert_same(everything(*maps), plain, name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes(dtype: torch.dtype) -> None:
    a, b = random_map(2, 3, (5, 6, 7)), random_map(2, 3, (5, 6, 7))
    labels = torch.randint(0, 3, (2, 5, 6, 7))
    expected = dual_supervised(a, b, labels, ignore_index=1)
    result = dual_supervised(a, b, labels.to(dtype), ignore_index=1)
    assert_same(result, expected, "labels' dtype")


@pytest.mark.parametrize(
    ("value", "dtype"), [(3, torch.int64), (-2, torch.int16), (255, torch.uint8), (-128, torch.int8)]
)
def test_a_label_out_of_range_is_heard(value: int, dtype: torch.dtype) -> None:
    a, b = random_map(2, 3, (5, 6, 7)), random_map(2, 3, (5, 6, 7))
    labels = torch.zeros(2, 5, 6, 7, dtype=dtype)
    labels[1, 2, 3, 4:6] = value
    if DEVICE == "cuda":  # the kernels count it, and nobody waits for them to say so
        assert dual_supervised(a, b, labels).ce.isnan().all()
        return
    messages = []
    for name in (BACKEND, "reference"):
        with backend(name), pytest.raises(ValueError, match="labels holds 2 voxels") as error:
            dual_supervised(a, b, labels)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "(1, 2, 3, 4)" in messages[0]
    assert f"value {value}" in messages[0]


def test_gradients_are_written_everywhere() -> None:
    """Each backward op fills buffers that held NaN."""
    a, b = random_map(2, 3, (5, 6, 7)), random_map(2, 3, (5, 6, 7))
    poison = torch.full_like(a, torch.nan)
    for to in (poison, poison.movedim(1, -1).contiguous().movedim(-1, 1)):
        for name, op in SUMS_OPS.items():
            maps, (rest, *_) = (a, b)[: len(op.maps)], sums_arguments(name, a, b)
            found = [to.clone() for _ in range(op.students)]
            op.backward(torch.ones_like(op(maps, *rest)), maps, *rest, to=found)
            assert all(g.isfinite().all() for g in found), name


# Prototypes, entropies and flags


@pytest.mark.parametrize("dtype", some(DTYPES, 2))
@pytest.mark.parametrize(("classes", "width"), [(2, 5), (4, 33), (14, 16), (32, 2), (4, 256)])
def test_prototypes_have_no_gradient(classes: int, width: int, dtype: torch.dtype) -> None:
    for size in some([(5, 6, 7), (33,), (1, 1, 1), (20, 21, 41)], 2):
        flags = random_flags(2, classes, size)
        assert_as_good_as_eager(
            lambda f, s=flags: list(class_prototypes(f, s, classes)), random_map(2, width, size, dtype)
        )


def test_prototypes_of_short_and_single_features() -> None:
    sums, counts = class_prototypes(torch.full((1, 1, 5, 6), -2.0), torch.full((1, 5, 6), RELIABLE + 1).byte(), 2)
    assert sums[:, 0].tolist() == [0, -30]
    assert counts.tolist() == [0, 30]
    sums, counts = class_prototypes(torch.zeros(1, 4, 5, 6), torch.full((1, 5, 6), RELIABLE).byte(), 2)
    assert not sums.any()
    assert counts.tolist() == [30, 0]


def test_the_host_need_not_know_whose_prototypes_they_are() -> None:
    a, b, flags = random_map(2, 6, (7, 8, 9)), random_map(2, 6, (7, 8, 9)), random_flags(2, 3, (7, 8, 9))
    for second, chosen in ((0, a), (1, b)):
        found = class_prototypes(a, flags, 3, other=b, second=torch.tensor(second))
        assert all(map(torch.equal, found, class_prototypes(chosen, flags, 3)))


@pytest.mark.parametrize("dtype", some(DTYPES, 1))
@pytest.mark.parametrize("classes", some([5, 2, 32], 2))
def test_flags_and_exact_thresholds(classes: int, dtype: torch.dtype) -> None:
    z = random_map(2, classes, (13, 14, 15), dtype)
    entropy = kernels(z).voxel_entropy(z, None)
    torch.testing.assert_close(entropy.double(), torch.special.entr(z.double().softmax(1)).sum(1), rtol=0, atol=1e-6)
    for percentile in some([37.3, 0.0, 50.0, 100.0], 2):
        threshold, flags = reliability(z, percentile)
        assert threshold.item() == np.float32(np.percentile(entropy.cpu().double().numpy(), percentile))
        assert torch.equal(flags, (z.argmax(1) + RELIABLE * (entropy < threshold)).byte())
        assert torch.equal(reliability(z, torch.tensor(percentile, dtype=torch.float64)).flags, flags)
        with backend("reference"):
            torch.testing.assert_close(threshold, reliability(z, percentile).threshold, rtol=1e-5, atol=1e-6)


@cpp_only
def test_percentile_beyond_two_to_the_24_voxels() -> None:
    z = torch.randn(1, 2, 1, 2**24 + 77)
    entropy = kernels(z).voxel_entropy(z, None).double().numpy()
    assert reliability(z, 66.6).threshold.item() == np.float32(np.percentile(entropy, 66.6))


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("percentile", some([50.0, 100.0, 0.0, 20.0, 99.9], 3))
def test_ties(values: int, percentile: float) -> None:
    z = torch.randint(0, values, (2, 1, 9, 10, 11)).float() * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    threshold, flags = reliability(z, percentile)
    entropy = kernels(z).voxel_entropy(z, None)
    assert threshold.item() == np.float32(np.percentile(entropy.cpu().double().numpy(), percentile))
    assert torch.equal(flags >= RELIABLE, entropy < threshold)


def test_a_threshold_may_be_given() -> None:
    z, given, unused = random_map(2, 3, (7, 8, 9)), torch.rand(()), torch.tensor(20.0, dtype=torch.float64)
    threshold, flags = kernels(z).reliability(z, None, unused, given)
    assert torch.equal(threshold, given)
    differs = flags != reliability_ref(z, unused, given).flags
    assert differs.float().mean() < 1e-2  # an entropy may lie within rounding of the threshold


# The voxel sample and its contrast


@pytest.mark.parametrize("role", ["anchors", "negatives"])
@pytest.mark.parametrize("classes", [2, 5, 32])
@pytest.mark.parametrize("voxels", some([0, 1, 4097, 15, 16, 40000], 3))
def test_the_sample_is_the_references(role: Any, classes: int, voxels: int) -> None:
    flags = random_flags(1, classes, (voxels,), reliable=0.7)
    quotas = torch.randint(0, 300, (classes,)).tolist()
    seed, step = int(torch.randint(0, 2**62, ())) * 4 + 3, int(torch.randint(0, 2**32 - 1, ()))
    found = sample_voxels(flags, quotas, seed, step, role=role)
    for number in (step, torch.tensor(step)):
        for name in (BACKEND, "reference"):
            with backend(name):
                expected = sample_voxels(flags, quotas, seed, number, role=role)
            assert all(map(torch.equal, found, expected))


def test_rare_classes_and_large_quotas_are_sampled_whole() -> None:
    voxels = 2_000 if INTERPRETED else 50_000  # Triton compares each candidate with every other
    flags = torch.zeros(1, voxels, dtype=torch.uint8)
    flags[0, :: voxels // 5] = 3
    for quotas in ([10, 10, 10, 10], [voxels, 0, 1, 100]):
        found = sample_voxels(flags, quotas, 1, 2)
        with backend("reference"):
            assert torch.equal(found.indices, sample_voxels(flags, quotas, 1, 2).indices)


@pytest.mark.parametrize("first", [5, 2**32 - 1000, 2**40 + 3])
def test_a_draw_may_count_from_any_voxel(first: int) -> None:
    flags = random_flags(2, 2, (9, 11, 13))
    for role in ("anchors", "negatives"):
        found = kernels(flags).sample_voxels(flags, [30, 40], 1337, torch.tensor(7), role == "negatives", first)
        assert all(map(torch.equal, found, sample_voxels_ref(flags, [30, 40], 1337, 7, role, first)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows_and_their_gradient(dtype: torch.dtype) -> None:
    features = random_map(3, 7, (4, 5, 6), dtype)
    indices = torch.tensor([[0, 119, 120], [359, -1, 5], [5, 5, -1]])  # a voxel may come twice
    for values in (features, *layouts(features).values()):
        ours = with_gradients(lambda f: [gather_voxels(f, indices)], values)
        exact = reference(lambda f: [gather_voxels(f, indices)], features)
        assert torch.equal(ours[0].double(), exact[0])
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=ROUNDING[dtype], atol=0)


def test_places_beyond_2_to_the_31_elements() -> None:
    """Only the pages that are touched take memory."""
    f = torch.empty(2, 2, 2**29 + 5, dtype=torch.bfloat16)
    places = torch.tensor([0, 2**29 + 4, 2**29 + 5, 2 * 2**29 + 9])
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    for volume in f:
        volume[:, :1] = volume[:, -1:] = 0  # what was there is added to
    kernels(f).gather_voxels_backward(rows, places, f)
    assert f[1, 1, -1] == 8
    assert f[0, 1, -1] == 4
    assert f[1, 0, 0] == 5
    assert torch.equal(kernels(f).gather_voxels(f, places), rows)


def infonce(keys: Sequence[Tensor], temperature: float = 0.1) -> Compute:
    """Loss and number of anchors, of the anchors; `keys` is everything else."""

    def compute(anchors: Tensor) -> list[Tensor]:
        same = [k.to(anchors.dtype) if k.is_floating_point() else k for k in keys]
        return list(voxel_infonce(anchors, *same, temperature=temperature))

    return compute


@pytest.mark.parametrize(
    ("classes", "capacity", "width", "negatives"),
    [(2, 1, 2, 0), (2, 40, 16, 100), (4, 7, 19, 1), (14, 5, 3, 17), (2, 5, 1, 7)],
)
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_infonce(classes: int, capacity: int, width: int, negatives: int, temperature: float) -> None:
    counts = [torch.randint(0, n + 1, (classes,)) for n in (capacity, 3, negatives)]
    prototypes, rows = torch.randn(classes, width), torch.randn(classes, negatives, width)
    anchors = torch.randn(classes, capacity, width)
    each = float(counts[0].clamp_min(1).min())  # the mean over a class's anchors
    term = 1 / (temperature * each * anchors.double().norm(dim=-1, keepdim=True))  # 1 / |f| rounds what must cancel
    keys = counts[0], prototypes, counts[1], rows, counts[2]
    assert_as_good_as_eager(infonce(keys, temperature), anchors, terms=[term])


def test_short_vectors_have_no_direction() -> None:
    counts = torch.tensor([3, 3]), torch.tensor([1, 1]), torch.tensor([5, 5])
    compute = infonce((counts[0], torch.randn(2, 4), counts[1], torch.zeros(2, 5, 4), counts[2]))
    assert_as_good_as_eager(compute, torch.zeros(2, 3, 4))


# The whole step


def whole_step(labels: Tensor, step: int | Tensor = 900, teacher: Tensor | None = None, **options: Any) -> Compute:
    """The losses [2] and `TERMS`."""

    def compute(logits_a: Tensor, logits_b: Tensor, features_a: Tensor, features_b: Tensor) -> list[Tensor]:
        options_here = {"ramp_steps": 1000, "anchors": 20, "negatives": 30, **options}
        criterion = sslfast.DualContrastiveLoss(logits_a.shape[1], **options_here)
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)
        assert result.terms.keys() == set(TERMS)
        return [torch.stack((result.loss_a, result.loss_b)), *(result.terms[name] for name in TERMS)]

    return compute


def step_inputs(
    classes: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32, unlabelled: int = 2, width: int = 6
) -> tuple[list[Tensor], Tensor]:
    volumes = 2 + unlabelled
    maps = [random_map(volumes, c, size, dtype) for c in (classes, classes, width, width)]
    return maps, torch.randint(-1, classes, (2, *size))


def gradients_of(compute: Compute, maps: list[Tensor]) -> list[Tensor]:
    leaves = [m.detach().requires_grad_() for m in maps]
    values = compute(*leaves)
    (values[0] * torch.tensor([1.0, 0.7], dtype=values[0].dtype)).sum().backward()
    return [v.detach() for v in values] + [torch.zeros_like(m) if m.grad is None else m.grad for m in leaves]


@pytest.mark.parametrize("classes", some([2, 4, 14], 2))
@pytest.mark.parametrize("dtype", some(DTYPES, 2))
@pytest.mark.parametrize("taught", [False, True], ids=["", "teacher"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_step_is_the_references(preset: str, taught: bool, classes: int, dtype: torch.dtype) -> None:
    maps, labels = step_inputs(classes, (8, 9, 10), dtype)
    teacher = random_map(2, classes, (8, 9, 10)) if taught else None
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


@pytest.mark.parametrize("percentile", [None, (80.0, 100.0)])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_a_step_that_only_the_device_knows(name: str, preset: str, percentile: tuple[float, float] | None) -> None:
    maps, labels = step_inputs(3, (8, 9, 10))
    teacher = random_map(2, 3, (8, 9, 10))
    with backend(name):
        for step in some([0, 333, 1000, 2**31 + 1], 2):
            ours, plain = (
                gradients_of(
                    whole_step(labels, number, teacher, preset=preset, percentile=percentile), [m.clone() for m in maps]
                )
                for number in (torch.tensor(step), step)
            )
            for mine, other in zip(ours, plain):
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_empty_sets_give_zero_and_zero_gradients() -> None:
    maps, labels = step_inputs(3, (4, 5, 6), unlabelled=0)
    for preset in PRESETS:
        assert all(v.isfinite().all() for v in gradients_of(whole_step(labels, preset=preset), maps))
    for volumes in (0, 2):
        a, b = random_map(volumes, 3, (4, 5, 6)), random_map(volumes, 3, (4, 5, 6))
        nothing = torch.zeros(volumes, 4, 5, 6, dtype=torch.uint8)
        zeros = (
            *with_gradients(lambda a, s=nothing: list(pseudo_supervised(a, s)), a),
            *with_gradients(lambda a, b, s=nothing: [rectified_consistency(a, b, s).rectified], a, b),
            *with_gradients(lambda a, b: list(masked_consistency(a, b, max_entropy=0.0)), a, b),
            *class_prototypes(a, nothing, 3),
        )
        assert not any(value.any() for value in zeros)
    labels.fill_(-1)
    ce, dice, discrepancy, mask, *grads = with_gradients(
        lambda a, b: list(dual_supervised(a, b, labels)), *(m[:2] for m in maps[:2])
    )
    assert not any(value.any() for value in (ce, dice, discrepancy, mask, *grads))


def test_huge_logits_stay_finite() -> None:
    maps, labels = step_inputs(3, (6, 7, 8))
    for m in maps[:2]:
        m.mul_(1e4 / 3)
    for preset in PRESETS:
        ours = gradients_of(whole_step(labels, preset=preset), maps)
        with backend("reference"):
            plain = gradients_of(whole_step(labels, preset=preset), maps)
        for mine, other in zip(ours, plain):
            assert mine.isfinite().all()
            atol = max(
                1e-5 * float(other.abs().max()), torch.finfo(torch.float32).tiny
            )  # vectors flush what is smaller
            torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("where", ["labelled", "unlabelled", "teacher"])
def test_bad_logits_give_nan(where: str, preset: str, bad: float) -> None:
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


@pytest.mark.parametrize("taught", [False, True], ids=["", "teacher"])
@pytest.mark.parametrize("preset", PRESETS)
@cpp_only
def test_thread_counts_give_the_same_bits(preset: str, taught: bool) -> None:
    maps, labels = step_inputs(3, (37, 41, 29))
    teacher = random_map(2, 3, (37, 41, 29)) if taught else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients_of(whole_step(labels, preset=preset, teacher=teacher), maps))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


DIGEST = """
import hashlib, torch, sslfast
torch.manual_seed(7)
maps = [torch.randn(4, c, 19, 20, 21).requires_grad_() for c in (3, 3, 6, 6)]
labels = torch.randint(-1, 3, (2, 19, 20, 21))
digest = hashlib.sha256()
for preset in ("recommended", "paper"):
    with sslfast.backend("cpu"):
        loss = sslfast.DualContrastiveLoss(3, preset=preset, ramp_steps=10)(*maps, labels, step=9).loss
    for value in (loss.detach(), *torch.autograd.grad(loss, maps, materialize_grads=True)):
        digest.update(value.numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="one instruction set here")
@cpp_only
def test_instruction_sets_give_the_same_bits() -> None:
    found = {}
    for capability in ("avx512", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        result = subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=environment
        )
        name, digest = result.stdout.split()[-2:]
        found[name] = digest
    assert len(found) == 2
    assert len(set(found.values())) == 1


# What autograd, torch.compile and the dispatcher ask of an op


def every_loss(a: Tensor, b: Tensor, f: Tensor) -> dict[str, Tensor]:
    """The losses of single ops, and of whole steps, of maps [4, ...]."""
    flags, labels = reliability(b, 50.0).flags, b.argmax(1)
    keys = (
        torch.tensor([5, 5, 5]),
        torch.ones(3, 6),
        torch.tensor([1, 1, 1]),
        torch.ones(3, 4, 6),
        torch.tensor([4] * 3),
    )
    rows = gather_voxels(f, sample_voxels(flags, [5, 5, 5], 1, 2).indices)
    return {
        "supervised": dual_supervised(a, b, labels).ce.sum(),
        "pseudo": pseudo_supervised(a, flags).ce,
        "rectified": rectified_consistency(a, b, flags).rectified,
        "masked": masked_consistency(a, b).loss,
        "gathered": rows.square().sum(),
        "contrast": infonce(keys)(rows)[0],
        **{preset: whole_step(labels[:2], preset=preset)(a, b, f, f)[0].sum() for preset in PRESETS},
    }


@pytest.mark.parametrize("name", ["supervised", "pseudo", "rectified", "masked", "gathered", "contrast", *PRESETS])
def test_a_second_derivative_raises(name: str) -> None:
    maps = [random_map(4, c, (3, 4, 5)).requires_grad_() for c in (3, 3, 6)]
    loss = every_loss(*maps)[name]
    gradients = torch.autograd.grad(loss, maps, create_graph=True, materialize_grads=True)
    penalty = sum(g.square().sum() for g in gradients)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + penalty).backward()


@contextmanager
def recorded_ops() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The ops that are called, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace in LIBRARIES:
                name = function.name().partition("::")[2]
                calls.append((name, tuple(a.clone() if isinstance(a, Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield calls


def test_opcheck_of_every_op() -> None:
    a, b, f = (random_map(4, c, (4, 5, 6)) for c in (3, 3, 6))
    linear = [LinearLogits(f[..., :3], torch.randn(4, 3, 7).requires_grad_()) for _ in range(2)]
    with recorded_ops() as calls:
        leaves = [m.requires_grad_() for m in (a, b, f)]
        sum(every_loss(*leaves).values()).backward()
        kernels(a).voxel_entropy(a, None)
        kernels(a).reliability(a, None, torch.tensor(30.0, dtype=torch.float64), torch.tensor(0.5))
        class_prototypes(f, random_flags(4, 3, (4, 5, 6)), 3, other=f, second=torch.tensor(1))
        if has_linear_logits(a):
            rectified_consistency(*linear, random_flags(4, 3, (4, 5, 3))).cosine.backward()
            dual_supervised(*linear, torch.zeros(4, 4, 5, 3, dtype=torch.long)).ce.sum().backward()
    assert {name for name, _ in calls} == set(OPS)
    different = {(name, *(a is None for a in arguments)): arguments for name, arguments in calls}
    for (name, *_), arguments in different.items():
        torch.library.opcheck(
            getattr(kernels(a), name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_small_and_has_a_kernel(name: str) -> None:
    namespace = "sslfast_triton" if BACKEND == "triton" else "sslfast"
    assert len(getattr(torch.ops, namespace).__getattr__(name).default._schema.arguments) <= 12
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", DEVICE.upper())


@pytest.mark.parametrize("taught", [False, True], ids=["", "teacher"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dynamic", some([True, False], 1))
def test_compiles_to_one_graph(dynamic: bool, preset: Any, taught: bool) -> None:
    maps, labels = step_inputs(3, (4, 5, 6))
    criterion = sslfast.DualContrastiveLoss(3, preset=preset, ramp_steps=10)
    teacher = torch.randn_like(maps[0][len(labels) :]) if taught else None

    def compute(*inputs: Tensor) -> list[Tensor]:
        return [criterion(*inputs, labels, step=9, teacher=teacher).loss, masked_consistency(*inputs[:2]).loss]

    compiled = torch.compile(compute, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for ours, plain in zip(with_gradients(compiled, *maps), with_gradients(compute, *maps)):
        torch.testing.assert_close(ours, plain)


@cpp_only
def test_gradients_take_the_memory_of_the_last_step_once_nobody_uses_it() -> None:
    like = torch.empty(2, 3, 50, 50, 50)
    first, second = empty_like(like), zeros_like(like)
    places = first.data_ptr(), second.data_ptr()
    assert len(set(places)) == 2
    part = first[1:]
    del first
    third = empty_like(like)
    assert third.data_ptr() not in places  # a view still shows the first
    del part
    assert empty_like(like).data_ptr() == places[0]
    second.fill_(7)
    del second
    assert not zeros_like(like).any()
    last = empty_like(like.half().to(memory_format=torch.channels_last_3d))
    assert last.is_contiguous(memory_format=torch.channels_last_3d)
    assert last.dtype == torch.float16


@cpp_only
def test_backends_by_name() -> None:
    a = random_map(1, 2, (3, 3, 3))
    labels = torch.zeros(1, 3, 3, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="backend is 'gpu'; it must be auto or one of"), backend("gpu"):
        pass
    with pytest.raises(RuntimeError, match="'triton' cannot run here"), backend("triton"):
        pass
    with pytest.raises(TypeError, match="float32, bfloat16 and float16"), backend("cpu"):
        dual_supervised(a.double(), a.double(), labels)
    with backend("auto"):
        assert dual_supervised(a.double(), a.double(), labels).ce.dtype == torch.float64
