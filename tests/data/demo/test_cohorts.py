"""The demo cohorts: datasets like a user's, complete or not there, whose test cases choose nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.anatomy import SMALL, make_ball, make_person
from sslfast.data.demo import cohorts
from sslfast.data.demo.cohorts import COHORTS, Cohort, data_folder, write_cohort
from sslfast.data.demo.subject import DemoParameters, SourceAnatomy, make_subject
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import on_grid_of, read_image, read_label


@pytest.fixture
def cohort(monkeypatch: pytest.MonkeyPatch) -> Cohort:
    """A small one of balls; nothing is fetched."""
    ball = make_ball()
    monkeypatch.setattr(cohorts, "fetch", lambda package: [])
    return replace(COHORTS["demo"], parameters=SMALL, sources=lambda paths: [ball])


def test_the_cohort_is_a_dataset_like_a_users(cohort: Cohort, tmp_path: Path) -> None:
    write_cohort(cohort, tmp_path)
    dataset = open_dataset(tmp_path)
    assert [len(part) for part in (dataset.training, dataset.validation, dataset.test)] == [3, 1, 2]
    assert dataset.classes.names == {0: "background", 1: "heart"}
    for case in (*dataset.training, *dataset.validation, *dataset.test):
        on_grid_of(read_image(case.image), read_label(case.label, classes=range(2)), case.image, case.label)
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["generator"]["seed"] == 5
    assert description["source"]["licence"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("name", "people_of_test"),
    [
        pytest.param("demo-brain", [2, 2], id="demo-brain"),
        pytest.param("demo-brain-tuning", [0, 1], id="demo-brain-tuning"),
    ],
)
def test_the_person_left_out_is_in_the_test_cases_alone(
    name: str, people_of_test: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    people = [make_person(shift) for shift in range(3)]
    made: list[tuple[int, int]] = []

    def note(
        anchor: SourceAnatomy, index: int, parameters: DemoParameters
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        made.append((index, people.index(anchor)))
        return make_subject(anchor, index, parameters)

    monkeypatch.setattr(cohorts, "fetch", lambda package: [])
    monkeypatch.setattr(cohorts, "make_subject", note)
    brain = COHORTS[name]
    sizes = {"training": 3, "validation": 1, "test": 2, "first_test": 6}
    small = replace(brain.parameters, **sizes, spacing=3.0, size=(24, 22, 20), size_jitter=0)
    write_cohort(replace(brain, parameters=small, sources=lambda paths: people), tmp_path)
    assert made == [(0, 0), (1, 1), (2, 0), (3, 1), *zip((6, 7), people_of_test)]
    dataset = open_dataset(tmp_path)
    assert len(dataset.classes.names) == 4
    assert set(np.unique(read_label(dataset.test[0].label, classes=range(4)).array)) == {0, 1, 2, 3}


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
