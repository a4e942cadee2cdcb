"""Every method's step: unlabelled volumes teach, backends agree, absent classes and empty sets do no harm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_method
from torch import Tensor, nn

import sslfast
from sslfast.methods import METHODS, find_method
from sslfast.methods.as_released import as_released_loss
from sslfast.methods.bcp import BCP, box, largest_components
from sslfast.methods.mean_teacher import MeanTeacher
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.methods.u2pl import U2PL, Memory
from sslfast.methods.ua_mt import UAMT

LEARNING = [name for name in METHODS if find_method(name).uses_unlabelled and name != "as-released"]
SIZE = (6, 7, 8)


class Given(nn.Module):
    """A network whose outputs are given."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(2 * torch.randn(4, classes, *SIZE))
        self.features = nn.Parameter(torch.randn(4, 5, *SIZE))
        self.classifier = nn.Conv3d(5, classes, 1)  # in name only

    def forward(self, images: Tensor, linear: bool = False) -> tuple[Tensor, Tensor]:
        return self.logits[: len(images)], self.features[: len(images)]


def step(
    name: str, classes: int, labels: Tensor, networks: list[Given], images: int = 4, **options: Any
) -> sslfast.DualLoss:
    method = make_method(name, classes, 10, 1, **{"percentile": (50, 50), **options})
    method.prepare(Given(classes), Given(classes))  # teachers that know something else
    return method.step(*networks, torch.zeros(images, 1, *SIZE), labels, step=10)


@pytest.mark.parametrize("classes", [2, 4, 14])
@pytest.mark.parametrize("name", LEARNING)
def test_unlabelled_volumes_teach(name: str, classes: int) -> None:
    networks = [Given(classes), Given(classes)]
    result = step(name, classes, torch.randint(0, classes, (2, *SIZE)), networks)
    result.loss.backward()
    grads = [network.logits.grad for network in networks]
    assert all(torch.isfinite(g).all() and g[:2].any() for g in grads)
    assert any(g[2:].any() for g in grads) or (name == "bcp" and all(result.terms["pseudo"] > 0))  # it mixes the two
    assert all(torch.isfinite(value).all() and not value.requires_grad for value in result.terms.values())


@pytest.mark.parametrize("name", [*METHODS])
def test_the_fused_backend_gives_what_the_reference_gives(name: str) -> None:
    networks = [Given(3), Given(3)]
    labels = torch.randint(-1, 3, (2, *SIZE))
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(7)
        with sslfast.backend(backend):
            loss = step(name, 3, labels, networks).loss
            leaves = [networks[0].logits, networks[1].logits]
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*METHODS])
def test_absent_classes_and_batches_without_unlabelled_volumes(name: str) -> None:
    networks = [Given(4), Given(4)]
    for labels, images in ((torch.zeros(2, *SIZE, dtype=torch.int64), 4), (torch.randint(0, 4, (4, *SIZE)), 4)):
        result = step(name, 4, labels, networks, images)
        result.loss.backward()
        assert math.isfinite(float(result.loss.detach()))
        assert all(torch.isfinite(network.logits.grad).all() for network in networks)


def test_without_views_ssl_contrastive_is_dual_networks_and_dice_between_the_networks() -> None:
    networks, labels = [Given(4), Given(4)], torch.randint(0, 4, (2, *SIZE))
    weights = {
        "pseudo_weight": 0.5,
        "pseudo_dice_weight": 0.3,
        "discrepancy_weight": 0.0,
    }  # whose normaliser differs too
    with_dice = step("ssl-contrastive", 4, labels, networks, **weights, views=False)
    without = step("dual-networks", 4, labels, networks, **weights)  # which has no views
    p, q = (network.logits[2:].softmax(1).transpose(0, 1).flatten(1) for network in networks)
    dice = 2 * (p * q).sum(1) / (p.square() + q.square()).sum(1)
    assert float((with_dice.loss - without.loss).detach()) == pytest.approx(
        0.3 * (1 - float(dice[1:].mean().detach())), rel=1e-4
    )


class Noted(Given):
    """Notes what it is shown."""

    def forward(self, images: Tensor, linear: bool = False) -> tuple[Tensor, Tensor]:
        self.shown = [*getattr(self, "shown", []), (images.detach().clone(), self.training, torch.is_grad_enabled())]
        return super().forward(images)


