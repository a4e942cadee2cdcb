"""The demo cohort's generator, on a small scan of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sslfast.data.demo import Anchor, DemoParameters, demo_folder, jacobian, make_subject, warp, write_cohort
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import Volume, check_same_grid, read_image, read_label

SMALL = DemoParameters(seed=5, training=3, validation=1, test=2, spacing=4.0, size=(24, 22, 20), size_jitter=2)


@pytest.fixture(scope="module")
def scan() -> tuple[Volume, Volume]:
    """A bright ball in soft tissue in air, stored LPS at 3 mm."""
    place = np.stack(np.meshgrid(*[np.arange(36)] * 3, indexing="ij")) - 17.5
    radius = np.linalg.norm(place, axis=0)
    image = np.where(radius < 9, 400, np.where(radius < 15, 40, -1000)).astype(np.float32)
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    return Volume(image, affine, nib.Nifti1Header()), Volume((radius < 9).astype(np.int16), affine, nib.Nifti1Header())


def test_a_subject_depends_on_seed_and_index_alone(scan: tuple[Volume, Volume]) -> None:
    anchor = Anchor(*scan)
    before = torch.random.get_rng_state()
    first = make_subject(anchor, 2, SMALL)
    make_subject(anchor, 0, SMALL)
    for one, again in zip(first, make_subject(Anchor(*scan), 2, SMALL)):
        assert np.array_equal(one, again)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    others = [make_subject(anchor, 1, SMALL), make_subject(anchor, 2, replace(SMALL, seed=6))]
    assert all(other[0].shape != first[0].shape or not np.array_equal(other[0], first[0]) for other in others)


def test_subjects_keep_the_structure_and_its_contrast(scan: tuple[Volume, Volume]) -> None:
    anchor = Anchor(*scan)
    truth = scan[1].array.sum() * 27
    for i in range(8):
        image, label, affine = make_subject(anchor, i, SMALL)
        assert image.shape == label.shape
        assert image.dtype == np.int16
        assert label.dtype == np.uint8
        assert np.allclose(nib.affines.voxel_sizes(affine), 4)
        assert 0.3 * truth < label.sum() * 64 < 3 * truth
        assert image[label == 1].mean() > image[label == 0].mean()


def test_orientations_vary(scan: tuple[Volume, Volume]) -> None:
    anchor = Anchor(*scan)
    codes = {nib.aff2axcodes(make_subject(anchor, i, SMALL)[2]) for i in range(12)}
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


def test_the_cohort_is_a_dataset_like_a_users(scan: tuple[Volume, Volume], tmp_path: Path) -> None:
    write_cohort(*scan, tmp_path, SMALL)
    dataset = open_dataset(tmp_path)
    assert [len(part) for part in (dataset.training, dataset.validation, dataset.test)] == [3, 1, 2]
    assert dataset.classes == {0: "background", 1: "heart"}
    for case in (*dataset.training, *dataset.validation, *dataset.test):
        check_same_grid(read_image(case.image), read_label(case.label, num_classes=2), case.image, case.label)
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["generator"]["seed"] == 5
    assert description["source"]["licence"] == "Apache-2.0"


def test_an_interrupted_cohort_is_not_taken_for_a_whole_one(
    scan: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path))
    monkeypatch.setattr("sslfast.data.demo.DemoParameters", lambda: SMALL)
    monkeypatch.setattr("sslfast.data.demo.fetch_heart_ct", lambda: ("scan", "heart"))
    monkeypatch.setattr("sslfast.data.demo.read_image", lambda path: scan[0])
    monkeypatch.setattr("sslfast.data.demo.read_label", lambda path: scan[1])
    with monkeypatch.context() as broken:
        original = nib.save
        calls = iter(range(100))

        def stop(image: nib.Nifti1Image, path: Path) -> None:
            if next(calls) == 5:
                raise KeyboardInterrupt
            original(image, path)

        broken.setattr(nib, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            demo_folder()
    folder = tmp_path / "demo"
    assert not (folder / "dataset.json").exists()
    assert not list(folder.rglob(".part-*"))
    assert len(list((demo_folder() / "images").iterdir())) == 6
    written = (folder / "dataset.json").stat().st_mtime_ns
    demo_folder()
    assert (folder / "dataset.json").stat().st_mtime_ns == written, "a complete cohort is kept"
