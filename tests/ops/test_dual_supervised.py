"""The supervised op against sums voxel by voxel, what it must refuse, and the labels that the kernels read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.compare import assert_as_good_as_eager, assert_same, with_gradients
from helpers.maps import clear_threshold, random_map
from helpers.options import TARGET, kernels_and_reference, on_every_backend, some
from sslfast.ops import dual_supervised
from sslfast.ops.backend import backend

SHAPES = [(1, 2, (1, 1, 1)), (2, 3, (5, 7, 3)), (3, 14, (2, 1, 9)), (1, 32, (2, 3, 2))]


def random_case(volumes: int, classes: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (3 * torch.randn(volumes, classes, *size, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(-1, classes, (volumes, *size))
    labels.flatten()[0] = 0  # at least one annotated voxel
    return a, b, labels


def by_hand(
    a: Tensor, b: Tensor, labels: Tensor, threshold: float = 0.6, smooth: float = 1e-5
) -> tuple[list, list, list, int]:
    """The formulas as loops over voxels, on Python numbers."""
    classes = a.shape[1]
    voxels = [
        (i, *v) for i in range(len(a)) for v in torch.ones(a.shape[2:]).nonzero().tolist() if labels[(i, *v)] != -1
    ]
    p = [[logits[(i, slice(None), *v)].softmax(0).tolist() for i, *v in voxels] for logits in (a, b)]
    y = [int(labels[tuple(v)]) for v in voxels]
    ce, dice, discrepancy, confident = [], [], [], []
    for q in p:
        ce.append(-sum(math.log(row[t]) for row, t in zip(q, y)) / len(y))
        terms = []
        for c in range(1, classes):
            overlap = sum(row[c] for row, t in zip(q, y) if t == c)
            size = sum(row[c] ** 2 for row in q) + y.count(c)
            terms.append(1 - (2 * overlap + smooth) / (size + smooth))
        dice.append(sum(terms) / len(terms))
        confident.append([row.index(max(row)) if max(row) >= threshold else 0 for row in q])
    mask = [u != v for u, v in zip(*confident)]
    for q in p:
        total = sum(sum((row[c] - (t == c)) ** 2 for c in range(classes)) / 2 for row, t, m in zip(q, y, mask) if m)
        discrepancy.append(total / (sum(mask) + 1e-16))
    return ce, dice, discrepancy, sum(mask)


@pytest.mark.parametrize(("volumes", "classes", "size"), SHAPES)
def test_losses_are_those_of_the_formulas(volumes: int, classes: int, size: tuple[int, ...]) -> None:
    a, b, labels = random_case(volumes, classes, size)
    result = dual_supervised(a, b, labels)
    ce, dice, discrepancy, mask = by_hand(a, b, labels)
    assert result.ce.tolist() == pytest.approx(ce, rel=1e-10)
    assert result.dice.tolist() == pytest.approx(dice, rel=1e-10)
    assert result.discrepancy.tolist() == pytest.approx(discrepancy, rel=1e-10)
    assert int(result.mask_voxels) == mask


def test_binary_discrepancy_is_the_squared_error_of_the_foreground() -> None:
    a, b, labels = random_case(2, 2, (4, 5, 6))
    labels.clamp_min_(0)
    result = dual_supervised(a, b, labels, threshold=0.0)
    mask = a.argmax(1) ^ b.argmax(1)
    error = (a.softmax(1)[:, 1] - labels).square()
    assert result.discrepancy[0].item() == pytest.approx(((mask * error).sum() / mask.sum()).item(), rel=1e-10)


def test_the_discrepancy_may_be_divided_by_the_labelled_voxels() -> None:
    a, b, labels = random_case(2, 3, (4, 5, 6))
    result, over_mask = dual_supervised(a, b, labels, discrepancy_over="labelled"), dual_supervised(a, b, labels)
    fraction = over_mask.mask_voxels / (labels >= 0).sum()
    assert torch.allclose(result.discrepancy, over_mask.discrepancy * fraction)
    assert torch.equal(result.ce, over_mask.ce)


def test_a_lone_voxel_of_the_mask_weighs_no_more_than_in_the_cross_entropy() -> None:
    """Divided by its mask instead, one voxel outweighed the cross-entropy of thousands, and foreground vanished."""
    labels = torch.zeros(1, 12, 12, 12, dtype=torch.long)
    lone = torch.zeros(1, 2, 12, 12, 12, dtype=torch.float64)
    lone[:, 0] = 3  # background everywhere, but for the first confident foreground of network a, at one voxel
    other, lone[0, :, 4, 5, 6] = lone.clone(), torch.tensor([0.0, 1.0])
    gradients = {}
    for term, over in (("ce", "mask"), ("discrepancy", "mask"), ("discrepancy", "labelled")):
        logits = lone.clone().requires_grad_()
        result = dual_supervised(logits, other, labels, discrepancy_over=over)
        assert result.mask_voxels == 1
        getattr(result, term)[0].backward()
        gradients[term, over] = float(logits.grad[0, :, 4, 5, 6].norm())
    assert gradients["discrepancy", "labelled"] <= 0.5 * gradients["ce", "mask"]
    assert gradients["discrepancy", "mask"] >= 100 * gradients["ce", "mask"]


def test_the_dice_of_each_class_is_the_better_networks() -> None:
    a, b, labels = random_case(1, 4, (4, 5, 6))
    labels[labels == 2] = 1
    found = dual_supervised(a, b, labels).class_dice
    assert (found == -1).tolist() == [True, False, True, False]
    known = (labels >= 0).unsqueeze(1)
    for c in (1, 3):
        of_network = []
        for logits in (a, b):
            p = (logits.softmax(1) * known)[:, c]
            of_network.append(2 * p[labels == c].sum() / (p.square().sum() + (labels == c).sum()))
        assert float(found[c]) == pytest.approx(float(max(of_network)), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_gradients_are_those_of_finite_differences(classes: int, weighted: bool) -> None:
    a, b, labels = random_case(2, classes, (3, 2, 2))
    a.requires_grad_()
    b.requires_grad_()
    weights = torch.rand(2, classes) if weighted else None
    assert torch.autograd.gradcheck(lambda a, b: dual_supervised(a, b, labels, class_weights=weights)[:3], (a, b))


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_the_weighted_cross_entropy_is_that_of_pytorch(classes: int) -> None:
    a, b, labels = random_case(2, classes, (4, 5, 6))
    labels.clamp_max_(max(classes - 2, 1))  # of 3 classes or more, the last one is absent
    weights = torch.rand(2, classes, dtype=torch.float64).requires_grad_()
    ours = with_gradients(lambda a, b: [dual_supervised(a, b, labels, class_weights=weights).ce], a, b)
    theirs = with_gradients(
        lambda a, b: [
            torch.stack([F.cross_entropy(z, labels, w, ignore_index=-1) for z, w in zip((a, b), weights.detach())])
        ],
        *(a, b),
    )
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-15)
    assert weights.grad is None


def test_equal_weights_give_the_mean_cross_entropy_and_change_no_other_term() -> None:
    a, b, labels = random_case(2, 3, (4, 5, 6))
    plain = dual_supervised(a, b, labels)
    for weight in (1.0, 7.0):
        weighted = dual_supervised(a, b, labels, class_weights=torch.full((2, 3), weight))
        assert torch.allclose(weighted.ce, plain.ce, rtol=1e-12)
        for name in ("dice", "discrepancy", "mask_voxels", "class_dice"):
            assert torch.equal(getattr(weighted, name), getattr(plain, name)), name


def test_ignored_voxels_count_in_no_sum() -> None:
    a, b, labels = random_case(1, 3, (4, 4, 4))
    changed_a, changed_b = a.clone(), b.clone()
    ignored = (labels == -1).unsqueeze(1).expand_as(a)
    changed_a[ignored], changed_b[ignored] = 100.0, -50.0
    for before, after in zip(dual_supervised(a, b, labels), dual_supervised(changed_a, changed_b, labels)):
        assert torch.equal(before, after)


def test_another_ignore_index_ignores_the_same_voxels() -> None:
    a, b, labels = random_case(2, 3, (3, 4, 5))
    as_255 = torch.where(labels == -1, 255, labels)
    for before, after in zip(dual_supervised(a, b, labels), dual_supervised(a, b, as_255, ignore_index=255)):
        assert torch.equal(before, after)


def test_no_annotated_voxel_gives_zero_attached_to_the_graph() -> None:
    a, b, labels = random_case(1, 2, (3, 3, 3))
    a.requires_grad_()
    b.requires_grad_()
    result = dual_supervised(a, b, torch.full_like(labels, -1))
    assert result.ce.tolist() == result.dice.tolist() == result.discrepancy.tolist() == [0, 0]
    (result.ce + result.dice + result.discrepancy).sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


def test_agreeing_networks_have_an_empty_mask() -> None:
    a, _, labels = random_case(1, 3, (3, 3, 3))
    a.requires_grad_()
    result = dual_supervised(a, a.detach().clone(), labels)
    assert result.mask_voxels == 0
    assert result.discrepancy.tolist() == [0, 0]
    result.discrepancy.sum().backward()
    assert not a.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b, labels = random_case(2, 4, (6, 5, 7))
    a, b = a.to(dtype), b.to(dtype)
    result, exact = dual_supervised(a, b, labels), dual_supervised(a.double(), b.double(), labels)
    assert result.ce.dtype == torch.float32
    for ours, truth in zip(result[:3], exact[:3]):
        assert torch.allclose(ours.double(), truth, rtol=1e-5)


def test_layouts_give_the_same_losses() -> None:
    a, b, labels = random_case(2, 3, (4, 6, 5))
    expected = dual_supervised(a, b, labels)
    sliced = torch.randn(2, 3, 8, 6, 10, dtype=torch.float64)
    sliced[:, :, ::2, :, ::2] = a
    for other in (a.to(memory_format=torch.channels_last_3d), sliced[:, :, ::2, :, ::2]):
        for ours, truth in zip(dual_supervised(other, b, labels), expected):
            assert torch.allclose(ours, truth, rtol=1e-12)


def test_huge_logits_stay_finite() -> None:
    a, b, labels = random_case(1, 3, (4, 4, 4))
    a, b = (1e4 * a.sign()).float().requires_grad_(), (1e4 * b.sign()).float()
    result = dual_supervised(a, b, labels)
    (result.ce + result.dice + result.discrepancy).sum().backward()
    assert all(torch.isfinite(part).all() for part in result[:3])
    assert torch.isfinite(a.grad).all()


def test_refusals_name_the_argument() -> None:
    a, b, labels = random_case(2, 3, (4, 4, 4))
    wrong = labels.clone()
    wrong[1, 2, 3, 0] = 3
    with pytest.raises(ValueError, match=r"labels holds 1 voxels outside 0..2 .* \(1, 2, 3, 0\) with value 3"):
        dual_supervised(a, b, wrong)
    with pytest.raises(ValueError, match="logits_b has shape"):
        dual_supervised(a, b[:1], labels)
    with pytest.raises(TypeError, match="logits_b has dtype"):
        dual_supervised(a, b.float(), labels)
    with pytest.raises(TypeError, match=r"labels has dtype torch.float64"):
        dual_supervised(a, b, labels.double())
    with pytest.raises(ValueError, match="labels has shape"):
        dual_supervised(a, b, labels[:, :2])
    with pytest.raises(ValueError, match="no volume"):
        dual_supervised(a[:0], b[:0], labels[:0])
    with pytest.raises(ValueError, match="33 classes"):
        dual_supervised(
            torch.zeros(1, 33, 2, 2, 2), torch.zeros(1, 33, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.long)
        )
    with pytest.raises(TypeError, match=r"logits_a has dtype torch\.int64"):
        dual_supervised(a.long(), b, labels)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        dual_supervised(a, b, labels, threshold=1.5)
    with pytest.raises(ValueError, match=r"class_weights has shape \(3,\); .* it must be \(2, 3\)"):
        dual_supervised(a, b, labels, class_weights=torch.ones(3))
    with pytest.raises(TypeError, match=r"class_weights has dtype torch\.int64"):
        dual_supervised(a, b, labels, class_weights=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="class_weights is on meta"):
        dual_supervised(a, b, labels, class_weights=torch.ones(2, 3, device="meta"))


# The kernels


def labels_of(classes: int, size: tuple[int, ...]) -> Tensor:
    return torch.randint(-1, classes, (2, *size))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_dtype_give_the_same(dtype: torch.dtype) -> None:
    a, b = random_map(2, 3, (5, 6, 7)), random_map(2, 3, (5, 6, 7))
    labels = torch.randint(0, 3, (2, 5, 6, 7))
    expected = dual_supervised(a, b, labels, ignore_index=1)
    result = dual_supervised(a, b, labels.to(dtype), ignore_index=1)
    assert_same(result, expected, "labels' dtype")


@on_every_backend
@pytest.mark.parametrize(
    ("value", "dtype"), [(3, torch.int64), (-2, torch.int16), (255, torch.uint8), (-128, torch.int8)]
)
def test_a_label_out_of_range_raises_or_makes_the_loss_of_a_gpu_nan(value: int, dtype: torch.dtype) -> None:
    size = (9, 10, 11) if TARGET.interpreted else (13, 31, 29)  # several chunks
    a, b = random_map(2, 3, size), random_map(2, 3, size)
    labels = torch.zeros(2, *size, dtype=dtype)
    labels[0, 2, 3, 4:6] = labels[0, -1, -1, -1] = labels[1, 0, 0, 0] = labels[1, -1, -1, -1] = value
    if TARGET.device == "cuda":  # the kernels count it, and nobody waits for them to say so
        assert dual_supervised(a, b, labels).ce.isnan().all()
        return
    messages = []
    for name in (TARGET.backend, "reference"):
        with backend(name), pytest.raises(ValueError, match="labels holds 5 voxels") as error:
            dual_supervised(a, b, labels)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "(0, 2, 3, 4)" in messages[0]
    assert f"value {value}" in messages[0]


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("ignore", [-1, 1, 255, 2**40])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_only_the_ignored_label_may_be_out_of_range(name: str, dtype: torch.dtype, ignore: int) -> None:
    a, b = random_map(1, 3, (1, 2, 3)), random_map(1, 3, (1, 2, 3))
    limits = torch.iinfo(dtype)
    for value in {3, -2, 255, 2**32 + 1, limits.min, limits.max} - {0, ignore}:  # 0: the least of uint8
        if not limits.min <= value <= limits.max:
            continue
        labels = torch.zeros(1, 1, 2, 3, dtype=dtype)
        labels[0, 0, 1, 2] = value
        with backend(name):
            if TARGET.device == "cuda":
                assert dual_supervised(a, b, labels, ignore_index=ignore).ce.isnan().all()
                continue
            with pytest.raises(ValueError, match=rf"labels holds 1 voxel.*value {value}\b"):
                dual_supervised(a, b, labels, ignore_index=ignore)
    if limits.min <= ignore <= limits.max:
        labels = torch.full((1, 1, 2, 3), ignore, dtype=dtype)
        with backend(name):
            assert not dual_supervised(a, b, labels, ignore_index=ignore).ce.any()


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("classes", [2, 3])
def test_a_probability_of_exactly_the_threshold_is_confident(name: str, classes: int) -> None:
    background, foreground = torch.zeros(1, classes, 2, 3, 5), torch.zeros(1, classes, 2, 3, 5)
    background[:, 0] = foreground[:, 1] = 1000  # a probability of 1
    labels = torch.zeros(1, 2, 3, 5, dtype=torch.long)
    with backend(name):
        assert dual_supervised(background, foreground, labels, threshold=1.0).mask_voxels == 30


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", some([3, 2, 14, 32], 3))
def test_the_weighted_losses_and_their_gradients_are_as_good_as_eager_ones(classes: int, dtype: torch.dtype) -> None:
    size = (5, 6, 7)
    a, b, labels = random_map(2, classes, size, dtype), random_map(2, classes, size, dtype), labels_of(classes, size)
    weights, threshold = torch.rand(2, classes), clear_threshold(a, b)
    assert_as_good_as_eager(
        lambda a, b: list(dual_supervised(a, b, labels, threshold=threshold, class_weights=weights)), a, b
    )


@on_every_backend
@pytest.mark.parametrize("absent", [0, 2])
def test_the_weight_of_an_absent_class_changes_nothing(absent: int) -> None:
    a, b, labels = random_map(2, 3, (5, 6, 7)), random_map(2, 3, (5, 6, 7)), labels_of(3, (5, 6, 7))
    labels[labels == absent] = 1
    others = torch.rand(2, 3)

    def with_weight(weight: float) -> list[Tensor]:
        weights = others.index_fill(1, torch.tensor([absent]), weight)
        return with_gradients(lambda a, b: [dual_supervised(a, b, labels, class_weights=weights).ce], a, b)

    results = [with_weight(weight) for weight in (0.0, 0.5, 1e4)]
    for result in results[1:]:
        for mine, other in zip(result, results[0]):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)


@on_every_backend
def test_no_weighted_voxel_gives_zero_and_zero_gradients() -> None:
    a, b, labels = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6)), labels_of(3, (4, 5, 6))
    nothing, only_last = torch.full_like(labels, -1), torch.tensor([[0.0, 0, 1], [0, 0, 1]])
    for y, weights in ((nothing, torch.rand(2, 3)), (labels.clamp_max(1), only_last), (labels, torch.zeros(2, 3))):
        for value in with_gradients(lambda a, b, y=y, w=weights: [dual_supervised(a, b, y, class_weights=w).ce], a, b):
            assert not value.any()


@on_every_backend
def test_the_weighted_losses_compile_to_one_graph() -> None:
    a, b, labels = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6)), labels_of(3, (4, 5, 6))
    weights = torch.rand(2, 3)

    def losses(a: Tensor, b: Tensor) -> list[Tensor]:
        return list(dual_supervised(a, b, labels, class_weights=weights))

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(with_gradients(compiled, a, b), with_gradients(losses, a, b)):
        torch.testing.assert_close(ours, plain)
