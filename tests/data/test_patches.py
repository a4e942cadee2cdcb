"""Patches: what a step sees depends on (seed, step) alone, and labels come from labelled cases only."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from monai.transforms.utils import create_grid

from helpers.volumes import decoded_case, noise
from sslfast import UserError
from sslfast.data import patches
from sslfast.data.patches import PatchDataset, TwoStreamSampler, collate, patch_loader, worker_faults
from sslfast.data.volumes import DecodedCase
from sslfast.options import Augment


class MakeCase(Protocol):
    def __call__(self, name: str, size: tuple[int, int, int] = ..., labelled: bool = ...) -> DecodedCase: ...


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    def make(name: str, size: tuple[int, int, int] = (20, 18, 16), labelled: bool = True) -> DecodedCase:
        image = noise(*size)
        if not labelled:
            return decoded_case(tmp_path, name, image)
        label = np.zeros(size, np.int16)
        label[2:5, 3:6, 12:15] = 1
        image[label == 1] = 100
        return decoded_case(tmp_path, name, image, label)

    return make


def sampler(first: int, last: int, seed: int = 1) -> TwoStreamSampler:
    return TwoStreamSampler(3, 5, 2, 2, seed, first, last)


def cases_of(steps: Iterable[list[tuple[int, int]]]) -> list[int]:
    return [case for step in steps for case, _ in step]


def test_streams_go_through_all_cases_before_one_comes_again() -> None:
    steps = list(sampler(0, 15))
    assert len(steps) == len(sampler(0, 15)) == 15
    labelled = [case for step in steps for case, _ in step[:2]]
    unlabelled = [case for step in steps for case, _ in step[2:]]
    assert Counter(labelled) == dict.fromkeys(range(3), 10)
    assert Counter(unlabelled) == dict.fromkeys(range(3, 8), 6)
    assert len({seed for step in steps for _, seed in step}) == 60


def test_a_resumed_sampler_goes_on_where_it_was() -> None:
    assert list(sampler(0, 9))[4:] == list(sampler(4, 9))


def test_another_seed_gives_another_order_and_other_patches_and_so_does_another_lap() -> None:
    steps, other = list(sampler(0, 15)), list(sampler(0, 15, seed=2))
    assert cases_of(steps) != cases_of(other)
    assert not {seed for step in steps for _, seed in step} & {seed for step in other for _, seed in step}
    unlabelled = cases_of(step[2:] for step in steps)
    assert len({tuple(unlabelled[i : i + 5]) for i in range(0, 30, 5)}) > 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_order_of_one_that_draws_all_their_samples(world_size: int) -> None:
    ranks = [TwoStreamSampler(3, 5, 2, 1, 1, 4, 9, rank, world_size) for rank in range(world_size)]
    together = [
        [sample for part in step for sample in part[:2]] + [part[2] for part in step]
        for step in zip(*ranks, strict=True)
    ]
    assert together == list(TwoStreamSampler(3, 5, 2 * world_size, world_size, 1, 4, 9))


@pytest.mark.parametrize("workers", [0, 2])
def test_patches_depend_on_the_seed_alone(workers: int, make_case: MakeCase) -> None:
    cases = [make_case(f"l{i}") for i in range(3)] + [make_case(f"u{i}", labelled=False) for i in range(5)]
    dataset = PatchDataset(cases, (8, 8, 8), augment="all", foreground=0.5)
    batches = list(patch_loader(dataset, sampler(0, 4), workers, pin_memory=False))
    assert all(batch.images.is_shared() == bool(workers) for batch in batches)
    again = list(patch_loader(dataset, sampler(2, 4), 0, pin_memory=False))
    for batch, other in zip(batches[2:], again):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
        assert batch.names == other.names
    assert batches[0].images.shape == (4, 1, 8, 8, 8)
    assert batches[0].images.dtype == torch.float32
    assert batches[0].labels.shape == (2, 8, 8, 8)
    assert batches[0].labels.dtype == torch.int64
    assert not torch.equal(batches[0].images, batches[1].images)


def test_image_and_label_are_moved_together(make_case: MakeCase) -> None:
    case = make_case("a")
    image, label = case.image[0], case.label
    label[1:7, 2:12, 9:15] = 1
    image[label == 1] = 100
    case.save(image[None], label)
    leasts: dict[Augment, float] = {
        "flip": 1.0,
        "affine": 0.8,
        "all": 0.8,
    }  # where it is turned, the image is interpolated
    for augment, least in leasts.items():
        dataset = PatchDataset([case], case.image.shape[1:], augment=augment, foreground=0.0)
        for seed in range(20):
            sample = dataset[(0, seed)]
            bright, label = sample["image"][0] > 50, sample["label"][0] == 1
            assert 2 * (bright & label).sum() / (bright.sum() + label.sum()) >= least


def test_foreground_crops_hold_foreground(make_case: MakeCase) -> None:
    always = PatchDataset([make_case("a")], (6, 6, 6), augment="none", foreground=1.0)
    never = PatchDataset([make_case("a")], (6, 6, 6), augment="none", foreground=0.0)
    fractions = [np.mean([bool((d[(0, seed)]["label"] == 1).any()) for seed in range(60)]) for d in (always, never)]
    assert fractions[0] == 1
    assert fractions[1] < 0.9


def test_classes_are_drawn_alike_whatever_their_size(tmp_path: Path) -> None:
    label = np.zeros((20, 18, 16), np.int16)
    label[1:9, 1:9, 1:9] = 1
    label[15, 14, 3] = 4  # one voxel; classes 2 and 3 are absent
    case = decoded_case(tmp_path, "a", noise(20, 18, 16), label)
    assert [*case.foreground[-1]] == [15, 14, 3, 4]
    dataset = PatchDataset([case], (5, 5, 5), augment="none", foreground=1.0)
    centres = Counter(int(dataset[(0, seed)]["label"][0, 2, 2, 2]) for seed in range(400))
    assert centres[4] == pytest.approx(200, abs=50)
    assert centres[1] > 100  # the others were moved inside


def test_every_place_can_be_drawn(tmp_path: Path) -> None:
    case = decoded_case(tmp_path, "a", np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6))
    dataset = PatchDataset([case], (3, 4, 4), augment="none", foreground=0.0)
    corners = {float(dataset[(0, seed)]["image"][0, 0, 0, 0]) for seed in range(300)}
    assert corners == {float(case.image[0, x, y, z]) for x in range(2) for y in range(2) for z in range(3)}


def test_a_volume_smaller_than_the_patch_is_padded_with_air_that_nobody_annotated(make_case: MakeCase) -> None:
    case = make_case("a", size=(20, 18, 16))
    sample = PatchDataset([case], (24, 16, 32), augment="none", foreground=0.5)[(0, 3)]
    assert sample["image"].shape == (1, 24, 16, 32)
    outside = sample["label"][0] == -1
    assert outside.sum() == 24 * 16 * 32 - 20 * 16 * 16
    assert (sample["image"][0][outside] == case.image.min()).all()


def test_collate_keeps_the_labelled_first(make_case: MakeCase) -> None:
    cases = [make_case("l"), make_case("u", labelled=False)]
    dataset = PatchDataset(cases, (8, 8, 8), augment="none", foreground=0.0)
    batch = collate([dataset[(0, 1)], dataset[(1, 2)]])
    assert batch.names == ["l", "u"]
    assert len(batch.labels) == 1


def test_unlabelled_patches_get_no_affine_augmentation_from_the_loader_if_the_method_applies_its_own(
    make_case: MakeCase,
) -> None:
    cases = [make_case("l"), make_case("u", labelled=False)]
    for affine_unlabelled, expected in ((False, [True, False]), (True, [True, True])):
        options = {"augment": "affine", "affine_unlabelled": affine_unlabelled}
        dataset = PatchDataset(cases, cases[0].image.shape[1:], foreground=0.0, **options)
        moved = [
            any(not np.array_equal(dataset[(index, seed)]["image"], case.image) for seed in range(30))
            for index, case in enumerate(cases)
        ]
        assert moved == expected


def test_an_augmentation_moves_or_recolours_as_its_name_says(make_case: MakeCase) -> None:
    case = make_case("a")
    for augment, moves, recolours in (
        ("none", 0, 0),
        ("flip", 1, 0),
        ("intensity", 0, 1),
        ("affine", 1, 1),
        ("no-flip", 1, 1),
        ("all", 1, 1),
    ):
        dataset = PatchDataset([case], case.image.shape[1:], augment=augment, foreground=0.0)
        samples = [dataset[(0, seed)] for seed in range(24)]
        assert any(not torch.equal(s["label"], samples[0]["label"]) for s in samples) == moves
        values = [s["image"].flatten().sort().values for s in samples]
        assert any(not torch.equal(v, values[0]) for v in values) == recolours


def test_patches_are_plain_tensors(make_case: MakeCase) -> None:
    """A MetaTensor would make every activation one, and cost time in each op."""
    dataset = PatchDataset([make_case("l")], (8, 8, 8), augment="all", foreground=0.5)
    batch = collate([dataset[(0, seed)] for seed in range(4)])
    assert type(batch.images) is torch.Tensor
    assert type(batch.labels) is torch.Tensor


def test_left_stays_left_without_flips(make_case: MakeCase) -> None:
    case = make_case("a", size=(24, 24, 24))
    assert case.label is not None
    case.label[:] = 0
    case.label[2:6, 10:14, 10:14] = 1  # towards one end of the first axis
    kinds: tuple[Augment, ...] = ("no-flip", "all")
    for augment in kinds:
        dataset = PatchDataset([case], case.image.shape[1:], augment=augment, foreground=0.0)
        ends = {bool((dataset[(0, seed)]["label"][0] == 1).nonzero()[:, 0].float().mean() > 11.5) for seed in range(60)}
        assert ends == ({False} if augment == "no-flip" else {False, True})


@pytest.fixture
def small_dataset(make_case: MakeCase) -> PatchDataset:
    cases = [make_case(f"l{i}") for i in range(3)] + [make_case(f"u{i}", labelled=False) for i in range(5)]
    return PatchDataset(cases, (8, 8, 8), augment="none", foreground=0.5)


def no_room(*_: object) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


@pytest.mark.parametrize("taken", ["before", "in between"])
def test_workers_send_the_same_patches_through_pipes_if_shared_memory_is_full(
    taken: str, monkeypatch: pytest.MonkeyPatch, small_dataset: PatchDataset
) -> None:
    if taken == "before":
        monkeypatch.setattr(patches.shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 8**3 * 4))
    else:
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    piped, expected = (patch_loader(small_dataset, sampler(0, 4), workers, pin_memory=False) for workers in (2, 0))
    for batch, other in zip(piped, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
        assert batch.names == other.names
        assert not batch.images.is_shared()
        assert not batch.labels.is_shared()


def test_a_machine_without_room_for_a_lock_is_told_so(
    monkeypatch: pytest.MonkeyPatch, small_dataset: PatchDataset
) -> None:
    def fails() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Lock", fails)
    with pytest.raises(UserError, match=r"--workers 2: there is no room for a lock .*No space left.*Use --workers 0"):
        patch_loader(small_dataset, sampler(0, 4), 2, pin_memory=False)


def test_a_worker_that_is_killed_ends_the_run_with_its_reason(small_dataset: PatchDataset) -> None:
    killed = r"--workers 1: .*(killed by signal: Killed|exited unexpectedly|ended before it had sent its patches)"

    def read() -> None:
        with worker_faults(1):
            for _ in patch_loader(small_dataset, sampler(0, 100), 1, pin_memory=False):
                multiprocessing.active_children()[0].kill()

    with pytest.raises(UserError, match=f"{killed}.*short of memory, continue with fewer --workers"):
        read()


def test_what_a_worker_cannot_read_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, small_dataset: PatchDataset
) -> None:
    def fails(dataset: PatchDataset, key: tuple[int, int]) -> None:
        raise UserError("l0.nii.gz is gone. Put it back.")

    monkeypatch.setattr(PatchDataset, "__getitem__", fails)
    with pytest.raises(UserError) as raised, worker_faults(1):
        next(iter(patch_loader(small_dataset, sampler(0, 4), 1, pin_memory=False)))
    assert str(raised.value).startswith("--workers 1: l0.nii.gz is gone. Put it back. The last checkpoint is unchanged")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_a_worker_that_ended_without_a_word_is_the_reason(error: type[Exception]) -> None:
    reason = r"--workers 1: a worker ended before it had sent its patches\. The last checkpoint is unchanged"
    with pytest.raises(UserError, match=reason), worker_faults(1):
        raise error
    with pytest.raises(error), worker_faults(0):
        raise error


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a fault in the program"), worker_faults(1):
        raise RuntimeError("a fault in the program")


def test_signals_to_every_process_of_a_run_do_not_end_its_workers(small_dataset: PatchDataset) -> None:
    batches = iter(patch_loader(small_dataset, sampler(0, 20), 2, pin_memory=False))
    for _ in range(2):  # one of each worker
        next(batches)
    for worker in multiprocessing.active_children():
        for number in ("INT", "TERM"):
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert len(list(batches)) == 18


def test_workers_end_with_the_process_that_forgot_them(small_dataset: PatchDataset) -> None:
    batches = iter(patch_loader(small_dataset, sampler(0, 20), 2, pin_memory=False))
    for _ in range(2):
        next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()  # as multiprocessing does at the end of a process
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_collect_nothing_of_their_parents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_dataset: PatchDataset
) -> None:
    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / f"collected by {os.getpid()}").touch()

    def collects(dataset: PatchDataset, key: tuple[int, int]) -> dict[str, Any]:
        gc.collect()
        return read(dataset, key)

    read = PatchDataset.__getitem__
    monkeypatch.setattr(PatchDataset, "__getitem__", collects)
    gc.disable()
    try:
        Garbage()
        list(patch_loader(small_dataset, sampler(0, 4), 2, pin_memory=False))
    finally:
        gc.enable()
    assert [path.name for path in tmp_path.glob("collected*")] == [f"collected by {os.getpid()}"]


def test_patches_with_thick_slices_are_turned_in_space() -> None:
    grid = patches._GridInSpace((1, 1, 4), rotate_range=[0.5] * 3, scale_range=[0.0] * 3)
    for seed in range(5):
        grid.set_random_state(seed=seed)
        moved = grid(grid=create_grid((6, 6, 4), backend="torch"))[:3] * torch.tensor([1.0, 1.0, 4.0]).view(3, 1, 1, 1)
        for axis, length in enumerate((1.0, 1.0, 4.0), 1):
            steps = moved.diff(dim=axis).norm(dim=0)
            torch.testing.assert_close(steps, torch.full_like(steps, length), check_dtype=False)
