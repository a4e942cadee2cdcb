"""A MONAI bundle segments as `predict` does, in an environment without sslfast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.data import MetaTensor
from monai.transforms import LoadImage

from helpers.models import OBLIQUE, make_run
from helpers.volumes import noise, write_volume
from sslfast.bundle import export_bundle
from sslfast.bundle_transforms import NormaliseChannelsd, ScanReader, find_scans
from sslfast.errors import UserError
from sslfast.export import main
from sslfast.options import Preprocessing
from sslfast.predict import main as predict

LPS = np.array([[-1.5, 0, 0, 3], [0, -0.9, 0, 4], [0, 0, 2, 5], [0, 0, 0, 1]])
TENSOR = {
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in ("type", "format", "dtype")},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
}
TENSORS = {"type": "object", "additionalProperties": TENSOR, "minProperties": 1}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
SCHEMA = {  # what the schema asks for that `sslfast.bundle.SCHEMA` names
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in (*TEXTS, "copyright")},
        **{key: {"type": "object"} for key in ("changelog", "required_packages_version")},
        "network_data_format": {
            "type": "object",
            "properties": dict.fromkeys(("inputs", "outputs", "post_processed_outputs"), TENSORS),
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*TEXTS, "copyright", "required_packages_version", "network_data_format"],
}


@pytest.fixture
def seeded() -> None:
    """Networks that predict every class."""
    torch.manual_seed(0)


def write_scans(folder: Path, channels: int) -> None:
    """Scans smaller than a patch and larger, oblique and to L, P, S, of one slice; and one in metres."""
    cases = {"small": ((9, 20, 7), OBLIQUE), "large.1": ((33, 21, 22), LPS), "slice": ((20, 18, 1), OBLIQUE)}
    for name, (shape, affine) in cases.items():
        for channel in range(channels):
            image = nib.Nifti1Image(200 * noise(*shape), affine)
            if channel:  # stored along other axes
                image = image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
            suffix = f"_{channel:04}" if channels > 1 else ""
            nib.save(image, folder / f"{name}{suffix}.nii.gz")
    if channels == 1:
        image = nib.Nifti1Image(200 * noise(20, 17, 12), np.diag([1e-3, 1e-3, 1e-3, 1]) @ LPS)
        image.header.set_xyzt_units("meter")
        image.header["pixdim"][1:4] = 1  # unlike the affine, which counts
        nib.save(image, folder / "metres.nii")


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    ("preprocessing", "at"),
    [
        (Preprocessing(intensity=("ct",), window=(-100.0, 300.0)), "bundle"),
        (Preprocessing(spacing=(1.5, 1, 2.5), intensity=("none",)), "bundle"),
        (Preprocessing(spacing=(1, 1.2, 3), intensity=("ct", "zscore")), "."),
    ],
    ids=["CT", "resampled", "two channels from elsewhere"],
)
def test_the_bundle_segments_as_predict_does(tmp_path: Path, preprocessing: Preprocessing, at: str) -> None:
    channels = len(preprocessing.intensity)
    checkpoint, _ = make_run(tmp_path, channels=channels, preprocessing=preprocessing)
    scans, bundle, segmentations = (tmp_path / name for name in ("scans", "bundle", "segmentations"))
    scans.mkdir()
    write_scans(scans, channels)
    assert main([str(checkpoint), "--output", str(bundle), "--format", "bundle"]) == 0
    (tmp_path / "without" / "sslfast.py").parent.mkdir()
    (tmp_path / "without" / "sslfast.py").write_text("raise ImportError('a bundle needs no sslfast')")
    root = os.path.relpath(bundle, tmp_path / at)
    command = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/inference.json", "--bundle_root", root]
    result = subprocess.run(
        [sys.executable, *command, "--dataset_dir", str(scans), "--output_dir", str(segmentations)],
        cwd=tmp_path / at,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "without")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    flags = ["--checkpoint", str(checkpoint), "--images", str(scans), "--precision", "fp32", "--no-report"]
    assert predict([*flags, "--output", str(tmp_path / "predicted")]) == 0
    predicted = sorted((tmp_path / "predicted").glob("*.nii.gz"))
    assert [path.name for path in predicted] == sorted(path.name for path in segmentations.iterdir())
    equal = []
    for path in predicted:
        expected, found = nib.load(path), nib.load(segmentations / path.name)
        assert found.shape == expected.shape
        assert found.get_data_dtype() == np.uint8
        unit = 1e3 if expected.header.get_xyzt_units()[0] == "meter" else 1.0  # a bundle writes mm
        assert np.allclose(found.affine, np.diag([unit, unit, unit, 1]) @ expected.affine, atol=1e-4)
        equal.append((np.asarray(expected.dataobj) == np.asarray(found.dataobj)).ravel())
        assert len(np.unique(expected.dataobj)) > 1
    assert np.concatenate(equal).mean() >= 0.9999


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a bundle for two channels, in which this process is."""
    folder = export_bundle(make_run(tmp_path, channels=2)[1], tmp_path / "bundle", "a")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def test_metadata_are_by_the_schema_and_true(bundle: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"  # which MONAI takes if it is there, and else fetches
    schema.write_text(json.dumps(SCHEMA))
    metadata = "configs/metadata.json"
    verify_metadata(meta_file=metadata, filepath=schema)
    verify_net_in_out("network_def", meta_file=metadata, config_file="configs/inference.json", device="cpu")
    described = json.loads((bundle / metadata).read_text())
    tensors = described["network_data_format"]
    assert tensors["inputs"]["image"]["channel_def"] == {"0": "c0", "1": "c1"}
    assert tensors["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "liver", "2": "spleen"}
    made = tensors["post_processed_outputs"]["pred"]
    assert made["channel_def"] == {"0": "background", "5": "liver", "7": "spleen"}
    assert (made["dtype"], described["sslfast"]["networks"]) == ("uint8", "vnet")


def test_programs_find_the_parts_that_monai_asks_for(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    write_scans(tmp_path / "scans", 2)
    workflow = ConfigWorkflow(
        "configs/inference.json", workflow_type="infer", logging_file=False, dataset_dir=str(tmp_path / "scans")
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_what_the_user_filled_in_outlasts_another_export(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "configs" / "metadata.json"
    filled = json.loads(path.read_text()) | {"authors": "us", "copyright": "ours", "version": "0.2.0"}
    path.write_text(json.dumps(filled | {"task": "of before"}))
    flags = ["--output", str(bundle), "--format", "bundle", "--networks", "a"]
    assert main([str(tmp_path / "model.pt"), *flags]) == 0
    assert json.loads(path.read_text()) == filled


def test_the_page_says_how_to_run_it(bundle: Path) -> None:
    page = (bundle / "docs" / "README.md").read_text()
    assert "python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS" in page
    for said in ("`case_0001.nii.gz` (c1)", "its label maps differ", "window of 16 × 16 × 8", "| 2 | 7 | spleen |"):
        assert said in page
    assert main([str(bundle.parent / "model.pt"), "--output", str(bundle), "--format", "bundle"]) == 0
    assert "sslfast.predict --precision fp32" in (bundle / "docs" / "README.md").read_text()


@pytest.mark.parametrize("path", ["docs/README.md", "scripts/transforms.py", "models/model.ts"])
def test_files_of_others_are_kept(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = make_run(tmp_path)
    file = tmp_path / "out" / path
    file.parent.mkdir(parents=True)
    file.write_text("# Mine")
    assert main([str(checkpoint), "--output", str(tmp_path / "out"), "--format", "bundle"]) == 2
    assert "is not of an export, and would be replaced" in capsys.readouterr().err
    assert [found for found in (tmp_path / "out").rglob("*") if found.is_file()] == [file]
    assert file.read_text() == "# Mine"


def test_a_name_that_monai_would_evaluate_is_refused(tmp_path: Path) -> None:
    _, model = make_run(tmp_path)
    with pytest.raises(UserError, match=r"'\$exit\(\)' has a \$, @ or %"):
        export_bundle(replace(model, classes={0: "background", 1: "$exit()", 2: "b"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).touch()
    return str(folder)


def test_scans_are_found_by_name(tmp_path: Path) -> None:
    folder = touch(tmp_path, "b_0001.nii", "b_0000.nii", "a.NII.gz", "c.txt", ".d.nii")
    a, b = (str(tmp_path / name) for name in ("a.NII.gz", "b_0000.nii"))
    found = find_scans(folder, 2)
    assert found == [{"image": [a], "case": "a"}, {"image": [b, b.replace("_0000", "_0001")], "case": "b"}]
    (tmp_path / "b_0001.nii").unlink()
    assert [scan["case"] for scan in find_scans(folder, 1)] == ["a", "b_0000"]
    (tmp_path / "a.NII.gz").unlink()
    assert [scan["case"] for scan in find_scans(folder, 1)] == ["b"]


@pytest.mark.parametrize(
    ("names", "channels", "said"),
    [
        (["a.txt"], 1, "no NIfTI files"),
        (["a.nii", "a.nii.gz"], 1, "there twice"),
        (["a_0000.nii", "a_0002.nii"], 2, "a channel lacks"),
        (["a_0000.nii", "a_0001.nii", "a_0002.nii"], 2, "3 channels, not 2"),
    ],
)
def test_scans_without_order_are_refused(tmp_path: Path, names: list[str], channels: int, said: str) -> None:
    folder = touch(tmp_path, *names)
    with pytest.raises(ValueError, match=said):
        find_scans(folder, channels)


def test_a_4d_file_has_the_channels_of_several_files(tmp_path: Path) -> None:
    array = noise(4, 5, 6, 2)
    paths = [write_volume(tmp_path / f"{c}.nii", array[..., c], OBLIQUE) for c in range(2)]
    load = LoadImage(reader=ScanReader(), ensure_channel_first=True)
    of_one, of_two = load(write_volume(tmp_path / "4d.nii", array, OBLIQUE)), load(paths)
    assert np.array_equal(of_one, of_two)
    assert np.array_equal(of_one, np.moveaxis(array, -1, 0))
    assert np.allclose(of_one.affine, OBLIQUE)


def test_channels_on_other_grids_are_refused(tmp_path: Path) -> None:
    first = write_volume(tmp_path / "a.nii", noise(4, 5, 6), OBLIQUE)
    moved = OBLIQUE.copy()
    moved[0, 3] += 1
    for name, shape, affine in (("moved", (4, 5, 6), moved), ("larger", (4, 5, 7), OBLIQUE)):
        other = write_volume(tmp_path / f"{name}.nii", noise(*shape), affine)
        with pytest.raises(ValueError, match="do not lie on one grid"):
            ScanReader().read([first, other])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda image: image[:1], r"must be \[2, X, Y, Z\]"),
        (lambda image: image.index_fill(3, torch.tensor(0), torch.nan), "NaN or infinite"),
        (lambda image: image.clamp(max=-200), r"every voxel is -100 when clipped to \[-100, 300\]"),
        (lambda image: torch.cat((image[:1], torch.ones_like(image[:1]))), "every voxel is 1"),
    ],
    ids=["channels", "NaN", "window", "empty"],
)
def test_scans_without_anything_to_see_are_refused(change: Callable[[torch.Tensor], torch.Tensor], said: str) -> None:
    image = MetaTensor(change(200 * torch.randn(2, 4, 5, 6)), meta={"filename_or_obj": "a.nii"})
    with pytest.raises(ValueError, match=f"^a.nii .*{said}"):
        NormaliseChannelsd(["image"], ["ct", "zscore"], [-100, 300])({"image": image})


def test_a_unit_that_no_standard_has_is_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(4, 5, 6), OBLIQUE)
    image.header["xyzt_units"] = 7
    nib.save(image, tmp_path / "a.nii")
    assert np.allclose(ScanReader().read(tmp_path / "a.nii").affine, OBLIQUE)