def test_ssl_contrastive_teaches_a_view_by_the_volume_seen_straight() -> None:
    networks = [Noted(2), Noted(2)]
    method = SSLContrastive(2, 10, 1, SSLContrastive.Options())
    images = torch.randn(4, 1, *SIZE)
    result = method.step(*networks, images, torch.randint(2, (2, *SIZE)), step=10)
    for network in networks:
        (straight, *_), (batch, *_) = network.shown
        assert [modes for _, *modes in network.shown] == [[False, False], [True, True]]
        assert torch.equal(straight, images[2:])
        assert torch.equal(batch[:2], images[:2])
        assert torch.equal(batch, networks[0].shown[1][0])
        assert not torch.allclose(batch[2:], images[2:])
    assert float(result.terms["kept_fraction"]) == pytest.approx(0.2, abs=0.01)


def test_cps_is_the_cross_entropy_against_the_other_network() -> None:
    networks = [Given(3), Given(3)]
    result = step("cps", 3, torch.zeros(2, *SIZE, dtype=torch.int64), networks)
    a, b = (network.logits.detach()[2:] for network in networks)
    expected = [nn.functional.cross_entropy(a, b.argmax(1)), nn.functional.cross_entropy(b, a.argmax(1))]
    assert result.terms["pseudo"].tolist() == pytest.approx([float(e) for e in expected], rel=1e-5)


def test_mcf_teaches_the_loser_only() -> None:
    networks = [Given(2), Given(2)]
    result = step("mcf", 2, torch.randint(0, 2, (2, *SIZE)), networks)
    result.loss.backward()
    winner = int(result.terms["winner"])
    assert not networks[winner].logits.grad[2:].any()
    assert networks[1 - winner].logits.grad[2:].any()


def test_teachers_are_the_average_of_the_students_and_nobody_trains_them() -> None:
    students = Given(2), Given(2)
    method = MeanTeacher(2, 10, 1, MeanTeacher.Options())
    method.prepare(*students)
    before = [p.clone() for p in students[0].parameters()]
    with torch.no_grad():
        for p in students[0].parameters():
            p += 1
    method.step(*students, torch.zeros(4, 1, *SIZE), torch.zeros(2, *SIZE, dtype=torch.int64), step=1).loss.backward()
    for average, old in zip(method.teachers[0].parameters(), before):
        torch.testing.assert_close(average, old + 0.5)  # the second step: half of each
        assert average.grad is None


def test_uncertain_voxels_of_the_teacher_teach_nothing() -> None:
    method = UAMT(2, 10**7, 1, UAMT.Options())
    students = Given(2), Given(2)
    method.prepare(Given(2), Given(2))
    with torch.no_grad():
        for teacher in method.teachers:
            teacher.logits.zero_()
            teacher.logits[:, 0, 0] = 9
    labels = torch.full((2, *SIZE), -1)
    method.step(*students, torch.zeros(4, 1, *SIZE), labels, step=1000).loss.backward()  # 1 % of the students
    for student in students:
        assert student.logits.grad[2:, :, 0].all()
        assert not student.logits.grad[2:, :, 1:].any()


def test_the_memory_keeps_the_newest_negatives() -> None:
    memory = Memory(2, 3, 30_000)
    assert not memory.draw(4)[1].any()
    rows = torch.arange(512.0).view(-1, 1).expand(-1, 3)
    for i in range(100):
        memory.add(1, rows + 512 * i, torch.tensor(400))
    assert memory.written.tolist() == [0, 40_000]
    held = memory.rows[1, :30_000, 0]
    kept = torch.cat([rows[:400, 0] + 512 * i for i in range(25, 100)])
    assert torch.equal(held.sort().values, kept)
    drawn, filled = memory.draw(4)
    assert filled.tolist() == [False, True]
    assert drawn.shape == (2, 4, 50, 3)
    assert torch.isin(drawn[1, ..., 0], kept).all()


def test_no_memory_keeps_the_negatives_of_the_step_alone() -> None:
    memory = Memory(2, 3, 0)
    for i, count in enumerate((100, 50)):
        memory.add(1, torch.full((512, 3), float(i)), torch.tensor(count))
    drawn, _ = memory.draw(4)
    assert (drawn[1] == 1).all()


