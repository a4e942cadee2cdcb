"""InfoNCE against the formula written out anchor by anchor, and the kernels against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import Compute, assert_as_good_as_eager, with_gradients
from helpers.options import kernels_and_reference, on_every_backend
from sslfast.ops import voxel_infonce
from sslfast.ops.backend import backend
from sslfast.ops.voxel_infonce import prefers_dense


def random_case(classes: int = 3, capacity: int = 5, width: int = 6, negatives: int = 7):
    anchors = torch.randn(classes, capacity, width, dtype=torch.float64)
    prototypes = torch.randn(classes, width, dtype=torch.float64)
    keys = torch.randn(classes, negatives, width, dtype=torch.float64)
    anchor_counts = torch.randint(1, capacity + 1, (classes,))
    negative_counts = torch.randint(0, negatives + 1, (classes,))
    return anchors, anchor_counts, prototypes, torch.ones(classes, dtype=torch.long), keys, negative_counts


def by_hand(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts, temperature):
    g, m, n = (F.normalize(t, dim=-1) for t in (anchors, prototypes, negatives))
    losses = []
    for c in range(len(g)):
        for i in range(int(anchor_counts[c])):
            if prototype_counts[c] == 0:
                continue
            to = [float(g[c, i] @ m[k]) / temperature for k in range(len(m)) if prototype_counts[k] > 0]
            to += [float(g[c, i] @ n[c, j]) / temperature for j in range(int(negative_counts[c]))]
            losses.append(math.log(sum(map(math.exp, to))) - float(g[c, i] @ m[c]) / temperature)
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize(
    ("classes", "capacity", "width", "negatives"), [(2, 1, 1, 0), (2, 9, 16, 33), (4, 3, 5, 1), (14, 2, 3, 4)]
)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_is_that_of_the_formula(
    classes: int, capacity: int, width: int, negatives: int, temperature: float
) -> None:
    case = random_case(classes, capacity, width, negatives)
    assert voxel_infonce(*case, temperature=temperature).loss.item() == pytest.approx(
        by_hand(*case, temperature), rel=1e-10
    )


def test_a_class_without_prototype_has_no_anchors_and_is_no_key() -> None:
    case = list(random_case())
    case[3] = torch.tensor([4, 0, 2])
    result = voxel_infonce(*case)
    assert result.loss.item() == pytest.approx(by_hand(*case, 0.1), rel=1e-10)
    assert result.anchors == case[1][0] + case[1][2]


def test_without_negatives_it_is_a_softmax_over_the_prototypes() -> None:
    anchors, counts, prototypes, members, negatives, _ = random_case()
    counts.fill_(anchors.shape[1])
    loss = voxel_infonce(anchors, counts, prototypes, members, negatives[:, :0], torch.zeros(3, dtype=torch.long)).loss
    logits = F.normalize(anchors, dim=-1) @ F.normalize(prototypes, dim=-1).T / 0.1
    expected = F.cross_entropy(logits.flatten(0, 1), torch.arange(3).repeat_interleave(anchors.shape[1]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


def test_places_beyond_the_counts_do_not_matter() -> None:
    case = random_case()
    expected = voxel_infonce(*case).loss
    anchors, counts, prototypes, members, negatives, negative_counts = case
    for c in range(3):
        anchors[c, counts[c] :] = float("nan")
        negatives[c, negative_counts[c] :] = float("inf")
    assert torch.equal(voxel_infonce(anchors, counts, prototypes, members, negatives, negative_counts).loss, expected)


def test_only_anchors_have_a_gradient() -> None:
    anchors, counts, prototypes, members, negatives, negative_counts = random_case()
    for keys in (prototypes, negatives):
        keys.requires_grad_()
    anchors.requires_grad_()
    voxel_infonce(anchors, counts, prototypes, members, negatives, negative_counts).loss.backward()
    assert anchors.grad.any()
    assert prototypes.grad is negatives.grad is None
    assert torch.autograd.gradcheck(
        lambda a: voxel_infonce(a, counts, prototypes, members, negatives, negative_counts).loss, (anchors,)
    )


@pytest.mark.parametrize("empty", ["anchors", "prototypes"])
def test_an_empty_set_gives_zero_attached_to_the_graph(empty: str) -> None:
    anchors, counts, prototypes, members, negatives, negative_counts = random_case()
    (counts if empty == "anchors" else members).zero_()
    result = voxel_infonce(anchors.requires_grad_(), counts, prototypes, members, negatives, negative_counts)
    assert result.loss == result.anchors == 0
    result.loss.backward()
    assert not anchors.grad.any()


def test_zero_anchors_keep_a_finite_gradient() -> None:
    anchors, counts, *rest = random_case()
    anchors[0] = 0
    anchors.requires_grad_()
    voxel_infonce(anchors, counts, *rest).loss.backward()
    assert torch.isfinite(anchors.grad).all()


def test_no_room_for_anchors_gives_zero() -> None:
    anchors, counts, *rest = random_case()
    loss = voxel_infonce(anchors[:, :0].requires_grad_(), counts * 0, *rest).loss
    assert loss == 0
    loss.backward()


def test_refusals_name_the_argument() -> None:
    anchors, counts, prototypes, members, negatives, negative_counts = random_case()
    with pytest.raises(ValueError, match="prototypes has shape"):
        voxel_infonce(anchors, counts, prototypes[:2], members, negatives, negative_counts)
    with pytest.raises(ValueError, match="negatives has shape"):
        voxel_infonce(anchors, counts, prototypes, members, negatives[..., :2], negative_counts)
    with pytest.raises(ValueError, match="temperature is 0"):
        voxel_infonce(anchors, counts, prototypes, members, negatives, negative_counts, temperature=0)
    with pytest.raises(ValueError, match="anchors has shape"):
        voxel_infonce(anchors[0], counts, prototypes, members, negatives, negative_counts)


def test_dense_products_are_for_many_wide_rows_on_a_gpu() -> None:
    assert prefers_dense("cuda", 14 * 4096, 4096 + 14, 128)
    assert not prefers_dense("cpu", 14 * 4096, 4096 + 14, 128)
    assert not prefers_dense("cuda", 2 * 256, 512 + 2, 256)  # few
    assert not prefers_dense("cuda", 14 * 4096, 4096 + 14, 16)  # narrow
    assert not prefers_dense("cuda", 14 * 65536, 65536, 128)  # the similarities would take 240 GB


# The kernels


def infonce(keys: Sequence[Tensor], temperature: float = 0.1) -> Compute:
    """Loss and number of anchors, of the anchors; `keys` is everything else."""

    def compute(anchors: Tensor) -> list[Tensor]:
        same = [k.to(anchors.dtype) if k.is_floating_point() else k for k in keys]
        return list(voxel_infonce(anchors, *same, temperature=temperature))

    return compute


@on_every_backend
@pytest.mark.parametrize(
    ("classes", "capacity", "width", "negatives"),
    [(2, 1, 2, 0), (2, 40, 16, 100), (4, 7, 19, 1), (14, 5, 3, 17), (2, 5, 1, 7)],
)
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_loss_and_gradient_are_as_good_as_eager_ones(
    classes: int, capacity: int, width: int, negatives: int, temperature: float
) -> None:
    counts = [torch.randint(0, n + 1, (classes,)) for n in (capacity, 3, negatives)]
    prototypes, rows = torch.randn(classes, width), torch.randn(classes, negatives, width)
    anchors = torch.randn(classes, capacity, width)
    each = float(counts[0].clamp_min(1).min())  # the mean over a class's anchors
    term = 1 / (temperature * each * anchors.double().norm(dim=-1, keepdim=True))  # 1 / |f| rounds what must cancel
    keys = counts[0], prototypes, counts[1], rows, counts[2]
    assert_as_good_as_eager(infonce(keys, temperature), anchors, terms=[term])


@on_every_backend
def test_zero_vectors_have_no_direction() -> None:
    counts = torch.tensor([3, 3]), torch.tensor([1, 1]), torch.tensor([5, 5])
    compute = infonce((counts[0], torch.randn(2, 4), counts[1], torch.zeros(2, 5, 4), counts[2]))
    assert_as_good_as_eager(compute, torch.zeros(2, 3, 4))


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("length", [2e-12, 1e-9, 1e-6])
def test_short_vectors_have_the_direction_of_long_ones(name: str, length: float) -> None:
    counts = torch.tensor([3, 3]), torch.tensor([1, 1]), torch.tensor([5, 5])
    anchors, prototypes, negatives = (F.normalize(torch.randn(2, n, 4), dim=-1) for n in (3, 1, 5))
    results = []
    for scale in (1, length):
        keys = counts[0], scale * prototypes[:, 0], counts[1], scale * negatives, counts[2]
        with backend(name):
            loss, _, gradient = with_gradients(infonce(keys), scale * anchors)
        results.append((loss, scale * gradient))
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
