"""The fused ops against the references in float64: values, gradients, layouts, dtypes, empty sets, threads, instruction sets."""

from __future__ import annotations

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
    pseudo_supervised,
    reliability,
    sample_voxels,
    voxel_infonce,
)
from sslfast.ops.backend import backend, empty_like, has_whole_step, kernels, unavailable, zeros_like
from sslfast.ops.reliability import reliability_ref
from sslfast.ops.sample_voxels import sample_voxels_ref
from sslfast.ops.state import is_reliable, pseudo_label

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

SMALLEST = {
    torch.float32: 1e-12,
    torch.bfloat16: 1e-12,
    torch.float16: 2.0**-24,
}  # float16 has nothing between 0 and 2^-24


@pytest.fixture(scope="module", autouse=True)
def fused() -> Iterator[None]:
    assert unavailable(BACKEND) is None
    with backend(BACKEND), torch.device(DEVICE):
        yield


def random_map(volumes: int, channels: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(volumes, channels, *size)).to(dtype)


def reference(compute: Callable[..., list[Tensor]], *maps: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values and gradients of the specification on the same numbers in `dtype`."""
    with backend("reference"):
        return with_gradients(compute, *(m.detach().to(dtype) for m in maps))


def with_gradients(compute: Callable[..., list[Tensor]], *maps: Tensor) -> list[Tensor]:
    """The values, and the gradients of a weighted sum of those that have one."""
    leaves = [m.detach().requires_grad_() for m in maps]
    values = compute(*leaves)
    smooth = [v for v in values if v.requires_grad]
    total = sum((v * torch.linspace(1, 2, max(v.numel(), 1)).view_as(v).to(v.dtype)).sum() for v in smooth)
    return [v.detach() for v in values] + list(torch.autograd.grad(total, leaves))


def assert_as_good_as_eager(
    compute: Callable[..., list[Tensor]], *maps: Tensor, terms: Sequence[Tensor] | None = None
) -> None:
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


def supervised(labels: Tensor, **options: float) -> Callable[..., list[Tensor]]:
    return lambda a, b: list(dual_supervised(a, b, labels, **options))[:4]


def clear_threshold(*logits: Tensor) -> float:
    """A threshold above 0.5 that no confidence comes near, so that rounding decides neither a confident class nor the mask."""
    confidences = torch.cat([z.double().softmax(1).amax(1).flatten() for z in logits])
    candidates = torch.linspace(0.51, 0.6, 91, dtype=torch.float64)
    return float(candidates[(candidates[:, None] - confidences).abs().amin(1).argmax()])


def pseudo(state: Tensor, target: str) -> Callable[..., list[Tensor]]:
    return lambda a, b: list(pseudo_supervised(a, b, state, target=target))[:3]


def dice_and_ce_terms(logits: Tensor, target: Tensor, member: Tensor) -> Tensor:
    """How large the terms are that cancel in the gradient of cross-entropy + Dice: p (G - sum p G) + (p - y) / voxels, where
    G = dDice / dp is itself a difference, near 0 where a class is predicted well; [N, C, *size]."""
    p = logits.double().softmax(1) * member.unsqueeze(1)
    y = torch.zeros_like(p).scatter_(1, target.clamp_min(0).unsqueeze(1), 1.0) * member.unsqueeze(1)
    over = (0, *range(2, p.ndim))
    total = (p.square() + y).sum(over, keepdim=True) + 1e-5
    grad = (2 * y / total + 2 * (2 * (p * y).sum(over, keepdim=True) + 1e-5) / total.square() * p)[:, 1:]
    grad = torch.cat((torch.zeros_like(p[:, :1]), grad), 1) / (p.shape[1] - 1)
    return 2 * (p * (grad + (p * grad).sum(1, keepdim=True)) + (p + y) / member.sum().clamp_min(1))


def pseudo_terms(state: Tensor, target: str, a: Tensor, b: Tensor) -> list[Tensor]:
    """The same for `pseudo`, of both maps."""
    taught = (b.argmax(1), a.argmax(1)) if target == "other" else (pseudo_label(state),) * 2
    return [dice_and_ce_terms(z, t, is_reliable(state)) for z, t in zip((a, b), taught, strict=True)]


def prototypes(state: Tensor, classes: int) -> Callable[..., list[Tensor]]:
    return lambda f: list(class_prototypes(f, state, classes))


@pytest.mark.parametrize("classes", some([2, 14, 4, 32], 2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_supervised_pseudo_and_prototypes(classes: int, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    a, b = random_map(2, classes, size, dtype), random_map(2, classes, size, dtype)
    labels = torch.randint(-1, classes, (2, *size))
    terms = [dice_and_ce_terms(z, labels, labels >= 0) for z in (a, b)]
    assert_as_good_as_eager(supervised(labels, threshold=clear_threshold(a, b)), a, b, terms=terms)
    state = reliability(a, b, 60.0, winner=0).state
    for target in ("state", "other"):
        assert_as_good_as_eager(pseudo(state, target), a, b, terms=pseudo_terms(state, target, a, b))
    assert_as_good_as_eager(prototypes(state, classes), random_map(2, 5, size, dtype))


@pytest.mark.parametrize("width", [2, 16, 33, 256])
def test_feature_widths(width: int) -> None:
    state = torch.randint(0, 256, (2, 5, 6, 7), dtype=torch.uint8) & 0b11100011
    assert_as_good_as_eager(prototypes(state, 4), random_map(2, width, (5, 6, 7)))


def test_a_single_feature_has_a_direction_that_nothing_moves() -> None:
    state = torch.full((1, 5, 6), 33, dtype=torch.uint8)
    sums, counts, grad = with_gradients(prototypes(state, 2), torch.full((1, 1, 5, 6), -2.0))
    assert sums[:, 0].tolist() == [0, -30]
    assert counts.tolist() == [0, 30]
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", some(DTYPES, 1))
@pytest.mark.parametrize("classes", some([3, 2], 1))
def test_layouts_give_the_same_bits(classes: int, dtype: torch.dtype) -> None:
    size = (9, 10, 11)
    a, b, f = (random_map(3, c, size, dtype) for c in (classes, classes, 6))
    labels = torch.randint(-1, classes, (3, *size))
    state = reliability(a, b, 50.0, winner=1).state
    plain = (
        with_gradients(supervised(labels), a, b)
        + with_gradients(pseudo(state, "other"), a, b)
        + with_gradients(prototypes(state, classes), f)
    )
    for name in layouts(a):
        x, y, z = layouts(a)[name], layouts(b)[name], layouts(f)[name]
        differs = reliability(x, y, 50.0, winner=1).state != state
        assert differs.float().mean() < (1e-2 if sums_otherwise(name) else 1e-9), name
        other = (
            with_gradients(supervised(labels), x, y)
            + with_gradients(pseudo(state, "other"), x, y)
            + with_gradients(prototypes(state, classes), z)
        )
        assert_same(other, plain, name)


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


def expected_state(a: Tensor, b: Tensor, thresholds: Tensor, winner: int, **options: object) -> Tensor:
    """The byte map that follows from the kernel's own entropies and thresholds, by the reference's rules."""
    entropy = [kernels(z).voxel_entropy(z) for z in (a, b)]
    predicted = [z.argmax(1) for z in (a, b)]
    per_class = options.get("per_class", False)
    below = [h < (t[y] if per_class else t) for h, t, y in zip(entropy, thresholds, predicted)]
    reliable = {"winner": below[winner], "union": below[0] | below[1], "both": below[0] & below[1]}[options["mode"]]
    won, lost = predicted[winner], predicted[1 - winner]
    taught = torch.maximum(won, lost) if options.get("label") == "union" else won
    pulled = lost if options.get("anchor_label") == "loser" else taught
    return (torch.where(reliable, taught + 32, pulled) + 64 * below[0] + 128 * below[1]).byte()


@pytest.mark.parametrize("mode", ["winner", "union", "both"])
@pytest.mark.parametrize("winner", some([1, 0], 1))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_class": True},
        {"label": "union"},
        {"anchor_label": "loser"},
        {"per_class": True, "anchor_label": "loser"},
    ],
)
@pytest.mark.parametrize("classes", some([5, 2], 1))
def test_byte_map_and_exact_thresholds(mode: str, winner: int, options: dict[str, object], classes: int) -> None:
    size = (13, 14, 15)
    a, b = random_map(2, classes, size), random_map(2, classes, size)
    for percentile in some([37.3, 0.0, 50.0, 100.0], 1):
        thresholds, state = reliability(a, b, percentile, mode=mode, winner=winner, **options)
        assert torch.equal(state, expected_state(a, b, thresholds, winner, mode=mode, **options))
        for z, found in zip((a, b), thresholds):
            entropy, y = kernels(z).voxel_entropy(z).cpu().numpy(), z.argmax(1).cpu().numpy()
            members = [entropy[y == c] for c in range(classes)] if options.get("per_class") else [entropy]
            expected = [np.float32(np.percentile(m.astype(np.float64), percentile)) if m.size else 0 for m in members]
            np.testing.assert_array_equal(np.atleast_1d(found.cpu().numpy()), expected)
        with backend("reference"):
            near = reliability(a, b, percentile, mode=mode, winner=winner, **options).thresholds
        torch.testing.assert_close(thresholds, near, rtol=1e-5, atol=1e-6)


def test_entropy_is_that_of_the_reference() -> None:
    for classes in (2, 7, 32):
        z = random_map(2, classes, (9, 10, 11))
        log_p = z.double().log_softmax(1)
        torch.testing.assert_close(
            kernels(z).voxel_entropy(z).double(), -(log_p.exp() * log_p).sum(1), rtol=0, atol=1e-6
        )


@cpp_only
def test_percentile_beyond_two_to_the_24_voxels() -> None:
    size = (1, 2**24 + 77)
    a = torch.randn(1, 2, *size)
    thresholds, _ = reliability(a, a.flip(1), 66.6, winner=0)
    entropy = kernels(a).voxel_entropy(a).cpu().numpy().astype(np.float64)
    assert thresholds[0].item() == np.float32(np.percentile(entropy, 66.6))
    assert thresholds[1] == thresholds[0]


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("percentile", some([50.0, 100.0, 0.0, 20.0, 99.9], 3))
def test_ties(values: int, percentile: float) -> None:
    a = torch.randint(0, values, (2, 1, 9, 10, 11)).float() * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    thresholds, state = reliability(a, a, percentile, winner=0)
    entropy = kernels(a).voxel_entropy(a)
    assert thresholds[0].item() == np.float32(np.percentile(entropy.cpu().numpy().astype(np.float64), percentile))
    assert torch.equal((state & 32) > 0, entropy < thresholds[0])


@pytest.mark.parametrize("role", ["anchors", "negatives"])
@pytest.mark.parametrize("classes", [2, 5, 32])
@pytest.mark.parametrize("voxels", some([0, 1, 4097, 15, 16, 40000], 3))
def test_the_sample_is_the_references(role: str, classes: int, voxels: int) -> None:
    label = torch.randint(0, classes, (voxels,))
    state = (label + 32 * (torch.rand(voxels) < 0.7)).byte().view(1, voxels)
    quotas = [int(q) for q in torch.randint(0, 300, (classes,))]
    seed, step = int(torch.randint(0, 2**62, ())) * 4 + 3, int(torch.randint(0, 2**32 - 1, ()))
    found = sample_voxels(state, quotas, seed, step, role=role)
    with backend("reference"):
        expected = sample_voxels(state, quotas, seed, step, role=role)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.counts, expected.counts)


def test_rare_classes_and_large_quotas_are_sampled_whole() -> None:
    state = torch.zeros(1, 50_000, dtype=torch.uint8)
    state[0, ::9973] = 3
    for quotas in ([10, 10, 10, 10], [50_000, 0, 1, 100]):
        found = sample_voxels(state, quotas, 1, 2)
        with backend("reference"):
            assert torch.equal(found.indices, sample_voxels(state, quotas, 1, 2).indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows_and_their_gradient(dtype: torch.dtype) -> None:
    features = random_map(3, 7, (4, 5, 6), dtype)
    indices = torch.tensor([[0, 119, 120], [359, -1, 5], [5, 5, -1]])  # a voxel may come twice
    for values in (features, *layouts(features).values()):
        ours = with_gradients(lambda f: [gather_voxels(f, indices)], values)
        exact = reference(lambda f: [gather_voxels(f, indices)], features)
        assert torch.equal(ours[0].double(), exact[0])
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize(
    ("classes", "capacity", "width", "negatives"), [(2, 1, 2, 0), (2, 40, 16, 100), (4, 7, 19, 1), (14, 5, 3, 17)]
)
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_infonce(classes: int, capacity: int, width: int, negatives: int, temperature: float) -> None:
    counts = [torch.randint(0, n + 1, (classes,)) for n in (capacity, 3, negatives)]

    def compute(anchors: Tensor, sums: Tensor, keys: Tensor) -> list[Tensor]:
        return list(voxel_infonce(anchors, counts[0], sums, counts[1], keys, counts[2], temperature=temperature))

    maps = torch.randn(classes, capacity, width), torch.randn(classes, width), torch.randn(classes, negatives, width)
    each = float(counts[0].clamp_min(1).min())  # the mean over a class's anchors
    terms = [1 / (temperature * each * m.double().norm(dim=-1, keepdim=True)) for m in maps]
    assert_as_good_as_eager(compute, *maps, terms=terms)


def test_a_single_feature_has_no_direction_to_learn() -> None:
    counts = torch.tensor([5, 5]), torch.tensor([1, 1]), torch.tensor([7, 7])
    maps = torch.randn(2, 5, 1), torch.randn(2, 1), torch.randn(2, 7, 1)

    def compute(a: Tensor, s: Tensor, k: Tensor) -> list[Tensor]:
        return list(voxel_infonce(a, counts[0], s, counts[1], k, counts[2], temperature=0.1))

    ours, exact = with_gradients(compute, *maps), reference(compute, *maps)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    for values, gradient in zip(maps, ours[-3:]):  # exactly 0 by the mathematics, which the rounding of 1 / |f| blurs
        assert (gradient.abs() * values.abs() * 0.1 <= 1e-6).all()


def test_short_vectors_have_no_direction() -> None:
    anchors, sums, keys = torch.zeros(2, 3, 4), torch.randn(2, 4), torch.zeros(2, 5, 4)
    counts = torch.tensor([3, 3]), torch.tensor([1, 1]), torch.tensor([5, 5])

    def compute(a: Tensor, s: Tensor, k: Tensor) -> list[Tensor]:
        return list(voxel_infonce(a, counts[0], s, counts[1], k, counts[2]))

    assert_as_good_as_eager(compute, anchors, sums, keys)
    state = torch.full((1, 3, 3), 32, dtype=torch.uint8)
    assert_as_good_as_eager(prototypes(state, 2), torch.zeros(1, 4, 3, 3))


def whole_step(labels: Tensor, step: int = 900, **options: object) -> Callable[..., list[Tensor]]:
    """Loss and every term of the composite."""

    def compute(logits_a: Tensor, logits_b: Tensor, features_a: Tensor, features_b: Tensor) -> list[Tensor]:
        criterion = sslfast.DualContrastiveLoss(logits_a.shape[1], ramp_steps=1000, anchors=20, negatives=30, **options)
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step)
        return [torch.stack((result.loss_a, result.loss_b)), *result.terms.values()]

    return compute


def step_inputs(
    classes: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32, unlabelled: int = 2, width: int = 6
) -> tuple[list[Tensor], Tensor]:
    volumes = 2 + unlabelled
    maps = [random_map(volumes, c, size, dtype) for c in (classes, classes, width, width)]
    return maps, torch.randint(-1, classes, (2, *size))


def gradients_of(compute: Callable[..., list[Tensor]], maps: list[Tensor]) -> list[Tensor]:
    leaves = [m.detach().requires_grad_() for m in maps]
    values = compute(*leaves)
    (values[0] * torch.tensor([1.0, 0.7], dtype=values[0].dtype)).sum().backward()
    return [v.detach() for v in values] + [torch.zeros_like(m) if m.grad is None else m.grad for m in leaves]


@pytest.mark.parametrize("classes", some([2, 4, 14], 2))
@pytest.mark.parametrize("dtype", some(DTYPES, 2))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "corrected"},
        {"per_class_percentile": True, "anchor_label": "loser", "percentile": 30.0},
        {"mode": "union", "pseudo_label": "union"},
        {"mode": "both", "pseudo_label": "cross"},
    ],
    ids=["default", "corrected", "per class", "union", "cross"],
)
def test_the_whole_step_is_the_composition_of_its_parts(
    classes: int, dtype: torch.dtype, options: dict[str, object]
) -> None:
    maps, labels = step_inputs(classes, (8, 9, 10), dtype)
    ours = gradients_of(whole_step(labels, **options), maps)
    with backend("reference"):
        plain = gradients_of(whole_step(labels, **options), maps)
    for mine, other in zip(ours, plain):
        if mine.is_floating_point():
            scale = float(other.abs().max())
            torch.testing.assert_close(
                mine, other, rtol=4 * max(ROUNDING[mine.dtype], 1e-5), atol=1e-5 * scale + 2 * SMALLEST[mine.dtype]
            )
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("first", [5, 2**32 - 1000, 2**40 + 3])
def test_a_draw_may_count_from_any_voxel(first: int) -> None:
    state = torch.randint(0, 256, (2, 9, 11, 13), dtype=torch.uint8) & 0b11100001
    for negatives in (False, True):
        indices, counts = kernels(state).sample_voxels(state, [30, 40], 1337, 7, negatives, first)
        role = "negatives" if negatives else "anchors"
        expected = sample_voxels_ref(state, [30, 40], 1337, 7, role, first)
        assert torch.equal(indices, expected.indices)
        assert torch.equal(counts, expected.counts)


@pytest.mark.parametrize("per_class", [False, True])
def test_thresholds_may_be_given(per_class: bool) -> None:
    a, b = random_map(2, 3, (7, 8, 9)), random_map(2, 3, (7, 8, 9))
    given = torch.rand(2, 3) if per_class else torch.rand(2)
    winner = torch.ones((), dtype=torch.long)
    thresholds, state = kernels(a).reliability(a, b, 20.0, 1, winner, False, True, per_class, given)
    expected = reliability_ref(a, b, 20.0, "union", winner, "winner", "loser", per_class, given)
    assert torch.equal(thresholds, given)
    assert (state != expected.state).float().mean() < 1e-2  # an entropy may lie within rounding of its threshold


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


def test_gradients_are_written_everywhere_and_only_once() -> None:
    """Each backward op fills buffers that held NaN."""
    maps, labels = step_inputs(3, (5, 6, 7))
    a, b, f, _ = maps
    ops = kernels(a)
    state = reliability(a, b, 50.0, winner=0).state
    for layout in ("contiguous", "channels last"):
        poison = [torch.full_like(m, torch.nan) for m in (a, b, f)]
        if layout != "contiguous":
            poison = [p.movedim(1, -1).contiguous().movedim(-1, 1) for p in poison]
        _, _, sums = ops.dual_supervised(a[:2], b[:2], labels, 0.6, -1, 1e-5)
        ops.dual_supervised_backward(
            torch.ones(3, 2), a[:2], b[:2], labels, sums, 0.6, -1, 1e-5, poison[0][:2], poison[1][:2]
        )
        _, count, sums = ops.pseudo_supervised(a[2:], b[2:], state[2:], False, 1e-5)
        grad = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        ops.pseudo_supervised_backward(
            grad, a[2:], b[2:], state[2:], count, sums, False, 1e-5, poison[0][2:], poison[1][2:]
        )
        ops.class_prototypes_backward(torch.ones(3, 6), f, state, poison[2])
        assert all(p.isfinite().all() for p in poison)


def test_empty_sets_give_zero_and_zero_gradients() -> None:
    maps, labels = step_inputs(3, (4, 5, 6), unlabelled=0)
    values = gradients_of(whole_step(labels), maps)
    assert all(v.isfinite().all() for v in values)
    a, b = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6))
    nothing = torch.zeros(2, 4, 5, 6, dtype=torch.uint8)
    for value in with_gradients(pseudo(nothing, "state"), a, b) + with_gradients(prototypes(nothing, 3), a):
        assert not value.any()
    ignored = torch.full((2, 4, 5, 6), -1)
    ce, dice, discrepancy, mask, *grads = with_gradients(supervised(ignored), a, b)
    assert not ce.any()
    assert not discrepancy.any()
    assert not mask.any()
    assert not any(g.any() for g in grads)
    torch.testing.assert_close(dice, torch.zeros(2), atol=1e-6, rtol=0)


def test_huge_logits_stay_finite() -> None:
    maps, labels = step_inputs(3, (6, 7, 8))
    for m in maps[:2]:
        m.mul_(1e4 / 3)
    ours = gradients_of(whole_step(labels), maps)
    with backend("reference"):
        plain = gradients_of(whole_step(labels), maps)
    for mine, other in zip(ours, plain):
        assert mine.isfinite().all()
        atol = max(1e-5 * float(other.abs().max()), torch.finfo(torch.float32).tiny)  # vectors flush what is smaller
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("network", [0, 1])
@pytest.mark.parametrize("volume", [0, 3])
def test_bad_logits_give_nan(bad: float, network: int, volume: int) -> None:
    maps, labels = step_inputs(3, (6, 7, 8))
    labels.clamp_min_(0)
    maps[network][volume, 1, 2, 3, 4] = bad
    losses = whole_step(labels)(*maps)[0]
    assert losses[network].isnan()


@cpp_only
def test_thread_counts_give_the_same_bits() -> None:
    maps, labels = step_inputs(3, (37, 41, 29))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients_of(whole_step(labels), maps))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(u, v) for u, v in zip(results[0], other))


DIGEST = """
import hashlib, torch, sslfast
torch.manual_seed(7)
maps = [torch.randn(4, c, 19, 20, 21).requires_grad_() for c in (3, 3, 6, 6)]
criterion = sslfast.DualContrastiveLoss(3, ramp_steps=10)
with sslfast.backend("cpu"):
    loss = criterion(*maps, torch.randint(-1, 3, (2, 19, 20, 21)), step=9).loss
    loss.backward()
digest = hashlib.sha256(loss.detach().numpy().tobytes())
for m in maps:
    if m.grad is not None:
        digest.update(m.grad.numpy().tobytes())
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


@contextmanager
def recorded_ops() -> Iterator[list[tuple[str, tuple[object, ...]]]]:
    """The fused ops that are called, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[str, tuple[object, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace in ("sslfast", "sslfast_triton"):
                calls.append((function.name(), tuple(a.clone() if isinstance(a, Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield calls


def test_opcheck() -> None:
    maps, labels = step_inputs(3, (4, 5, 6))
    with recorded_ops() as calls:
        gradients_of(whole_step(labels, grad_keys=True), maps)
        gradients_of(whole_step(labels), maps)
        kernels(maps[0]).voxel_entropy(maps[0])
    by_name = dict(calls)
    assert len(by_name) == 13 + 2 * has_whole_step(maps[0])
    for name, arguments in by_name.items():
        packet = getattr(kernels(maps[0]), name.split("::")[1])
        torch.library.opcheck(
            packet.default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("dynamic", some([True, False], 1))
def test_compiles_to_one_graph(dynamic: bool, taught: bool) -> None:
    maps, labels = step_inputs(3, (4, 5, 6))
    criterion = sslfast.DualContrastiveLoss(3, ramp_steps=10)
    teacher = torch.randn_like(maps[0][len(labels) :]) if taught else None

    def compute(*inputs: Tensor) -> Tensor:
        return criterion(*inputs, labels, step=9, teacher=teacher).loss

    eager, compiled = [], []
    for function, grads in (
        (compute, eager),
        (torch.compile(compute, fullgraph=True, dynamic=dynamic, backend="aot_eager"), compiled),
    ):
        leaves = [m.clone().requires_grad_() for m in maps]
        loss = function(*leaves)
        loss.backward()
        grads += [loss.detach(), *(torch.zeros_like(m) if m.grad is None else m.grad for m in leaves)]
    for u, v in zip(eager, compiled):
        torch.testing.assert_close(u, v)


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
