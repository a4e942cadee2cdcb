"""The real cohorts, made from archives of the published form."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks.accuracy.real import HIPPOCAMPUS, RealConfig, main, make_cohorts
from sslfast.data.folder import open_dataset
from sslfast.data.public.splits import SPLITS
from sslfast.errors import UserError

NUMBERS = [number for part in HIPPOCAMPUS.values() for number in part.split()]


def write_decathlon(folder: Path) -> None:
    for i, number in enumerate(NUMBERS):
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            array = np.full((2, 3, 4), i % 3 if kind == "labelsTr" else i, np.uint8)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / f"hippocampus_{number}.nii.gz")


def write_left_atria(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    h5py = pytest.importorskip("h5py")
    images = {}
    for name in names:
        (folder / name).mkdir(parents=True)
        image, label = np.random.default_rng().normal(size=(5, 4, 6)).astype(np.float32), np.zeros((5, 4, 6), np.uint8)
        label[:2, :2, 0] = 1  # half of the first block
        label[2:4, :2, 0] = label[4, 0, 0] = 1
        label[2, 0, 0] = 0  # 3 of 8 voxels; the odd last plane is left out
        with h5py.File(folder / name / "mri_norm2.h5", "w") as file:
            file["image"], file["label"] = image, label
        images[name] = image
    return images


def test_the_hippocampus_is_200_of_the_decathlons_cases(tmp_path: Path) -> None:
    assert len(NUMBERS) == len(set(NUMBERS)) == 200
    write_decathlon(tmp_path / "Task04")
    assert main(["--hippocampus", str(tmp_path / "Task04"), "--output", str(tmp_path / "real")]) == 0
    dataset = open_dataset(tmp_path / "real/hippocampus")
    assert [len(part) for part in (dataset.training, dataset.validation, dataset.test)] == [120, 20, 60]
    assert dataset.training[0].name == "hippocampus_136"


def test_left_atria_are_means_of_eight_voxels(tmp_path: Path) -> None:
    names = SPLITS["la"]["ua-mt"].training
    images = write_left_atria(tmp_path / "LA", names)
    make_cohorts(RealConfig(la=tmp_path / "LA", output=tmp_path / "real"))
    image, label = (nib.load(tmp_path / f"real/la_1.25mm/{kind}/{names[0]}.nii.gz") for kind in ("images", "labels"))
    assert image.shape == (2, 2, 3)
    assert image.header.get_zooms() == (1.25, 1.25, 1.25)
    values = np.asarray(image.dataobj)
    assert values.dtype == np.int16
    assert values[1, 1, 2] == round(100 * float(images[names[0]][2:4, 2:4, 4:6].astype(float).mean()))
    assert np.argwhere(np.asarray(label.dataobj)).tolist() == [[0, 0, 0]]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to make; give --hippocampus DIR"):
        make_cohorts(RealConfig(output=tmp_path))
    with pytest.raises(UserError, match=r"hippocampus_136.nii.gz is missing; --hippocampus is the folder in Task04"):
        make_cohorts(RealConfig(hippocampus=tmp_path, output=tmp_path / "real"))
    write_left_atria(tmp_path / "LA", SPLITS["la"]["ua-mt"].training[1:])
    with pytest.raises(UserError, match=r"lacks 1 of the 80 cases, the first 06SR5RBREL16DQ6M8LWS/mri_norm2\.h5"):
        make_cohorts(RealConfig(la=tmp_path / "LA", output=tmp_path / "real"))
