"""Logits that are computed from features where they are read, against stored ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sslfast
from helpers.compare import assert_as_good_as_eager, with_gradients, with_threads
from helpers.maps import DTYPES, clear_threshold, layouts, random_flags
from sslfast.networks import ResVNet, VNet
from sslfast.ops import dual_supervised, masked_consistency, pseudo_supervised, rectified_consistency, reliability
from sslfast.ops.backend import backend, has_linear_logits
from sslfast.ops.linear_logits import LinearLogits, linear_logits, materialize

SIZES = [(7, 3, 5), (33,), (1, 1, 1), (16, 16, 17), (20, 21, 41)]


def test_the_kernels_here_compute_logits() -> None:
    assert has_linear_logits(torch.zeros(1, 2, 3))


def random_parts(classes: int, width: int, size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Features and weights of two networks."""
    features = [torch.randn(2, width, *size).to(dtype) for _ in range(2)]
    weights = [3 * torch.randn(2, classes, width + 1) / width**0.5 for _ in range(2)]
    return features[0], weights[0], features[1], weights[1]


@pytest.mark.parametrize(("classes", "width"), [(2, 16), (3, 1), (5, 33), (14, 32), (32, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_ops_of_linear_logits_are_as_good_as_eager_ones(
    classes: int, width: int, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    parts = random_parts(classes, width, size, dtype)
    fa, wa, fb, wb = (part.double() for part in parts)
    threshold = clear_threshold(materialize(LinearLogits(fa, wa)), materialize(LinearLogits(fb, wb)))
    labels = torch.randint(-1, classes, (2, *size))
    flags = random_flags(2, classes, size)
    terms = [float(max(parts[0].abs().max(), 1))] * 4  # a weight's gradient sums up features of either sign

    def supervised(fa: Tensor, wa: Tensor, fb: Tensor, wb: Tensor) -> list[Tensor]:
        return list(dual_supervised(LinearLogits(fa, wa), LinearLogits(fb, wb), labels, threshold=threshold))[:3]

    def rectified(fa: Tensor, wa: Tensor, fb: Tensor, wb: Tensor) -> list[Tensor]:
        return list(rectified_consistency(LinearLogits(fa, wa), LinearLogits(fb, wb), flags))

    def masked(fa: Tensor, wa: Tensor, fb: Tensor, wb: Tensor) -> list[Tensor]:
        return list(masked_consistency(LinearLogits(fa, wa), LinearLogits(fb, wb)))

    for op in (supervised, rectified, masked):
        assert_as_good_as_eager(op, *parts, terms=terms)
    assert_as_good_as_eager(lambda f, w: list(pseudo_supervised(LinearLogits(f, w), flags)), *parts[:2], terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same_bits(dtype: torch.dtype) -> None:
    fa, wa, fb, wb = random_parts(3, 18, (9, 10, 11), dtype)
    labels = torch.randint(-1, 3, (2, 9, 10, 11))

    def supervised(fa: Tensor, wa: Tensor, fb: Tensor, wb: Tensor) -> list[Tensor]:
        return list(dual_supervised(LinearLogits(fa, wa), LinearLogits(fb, wb), labels))[:3]

    plain = with_gradients(supervised, fa, wa, fb, wb)
    for name in layouts(fa):
        other = with_gradients(supervised, layouts(fa)[name], wa, layouts(fb)[name], wb)
        assert all(torch.equal(u, v) for u, v in zip(plain, other)), name


@pytest.mark.parametrize("classes", [2, 6])
def test_the_flags_are_those_of_stored_logits(classes: int) -> None:
    """Small whole numbers: a logit has no rounding, so every bit must agree."""
    logits = LinearLogits(
        torch.randint(-3, 4, (3, 16, 9, 10, 11)).float(), torch.randint(-2, 3, (3, classes, 17)).float() / 4
    )
    assert all(map(torch.equal, reliability(logits, 63.0), reliability(materialize(logits), 63.0)))


@pytest.mark.parametrize("preset", ["recommended", "paper"])
@pytest.mark.parametrize("with_teacher", [False, True], ids=["no teacher", "teacher"])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_the_head_is_classifier_and_loss(name: str, with_teacher: bool, preset: str) -> None:
    """Small whole numbers again, so that rounding decides neither a mask nor who is sampled."""
    features = [torch.randint(-3, 4, (4, 16, 9, 10, 11)).float() for _ in range(2)]
    labels = torch.randint(-1, 3, (2, 9, 10, 11))
    teacher = torch.randn(2, 3, 9, 10, 11) if with_teacher else None
    head = sslfast.DualContrastiveHead(3, 16, dropout=0.5, preset=preset, percentile=60.0, gate=(0, 0), ramp_steps=1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape) / 8)
    results = []
    for fused in (True, False):
        torch.manual_seed(3)
        leaves = [f.clone().requires_grad_() for f in features]
        copied = copy.deepcopy(head)
        with backend(name):
            if fused:
                result = copied(*leaves, labels, step=1, teacher=teacher)
            else:
                classifiers = copied.classifier_a, copied.classifier_b
                logits = [classifier(copied.dropout(f)) for classifier, f in zip(classifiers, leaves)]
                result = copied.criterion(*logits, *leaves, labels, step=1, teacher=teacher)
            result.loss.backward()
        gradients = [t.grad for t in (*leaves, *copied.parameters())]
        results.append([result.loss.detach(), *result.terms.values(), *(g for g in gradients if g is not None)])
    for mine, plain in zip(*results, strict=True):
        scale = float(plain.abs().max())
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_is_as_good_as_eager_computation(dtype: torch.dtype) -> None:
    """In relative L2 norm, |ours - float64| <= 2 |eager float32 - float64| + rounding of the dtype."""
    features = [torch.randn(4, 16, 9, 10, 11).to(dtype) for _ in range(2)]
    labels = torch.randint(-1, 2, (2, 9, 10, 11))
    head = sslfast.DualContrastiveHead(2, 16, ramp_steps=1, percentile=60.0, gate=(0, 0))

    def results(computed_in: torch.dtype, name: str) -> list[torch.Tensor]:
        copied = copy.deepcopy(head).to(torch.float64 if computed_in == torch.float64 else torch.float32)
        leaves = [f.to(computed_in, copy=True).requires_grad_() for f in features]
        with backend(name):
            result = copied(*leaves, labels, step=1)
        result.loss.backward()
        classifiers = [
            torch.cat([p.grad.flatten() for p in c.parameters()]) for c in (copied.classifier_a, copied.classifier_b)
        ]
        return [t.double() for t in (result.loss.detach(), *(leaf.grad for leaf in leaves), *classifiers)]

    ours = results(dtype, "auto")
    eager, exact = (results(computed_in, "reference") for computed_in in (torch.float32, torch.float64))
    rounding = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}
    norm = torch.linalg.norm
    for i, (mine, plain, truth) in enumerate(zip(ours, eager, exact)):
        bound = rounding[dtype if i in (1, 2) else torch.float32]
        assert norm(mine - truth) <= 2 * norm(plain - truth) + bound * norm(truth)


def test_thread_counts_give_the_same_bits_of_the_head() -> None:
    features = [torch.randn(4, 16, 33, 21, 40) for _ in range(2)]
    labels = torch.randint(0, 2, (2, 33, 21, 40))
    head = sslfast.DualContrastiveHead(2, 16, gate=(0, 0), ramp_steps=1)

    def gradients() -> list[Tensor]:
        leaves = [f.clone().requires_grad_() for f in features]
        copied = copy.deepcopy(head)
        copied(*leaves, labels, step=1).loss.backward()
        return [t.grad for t in (*leaves, *copied.parameters())]

    assert all(map(torch.equal, *with_threads(gradients, 1, 2)))


def test_no_reliable_or_unlabelled_voxel_gives_finite_gradients() -> None:
    parts = random_parts(3, 8, (4, 5, 6), torch.float32)
    nothing = torch.zeros(2, 4, 5, 6, dtype=torch.uint8)

    results = with_gradients(lambda f, w: list(pseudo_supervised(LinearLogits(f, w), nothing)), *parts[:2])
    assert not any(v.any() for v in results)
    head = sslfast.DualContrastiveHead(3, 8)
    leaves = [p.requires_grad_() for p in parts[::2]]
    head(*leaves, torch.zeros(2, 4, 5, 6, dtype=torch.long)).loss.backward()  # all volumes are labelled
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*leaves, *head.parameters()))


def test_weights_of_any_layout_get_their_gradient() -> None:
    features, weights, flags = torch.randn(2, 5, 4, 5, 6), torch.randn(2, 3, 6), random_flags(2, 3, (4, 5, 6))
    results = []
    for laid_out in (weights, weights.mT.contiguous().mT):
        leaf = laid_out.detach().requires_grad_()
        pseudo_supervised(LinearLogits(features, leaf), flags).ce.backward()
        results.append(leaf.grad)
    assert results[0].any()
    assert torch.equal(*results)


@pytest.mark.parametrize("network", [VNet, ResVNet])
def test_a_networks_linear_logits_are_its_logits(network: type[nn.Module]) -> None:
    model = network(3, width=4, depth=2, dropout=0.3)
    images = torch.randn(2, 1, 8, 8, 8)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(1)
        logits, features = model(images)
        torch.manual_seed(1)
        linear, same = model(images, linear=True)
        assert torch.equal(features, same)
        assert linear.shape == logits.shape
        torch.testing.assert_close(materialize(linear), logits, rtol=1e-5, atol=1e-5)


def test_a_classifier_of_neighbourhoods_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a 1x1x1 convolution"):
        linear_logits(nn.Conv3d(8, 2, 3), torch.zeros(1, 8, 3, 3, 3))


def test_the_head_compiles_to_one_graph() -> None:
    head = sslfast.DualContrastiveHead(2, 8, gate=(0, 0), ramp_steps=1)
    features = [torch.randn(4, 8, 6, 7, 8, requires_grad=True) for _ in range(2)]
    labels = torch.randint(0, 2, (2, 6, 7, 8))
    plain = head(*features, labels, step=1).loss
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")(*features, labels, step=1).loss
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(torch.autograd.grad(compiled, features), torch.autograd.grad(plain, features)):
        torch.testing.assert_close(a, b)
