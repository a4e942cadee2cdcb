"""The demo cohort's generator, on a small scan of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sslfast.data.demo.brain_atlas import TISSUES, WHITE_MATTER, Donor
from sslfast.data.demo.cohorts import COHORTS, Cohort, cohorts, data_folder, write_cohort
from sslfast.data.demo.subject import Anchor, DemoParameters, jacobian, make_subject, warp
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import Volume, check_same_grid, read_image, read_label

SMALL = DemoParameters(
    seed=5, training=3, validation=1, test=2, first_test=7, spacing=4.0, size=(24, 22, 20), size_jitter=2
)


@pytest.fixture(scope="module")
def ball() -> Anchor:
    """A bright ball in soft tissue in air, stored LPS at 3 mm."""
    place = np.stack(np.meshgrid(*[np.arange(36)] * 3, indexing="ij")) - 17.5
    radius = np.linalg.norm(place, axis=0)
    image = np.where(radius < 9, 400, np.where(radius < 15, 40, -1000))
    return Anchor(image, (radius < 9).astype(np.uint8), np.diag([-3.0, -3.0, 3.0, 1.0]))


@pytest.fixture
def cohort(ball: Anchor, monkeypatch: pytest.MonkeyPatch) -> Cohort:
    """A small one of balls; nothing is fetched."""
    monkeypatch.setattr(cohorts, "fetch", lambda package: [])
    return replace(COHORTS["demo"], parameters=SMALL, anchors=lambda paths: [ball])


def person(shift: int) -> Donor:
    """A block of cortex around white matter in which each structure is a box; stored LIP at 1 mm."""
    regions = np.zeros((52, 56, 60), np.int16)
    regions[4:-4, 4:-4, 4:-4] = 1
    regions[6:-6, 6:-6, 6:-6] = 0
    for i, number in enumerate((*range(35, 42), *range(76, 83))):
        x, y = 9 + 9 * (i % 4) + shift, 9 + 9 * (i // 4)
        regions[x : x + 6, y : y + 6, 20:40] = number
    affine = np.array([[-1.0, 0, 0, 26], [0, 0, 1, -30], [0, -1, 0, 28], [0, 0, 0, 1]])
    return Donor(Volume(regions, affine, nib.Nifti1Header()))


def test_a_subject_depends_on_seed_and_index_alone(ball: Anchor) -> None:
    before = torch.random.get_rng_state()
    first = make_subject(ball, 2, SMALL)
    make_subject(ball, 0, SMALL)
    for one, again in zip(first, make_subject(ball, 2, SMALL)):
        assert np.array_equal(one, again)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    others = [make_subject(ball, 1, SMALL), make_subject(ball, 2, replace(SMALL, seed=6))]
    assert all(other[0].shape != first[0].shape or not np.array_equal(other[0], first[0]) for other in others)


def test_subjects_keep_the_structure_and_its_contrast(ball: Anchor) -> None:
    truth = float(ball.structures.sum()) * 27
    for i in range(8):
        image, label, affine = make_subject(ball, i, SMALL)
        assert image.shape == label.shape
        assert image.dtype == np.int16
        assert label.dtype == np.uint8
        assert np.allclose(nib.affines.voxel_sizes(affine), 4)
        assert 0.3 * truth < label.sum() * 64 < 3 * truth
        assert image[label == 1].mean() > image[label == 0].mean()


def test_orientations_vary(ball: Anchor) -> None:
    codes = {nib.aff2axcodes(make_subject(ball, i, SMALL)[2]) for i in range(12)}
    assert {("R", "A", "S"), ("L", "P", "S")} <= codes


def test_the_warp_is_a_diffeomorphism_and_a_folding_one_is_refused() -> None:
    line = torch.linspace(-90, 90, 12)
    position = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    moved = warp(position, SMALL.warp, torch.Generator().manual_seed(1))
    assert (moved - position).norm(dim=-1).max() > 2
    assert jacobian((moved / 90).movedim(-1, 0)).min() > 0
    with pytest.raises(ValueError, match="folds"):
        warp(position, ((10, 400.0),), torch.Generator().manual_seed(1))


def test_jacobian_of_a_known_mapping() -> None:
    line = torch.linspace(-1, 1, 7)
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    assert torch.allclose(jacobian(torch.stack([2 * x, 3 * y + x, -z])), torch.tensor(-6.0), rtol=1e-4)


def test_the_cohort_is_a_dataset_like_a_users(cohort: Cohort, tmp_path: Path) -> None:
    write_cohort(cohort, tmp_path)
    dataset = open_dataset(tmp_path)
    assert [len(part) for part in (dataset.training, dataset.validation, dataset.test)] == [3, 1, 2]
    assert dataset.classes == {0: "background", 1: "heart"}
    for case in (*dataset.training, *dataset.validation, *dataset.test):
        check_same_grid(read_image(case.image), read_label(case.label, num_classes=2), case.image, case.label)
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["generator"]["seed"] == 5
    assert description["source"]["licence"] == "Apache-2.0"


@pytest.mark.parametrize(("name", "people_of_test"), [("demo-brain", [2, 2]), ("demo-brain-tuning", [0, 1])])
def test_the_person_left_out_is_in_the_test_cases_alone(
    name: str, people_of_test: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    people = [person(shift) for shift in range(3)]
    made: list[tuple[int, int]] = []

    def note(anchor: Anchor, index: int, parameters: DemoParameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        made.append((index, people.index(anchor)))
        return make_subject(anchor, index, parameters)

    monkeypatch.setattr(cohorts, "fetch", lambda package: [])
    monkeypatch.setattr(cohorts, "make_subject", note)
    brain = COHORTS[name]
    sizes = {"training": 3, "validation": 1, "test": 2, "first_test": 6}
    small = replace(brain.parameters, **sizes, spacing=3.0, size=(24, 22, 20), size_jitter=0)
    write_cohort(replace(brain, parameters=small, anchors=lambda paths: people), tmp_path)
    assert made == [(0, 0), (1, 1), (2, 0), (3, 1), *zip((6, 7), people_of_test)]
    dataset = open_dataset(tmp_path)
    assert len(dataset.classes) == 4
    assert set(np.unique(read_label(dataset.test[0].label, num_classes=4).array)) == {0, 1, 2, 3}


def test_a_persons_images_differ_and_their_structures_do_not() -> None:
    donor = person(0)
    assert set(np.unique(donor.image)) == {0, 1, *range(35, 42), *range(76, 83), WHITE_MATTER}
    assert donor.structures.shape[1] == 3
    assert sorted(n for tissue in TISSUES for n in tissue.regions) == list(range(WHITE_MATTER + 1))
    first, second = (donor.appearance(torch.Generator().manual_seed(i)) for i in (0, 1))
    assert first.shape == donor.image.shape
    thalamus, white_matter = donor.structures[0, 0] > 0, donor.image[0, 0] == WHITE_MATTER
    for image in (first, second):
        assert image[0, 0][thalamus].mean() < image[0, 0][white_matter].mean()
    assert (first - second)[0, 0][thalamus].mean().abs() > 1


def test_an_interrupted_cohort_is_not_taken_for_a_whole_one(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path))
    monkeypatch.setitem(COHORTS, "demo", cohort)
    with monkeypatch.context() as broken:
        original = nib.save
        calls = iter(range(100))

        def stop(image: nib.Nifti1Image, path: Path) -> None:
            if next(calls) == 5:
                raise KeyboardInterrupt
            original(image, path)

        broken.setattr(nib, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            data_folder("demo")
    folder = tmp_path / "demo"
    assert not (folder / "dataset.json").exists()
    assert not list(folder.rglob(".part-*"))
    assert len(list((data_folder("demo") / "images").iterdir())) == 6
    written = (folder / "dataset.json").stat().st_mtime_ns
    data_folder("demo")
    assert (folder / "dataset.json").stat().st_mtime_ns == written, "a complete cohort is kept"


@pytest.mark.parametrize("name", ["demo", "demo-brain"])
def test_settings_are_tuned_on_other_cases_than_are_tested(name: str) -> None:
    final, tuning = (COHORTS[n].parameters for n in (name, f"{name}-tuning"))
    assert tuning == replace(final, first_test=tuning.first_test)
    assert final.training + final.validation <= final.first_test
    assert final.first_test + final.test <= tuning.first_test
