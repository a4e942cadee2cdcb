"""The voxel sample: the generator against its published vectors, the draw against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslfast.ops import gather_voxels, sample_voxels
from sslfast.ops.check import check_step
from sslfast.ops.flags import RELIABLE
from sslfast.ops.philox import philox, voxel_priority


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known-answer vectors of Philox4x32-10 (Salmon et al. 2011, Random123)
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, words: list[int]) -> None:
    result = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert [int(word) for word in result] == words


def test_priority_counts_beyond_32_bits() -> None:
    index = torch.tensor([5, 2**32 + 5, 7 * 2**32 + 5])
    priority = voxel_priority(index, seed=3, step=9, stream=4)
    expected = [philox(tuple(torch.tensor(w) for w in (5, high, 9, 4)), 3)[0] for high in (0, 1, 7)]
    assert priority.tolist() == [int(word) for word in expected]
    assert len(set(priority.tolist())) == 3


def random_flags(classes: int, size: tuple[int, ...] = (2, 6, 7, 5)) -> torch.Tensor:
    return (torch.randint(0, classes, size) + RELIABLE * (torch.rand(size) < 0.5)).to(torch.uint8)


@given(
    classes=st.integers(2, 6),
    quota=st.integers(0, 40),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    role=st.sampled_from(["anchors", "negatives"]),
)
@settings(max_examples=40, deadline=None)
def test_takes_the_smallest_priorities_in_index_order(
    classes: int, quota: int, seed: int, step: int, role: str
) -> None:
    flags = random_flags(classes)
    quotas = [quota + c for c in range(classes)]
    indices, counts = sample_voxels(flags, quotas, seed, step, role=role)
    assert indices.shape == (classes, max(quotas))
    for c in range(classes):
        candidates = []
        for v, byte in enumerate(flags.flatten().tolist()):
            reliable, label = bool(byte & RELIABLE), byte & 31
            if (not reliable and label == c) if role == "anchors" else (reliable and label != c):
                candidates.append(v)
        stream = 2 * c + (role == "negatives")
        priority = voxel_priority(torch.tensor(candidates, dtype=torch.int64), seed, step, stream).tolist()
        drawn = sorted(v for _, v in sorted(zip(priority, candidates))[: quotas[c]])
        assert counts[c] == len(drawn)
        assert indices[c].tolist() == drawn + [-1] * (max(quotas) - len(drawn))


def test_another_step_seed_or_role_is_another_draw() -> None:
    flags = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    flags[:, 10:] = RELIABLE + 1
    drawn = [
        sample_voxels(flags, [50, 50], *key).indices[0].tolist() for key in [(1, 0), (1, 1), (2, 0), (1 + 2**32, 0)]
    ]
    assert drawn[0] == sample_voxels(flags, [50, 50], 1, 0).indices[0].tolist()
    assert len({tuple(d) for d in drawn}) == 4


def test_draws_are_uniform() -> None:
    flags = torch.zeros(1, 10, 10, 10, dtype=torch.uint8)
    hits = torch.zeros(1000)
    for step in range(400):
        hits[sample_voxels(flags, [100, 0], 7, step).indices[0]] += 1
    # 400 draws of 10 %: mean 40, standard deviation 6; a chi-square of 1000 cells stays far below 1300
    assert hits.mean() == 40
    assert ((hits - 40) ** 2 / 36).sum() < 1300


def test_gather_reads_the_drawn_voxels_and_routes_their_gradient() -> None:
    features = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 119, 120, 239], [7, -1, -1, -1]])
    vectors = gather_voxels(features, indices)
    rows = features.detach().movedim(1, -1).reshape(-1, 3)
    assert torch.equal(vectors[0], rows[indices[0]])
    assert not vectors[1, 1:].any()
    vectors.sum().backward()
    touched = features.grad.movedim(1, -1).reshape(-1, 3)
    assert touched.sum() == 3 * 5
    assert touched[[0, 7, 119, 120, 239]].eq(1).all()


def test_no_unlabelled_volume() -> None:
    sample = sample_voxels(torch.zeros(0, 4, 4, 4, dtype=torch.uint8), [3, 3], 0, 0)
    assert sample.counts.tolist() == [0, 0]
    features = torch.zeros(0, 5, 4, 4, 4, requires_grad=True)
    vectors = gather_voxels(features, sample.indices)
    assert vectors.shape == (2, 3, 5)
    vectors.sum().backward()


def test_refusals_name_the_argument() -> None:
    flags = random_flags(2)
    with pytest.raises(TypeError, match="flags has dtype"):
        sample_voxels(flags.long(), [1, 1], 0, 0)
    with pytest.raises(ValueError, match="quotas is"):
        sample_voxels(flags, [1, -1], 0, 0)
    with pytest.raises(ValueError, match="step is -1"):
        sample_voxels(flags, [1, 1], 0, -1)
    with pytest.raises(ValueError, match="role is 'keys'"):
        sample_voxels(flags, [1, 1], 0, 0, role="keys")


def test_a_capture_that_would_repeat_the_draw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslfast.ops.check._is_capturing", lambda device: True)
    check_step(5, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="step 5 would be part of it, so that every replay drew the same voxels"):
        check_step(5, torch.device("cuda"))
