"""What two networks teach each other: the consistency ops against plain formulas, and their kernels against the references."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_backends import (
    BACKEND,
    DTYPES,
    SIZES,
    assert_as_good_as_eager,
    assert_same,
    fused,  # noqa: F401
    layouts,
    random_map,
    recorded_ops,
    some,
    with_gradients,
)
from torch import Tensor

from sslfast.ops import masked_consistency, rectified_consistency
from sslfast.ops.backend import backend, kernels
from sslfast.ops.state import SURE_A, SURE_B


def random_state(volumes: int, size: tuple[int, ...]) -> Tensor:
    """Each network sure of 60 % of the voxels; the other bits hold anything."""
    sure = [bit * (torch.rand(volumes, *size) < 0.6) for bit in (SURE_A, SURE_B)]
    return (sure[0] + sure[1] + torch.randint(64, (volumes, *size))).to(torch.uint8)


def rectified(state: Tensor) -> Callable[..., list[Tensor]]:
    return lambda a, b: list(rectified_consistency(a, b, state))


def masked(teacher: Tensor, temperature: float = 1.0, max_entropy: float = math.inf) -> Callable[..., list[Tensor]]:
    def compute(student: Tensor) -> list[Tensor]:
        own = teacher.to(student.dtype)
        return list(masked_consistency(student, own, temperature=temperature, max_entropy=max_entropy))

    return compute


def product_terms(own: Tensor, other: Tensor) -> Tensor:
    """How large the terms are that cancel in the gradient of Dice between the networks: p (G - sum p G) with G of -2 q / S and 2 D p / S."""
    p, q = own.double().softmax(1), other.double().softmax(1)
    total = (p.square() + q.square()).sum((0, *range(2, p.ndim)), keepdim=True)
    by_p = (2 * (p + q) / (total + 1e-5) / (p.shape[1] - 1))[:, 1:]
    return p * ((p[:, 1:] * by_p).sum(1, keepdim=True) + by_p.amax(1, keepdim=True))


def limit_between(teacher: Tensor) -> float:
    """An entropy that no voxel's is close to, so that rounding decides nothing."""
    q = teacher.double().softmax(1)
    entropy = torch.where(q > 0, -q * q.log(), 0).sum(1).flatten().sort().values
    gap = int(entropy.diff().argmax()) if len(entropy) > 1 else 0
    return float(entropy[gap : gap + 2].mean()) + (1e-3 if len(entropy) == 1 else 0.0)


@pytest.mark.parametrize("classes", some([2, 14, 3, 32], 2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_are_as_good_as_eager(classes: int, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    a, b = random_map(2, classes, size, dtype), random_map(2, classes, size, dtype)
    largest = float(max(a.abs().max(), b.abs().max())) / max(math.prod(size), 1)
    terms = [largest + product_terms(own, other) for own, other in ((a, b), (b, a))]
    assert_as_good_as_eager(rectified(random_state(2, size)), a, b, terms=terms)
    for temperature, limit in ((0.5, math.inf), (1.0, limit_between(b))):
        voxels = masked_consistency(a, b, temperature=temperature, max_entropy=limit).certain_voxels
        assert_as_good_as_eager(masked(b, temperature, limit), a, terms=[1 / voxels.clamp_min(1)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same_bits(dtype: torch.dtype) -> None:
    size = (9, 10, 11)
    a, b = random_map(3, 4, size, dtype), random_map(3, 4, size, dtype)
    state = random_state(3, size)
    plain = with_gradients(rectified(state), a, b) + with_gradients(masked(b, 0.3, 1.0), a)
    for name in layouts(a):
        x, y = layouts(a)[name], layouts(b)[name]
        other = with_gradients(rectified(state), x, y) + with_gradients(masked(y, 0.3, 1.0), x)
        assert_same(other, plain, name)


def test_runs_and_threads_give_the_same_bits() -> None:
    a, b = random_map(2, 3, (33, 20, 40)), random_map(2, 3, (33, 20, 40))
    state = random_state(2, (33, 20, 40))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(rectified(state), a, b) + with_gradients(masked(b, 1.0, 0.7), a))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_gradients_overwrite_whatever_their_memory_held() -> None:
    a, b = random_map(2, 3, (7, 9, 5)), random_map(2, 3, (7, 9, 5))
    state = random_state(2, (7, 9, 5))
    nan = [torch.full_like(a, float("nan")) for _ in range(3)]
    _, voxels, products = kernels(a).rectified_consistency(a, b, state, 1e-5)
    kernels(a).rectified_consistency_backward(torch.ones(4), a, b, state, voxels, products, 1e-5, nan[0], nan[1])
    _, certain = kernels(a).masked_consistency(a, b, 1.0, 0.5)
    kernels(a).masked_consistency_backward(torch.ones(()), a, b, certain, 1.0, 0.5, nan[2])
    assert all(torch.isfinite(t).all() for t in nan)


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_rectified_by_hand(name: str) -> None:
    a, b = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6))
    state = random_state(2, (4, 5, 6))
    with backend(name):
        found = rectified_consistency(a, b, state)
    for n, (student, teacher, sure) in enumerate(((a, b, SURE_B), (b, a, SURE_A))):
        rows, targets = (t.movedim(1, -1)[(state & sure) > 0] for t in (student, teacher))
        kl = F.kl_div(rows.log_softmax(1), targets.log_softmax(1), reduction="none", log_target=True).sum(1)
        ce = F.cross_entropy(rows, targets.argmax(1), reduction="none")
        assert float(found.rectified[n]) == pytest.approx(float(((-kl).exp() * ce + kl).mean()), rel=1e-5)
        assert int(found.voxels[n]) == len(rows)
    assert int(found.voxels[2]) == state.numel()
    p, q = (t.softmax(1).movedim(1, -1).reshape(-1, 3) for t in (a, b))
    cosine = 1 - (p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1))
    assert float(found.cosine) == pytest.approx(float(cosine.mean()), rel=1e-5)
    dice = 2 * (p * q).sum(0) / (p.square().sum(0) + q.square().sum(0))
    assert float(found.dice) == pytest.approx(1 - float(dice[1:].mean()), rel=1e-4)


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_masked_by_hand(name: str) -> None:
    student, teacher = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6))
    limit = limit_between(teacher)
    with backend(name):
        everywhere = masked_consistency(student, teacher)
        sharp = masked_consistency(student, teacher, temperature=0.1)
        certain = masked_consistency(student, teacher, max_entropy=limit)
    p, q = student.softmax(1), teacher.softmax(1)
    assert float(everywhere.loss) == pytest.approx(float(F.mse_loss(p, q)), rel=1e-5)
    powers = q**10
    assert float(sharp.loss) == pytest.approx(float(F.mse_loss(p, powers / powers.sum(1, keepdim=True))), rel=1e-4)
    kept = torch.distributions.Categorical(q.movedim(1, -1)).entropy() < limit
    assert int(certain.certain_voxels) == kept.count_nonzero()
    assert float(certain.loss) == pytest.approx(float((p - q).square().mean(1)[kept].mean()), rel=1e-5)