def test_u2pl_pulls_anchors_to_their_class_and_from_the_memory() -> None:
    method = U2PL(2, 10, 1, U2PL.Options())
    networks = [Given(2), Given(2)]
    method.prepare(*networks)
    labels = torch.randint(0, 2, (2, *SIZE))
    images = torch.zeros(4, 1, *SIZE)
    for step in range(2):
        result = method.step(*networks, images, labels, step)
    assert all(result.terms["contrast"] > 0)
    assert all(int(written) > 0 for memory in method.memories for written in memory.written)
    result.loss.backward()
    for network in networks:
        assert network.features.grad.isfinite().all()
        assert network.features.grad[:2].any()
        assert network.features.grad[2:].any()


def test_bcp_mixes_within_a_box_and_keeps_the_largest_component() -> None:
    inside = box(torch.Size((9, 12, 6)), torch.device("cpu"))
    assert int(inside.sum()) == 6 * 8 * 4
    classes = np.zeros((8, 8, 8), np.int64)
    classes[:3, :3, :3], classes[6, 6, 6], classes[5:8, :2, :2] = 1, 1, 2
    kept = largest_components(classes)
    assert kept[6, 6, 6] == 0
    classes[6, 6, 6] = 0
    assert np.array_equal(kept, classes)


class Mixed(Given):
    """Remembers what it was shown."""

    def forward(self, images: Tensor, linear: bool = False) -> tuple[Tensor, Tensor]:
        self.shown = images
        return super().forward(images)


def test_bcp_teaches_labels_on_labelled_voxels_and_guesses_elsewhere() -> None:
    networks = [Mixed(2), Mixed(2)]
    method = BCP(2, 10, 1, BCP.Options())
    method.prepare(Given(2), Given(2))
    images = torch.cat((torch.ones(2, 1, *SIZE), -torch.ones(2, 1, *SIZE)))
    labels = torch.zeros(2, *SIZE, dtype=torch.int64)
    result = method.step(*networks, images, labels, step=5)
    known = networks[0].shown[:, 0] > 0
    assert {int(k.sum()) for k in known} == {4 * 5 * 5, 6 * 7 * 8 - 4 * 5 * 5}
    result.loss.backward()
    logits = networks[0].logits.detach()[:2]
    ce = nn.functional.cross_entropy(logits, torch.where(known, 0, -1), ignore_index=-1)
    assert 0 < float(ce) / 2 < float(result.terms["ce"][0])  # and half of Dice's
    before = method.step(*networks, images, labels, step=0)  # labelled crops alone
    assert not before.terms["pseudo"].any()
    assert (networks[0].shown > 0).all()


@pytest.mark.parametrize("gap", [3, 30, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_released_is_finite_and_unlabelled_voxels_give_no_gradient(dtype: torch.dtype, gap: float) -> None:
    logits = [(gap * nn.functional.one_hot(torch.randint(0, 3, (4, *SIZE)), 3)).movedim(-1, 1) for _ in range(2)]
    maps = [z + torch.rand(4, 3, *SIZE) for z in logits] + [torch.randn(4, 5, *SIZE) for _ in range(2)]
    leaves = [m.to(dtype).requires_grad_() for m in maps]
    result = as_released_loss(*leaves, torch.randint(-1, 3, (2, *SIZE)), 10, ramp_steps=10)
    assert result.loss.isfinite()
    assert all(value.isfinite().all() and not value.requires_grad for value in result.terms.values())
    result.loss.backward()
    for leaf in leaves[:2]:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:2].any()
        assert not leaf.grad[2:].any()
    assert all(leaf.grad is None for leaf in leaves[2:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("volume", [0, 3])
def test_as_released_gives_nan_for_bad_logits(bad: float, volume: int) -> None:
    maps = [torch.randn(4, channels, *SIZE) for channels in (3, 3, 5, 5)]
    maps[0][volume, 1, 2, 3, 4] = bad
    assert as_released_loss(*maps, torch.randint(0, 3, (2, *SIZE)), 10, ramp_steps=10).loss_a.isnan()
