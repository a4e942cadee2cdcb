"""The published splits of the public datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslfast.data.public.conversion import READERS
from sslfast.data.public.splits import SPLITS
from sslfast.prepare import main


@pytest.mark.parametrize(
    ("dataset", "name", "sizes"),
    [
        ("la", "ua-mt", (80, 0, 20)),
        ("pancreas", "mc-net", (62, 0, 20)),
        ("pancreas", "bcp", (62, 0, 18)),
        ("brats", "ssl4mis", (250, 25, 60)),
    ],
)
def test_a_published_split_is_taken_where_all_of_its_cases_are_there(
    tmp_path: Path, dataset: str, name: str, sizes: tuple[int, ...]
) -> None:
    split = SPLITS[dataset][name]
    assert (len(split.training), len(split.validation), len(split.test)) == sizes
    cases = [*split.training, *split.validation, *split.test]
    assert len(set(cases)) == len(cases)
    for case in cases:  # empty files: a reader opens none before it writes
        path = {"la": f"{case}/mri_norm2.h5", "pancreas": f"image{case[-4:]}_norm.h5", "brats": f"{case}.h5"}[dataset]
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    published = READERS[dataset](tmp_path, None)  # all of its cases are there, so it is taken unasked
    assert published.split.startswith(f"{name}: ")
    assert [case.name for case in published.cases if case.part == "training"] == split.training
    assert [case.name for case in published.cases if case.part == "test"] == split.test


def test_a_split_that_is_asked_for_is_taken_or_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for n in range(1, 83):
        (source / f"image{n:04d}_norm.h5").touch()
    assert READERS["pancreas"](source, None).split.startswith("mc-net")
    published = READERS["pancreas"](source, "bcp")
    assert {"pancreas_0025", "pancreas_0070"} & {case.name for case in published.cases} == set()
    (source / "image0082_norm.h5").unlink()
    (source / "train.list").write_text("image0001_norm.h5")
    refusals = {
        ("pancreas", "bcp"): "lacks 1 of its 80 cases, the first 'pancreas_0082'",
        ("pancreas", "ua-mt"): "choose mc-net or bcp",
        ("folder", "bcp"): "dataset.json",
    }
    for (dataset, split), message in refusals.items():
        flags = ["--source", str(source), "--output", str(tmp_path / "out"), "--split", split]
        assert main([dataset, *flags]) == 2
        assert message in capsys.readouterr().err
    assert [case.name for case in READERS["pancreas"](source, None).cases] == ["pancreas_0001"], (
        "the list beside the data"
    )


def test_without_a_split_all_cases_are_for_training(tmp_path: Path) -> None:
    for n in (3, 1):
        (tmp_path / f"image{n:04d}.h5").touch()
    published = READERS["pancreas"](tmp_path, None)
    assert [(case.name, case.part) for case in published.cases] == [
        ("pancreas_0001", "training"),
        ("pancreas_0003", "training"),
    ]