def test_gradcheck() -> None:
    a, b = (2 * torch.randn(2, 3, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    state = random_state(2, (3, 2, 2))
    a.requires_grad_()
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda a: rectified_consistency(a, b, state).rectified[0], (a,))
        assert torch.autograd.gradcheck(lambda a: masked_consistency(a, b, temperature=0.5, max_entropy=0.9).loss, (a,))
        b.requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: rectified_consistency(a, b, state)[1:3], (a, b))


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_no_voxel_gives_zero_attached(name: str) -> None:
    with backend(name):
        for volumes in (0, 2):
            a, b = (torch.randn(volumes, 2, 3, 3, 3, requires_grad=True) for _ in range(2))
            state = torch.zeros(volumes, 3, 3, 3, dtype=torch.uint8)
            found = rectified_consistency(a, b, state)
            assert found.rectified.tolist() == [0, 0]
            assert volumes or found.cosine.item() == found.dice.item() == 0
            nobody = masked_consistency(a, b, max_entropy=0.0)
            assert nobody.loss.item() == 0
            (found.rectified.sum() + nobody.loss).backward()
            assert not a.grad.any()
            assert b.grad is None or not b.grad.any()


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_huge_logits_stay_finite_and_nan_is_heard(name: str) -> None:
    a, b = (1e4 * torch.randn(2, 3, 4, 5, 6).sign() for _ in range(2))
    state = random_state(2, (4, 5, 6))
    with backend(name):
        found = with_gradients(rectified(state), a, b) + with_gradients(masked(b, 0.1, 0.5), a)
        assert all(torch.isfinite(t).all() for t in found)
        a[0, 0, 0, 0, 0] = float("nan")
        assert masked_consistency(a, b).loss.isnan()
        assert masked_consistency(b, a, max_entropy=0.5).loss.isnan()
        assert rectified_consistency(a, b, state).cosine.isnan()
        assert rectified_consistency(a, b, state).dice.isnan()


def test_the_teacher_learns_nothing() -> None:
    a, b = (random_map(1, 2, (3, 4, 5)).requires_grad_() for _ in range(2))
    masked_consistency(a, b).loss.backward()
    assert b.grad is None
    assert a.grad is not None


def test_compiles_to_one_graph() -> None:
    a, b = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6))
    state = random_state(2, (4, 5, 6))

    def losses(a: Tensor, b: Tensor) -> list[Tensor]:
        found = rectified_consistency(a, b, state)
        return [found.rectified.sum() + found.dice + masked_consistency(a, b).loss]

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(with_gradients(compiled, a, b), with_gradients(losses, a, b)):
        torch.testing.assert_close(ours, plain)


def test_opcheck() -> None:
    a, b = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6))
    state = random_state(2, (4, 5, 6))
    with recorded_ops() as calls:
        with_gradients(rectified(state), a, b)
        with_gradients(masked(b, 0.5, 1.0), a)
    assert len(calls) == 4
    for name, arguments in calls:
        packet = getattr(kernels(a), name.split("::")[1])
        torch.library.opcheck(packet.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals_name_the_argument() -> None:
    a, b = random_map(1, 2, (3, 4, 5)), random_map(1, 2, (3, 4, 5))
    state = random_state(1, (3, 4, 5))
    with pytest.raises(TypeError, match=r"state has dtype torch\.int64"):
        rectified_consistency(a, b, state.long())
    with pytest.raises(ValueError, match="teacher has shape"):
        masked_consistency(a, b[:, :, 1:])
    with pytest.raises(ValueError, match="temperature is 0"):
        masked_consistency(a, b, temperature=0)
