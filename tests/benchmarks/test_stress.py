"""The stress set: only the unlabelled volumes differ from kind to kind, in the way that its name says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import stress
from benchmarks.accuracy.stress import CLASSES, LABELLED, UNLABELLED, bilateral, write_stress_set
from helpers.anatomy import make_atlas
from sslfast.data.demo.brain_atlas import TISSUES
from sslfast.data.demo.cohorts import BRAIN
from sslfast.data.folder import Dataset, open_dataset
from sslfast.data.nifti import read_image, read_label

SIZES = {"TRAINING": 10, "VALIDATION": 1, "TEST": 2}
PARAMETERS = replace(BRAIN, spacing=3.0, size=(24, 22, 20), size_jitter=0, noise=(0.0, 0.0), lesions=0.0)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Dataset]]:
    folder = tmp_path_factory.mktemp("stress")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stress, "fetch", lambda package: range(2))
        patch.setattr(stress, "read_label", make_atlas)
        for part, size in SIZES.items():
            patch.setattr(stress, part, size)
        yield {kind: open_dataset(write_stress_set(kind, folder / kind, PARAMETERS)) for kind in UNLABELLED}


def test_each_structure_of_each_side_is_a_class_of_its_own() -> None:
    by_label = {tissue.label: tissue.regions for tissue in bilateral(TISSUES) if tissue.label}
    assert len(by_label) == len(CLASSES) - 1 == 14
    assert set(by_label.values()) == {(n,) for n in (*range(35, 42), *range(76, 83))}
    assert (CLASSES[1], by_label[1]) == ("left thalamus", (35,))
    assert (CLASSES[14], by_label[14]) == ("right amygdala", (82,))


def test_labelled_and_test_cases_are_the_same_in_every_kind(cohorts: dict[str, Dataset]) -> None:
    alike = cohorts["alike"]
    assert len(alike.training) == SIZES["TRAINING"]
    for dataset in cohorts.values():
        kept, same = ([*d.training[:LABELLED], *d.test[:2]] for d in (dataset, alike))
        for case, other in zip(kept, same):
            np.testing.assert_array_equal(read_image(case.image).array, read_image(other.image).array)
            np.testing.assert_array_equal(read_label(case.label).array, read_label(other.label).array)
    found = {int(c) for case in alike.training[:LABELLED] for c in np.unique(read_label(case.label).array)}
    assert found == set(range(15))


def test_the_unlabelled_volumes_are_as_the_kind_says(cohorts: dict[str, Dataset]) -> None:
    for kind, dataset in cohorts.items():
        for case, plain in zip(dataset.training[LABELLED:], cohorts["alike"].training[LABELLED:]):
            image, before = read_image(case.image).array, read_image(plain.image).array
            inside = read_label(plain.label).array > 0
            if kind == "absent":
                assert not read_label(case.label).array.any()
                assert (image != before)[inside].mean() > 0.9
            elif kind == "contrast":
                assert np.corrcoef(image.ravel(), before.ravel())[0, 1] < 0
            elif kind == "noise":
                is_noise = int(case.name[-3:]) % 2 == 1
                assert np.array_equal(image, before) != is_noise


def test_a_set_that_is_complete_is_not_written_again(
    cohorts: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    root: Path = cohorts["noise"].root
    monkeypatch.setattr(stress, "fetch", lambda package: pytest.fail("fetched again"))
    assert write_stress_set("noise", root, PARAMETERS) == root
    monkeypatch.setattr(stress, "fetch", lambda package: [])
    with pytest.raises(ZeroDivisionError):  # other parameters: no person to make it of
        write_stress_set("noise", root, replace(PARAMETERS, bias=0.1))
