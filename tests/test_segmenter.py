"""Segmentation from Python: files, arrays, maps, mirrored windows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sslfast
from helpers.models import OBLIQUE, Bright, make_model
from helpers.volumes import noise, write_volume
from sslfast.data.nifti import read_channels
from sslfast.model import Model
from sslfast.options import MirrorAxis, Preprocessing, Windows
from sslfast.predict import main
from sslfast.quality import MEASURES, read_rows
from sslfast.segmenter import Extras, Segmenter, segment
from sslfast.training.checkpoint import save_checkpoint


def saved(tmp_path: Path, spacing: float | None = None) -> Path:
    """A checkpoint of networks that predict both classes in noise, and do not agree."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "model.pt", {"model": make_model(Preprocessing(spacing=spacing)).state()})
    return tmp_path / "model.pt"


def test_a_file_is_segmented_as_by_the_command(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "scans" / "scan.nii.gz", noise(21, 15, 18), OBLIQUE)
    checkpoint = saved(tmp_path)
    out = tmp_path / "out"
    assert main(["--checkpoint", str(checkpoint), "--images", str(path), "--output", str(out), "--device", "cpu"]) == 0
    segmenter = sslfast.load(checkpoint, device="cpu")
    result = segmenter.segment(path)
    assert np.array_equal(result.labels, np.asarray(nib.load(out / "scan.nii.gz").dataobj))
    row = read_rows(out)["scan"]
    assert {name: row[f"{name} x"] for name in MEASURES} == pytest.approx(result.quality["x"], rel=1e-5)
    assert segmenter.agreement(path) == {"x": result.quality["x"]["agreement"]}
    assert segmenter.classes == {0: "background", 1: "x"}


@pytest.mark.parametrize("spacing", [None, 0.8])
def test_an_array_is_segmented_as_its_file(tmp_path: Path, spacing: float | None) -> None:
    array = noise(17, 15, 18)
    path = write_volume(tmp_path / "scan.nii.gz", array, np.diag([0.75, 1, 1.5, 1]))
    segmenter = sslfast.load(saved(tmp_path, spacing), device="cpu")
    from_file = segmenter.segment(str(path))
    from_array = segmenter.segment(array, spacing=(0.75, 1, 1.5))
    assert np.array_equal(from_file.labels, from_array.labels)
    assert from_file.quality["x"] == pytest.approx(from_array.quality["x"], rel=1e-6)
    probabilities = segmenter.probabilities(array[None], spacing=(0.75, 1, 1.5))
    assert probabilities.shape == (2, 17, 15, 18)
    assert np.array_equal(probabilities.argmax(0), from_array.labels)


@pytest.mark.parametrize(
    ("given", "spacing", "message"),
    [
        (
            noise(9, 9, 9),
            None,
            "an array needs its spacing, three positive numbers in mm along X, Y and Z; this one",
        ),
        (noise(9, 9, 9), (1, 1), "needs its spacing"),
        (noise(9, 9, 9), (1, 0, 1), "needs its spacing"),
        (noise(9, 9, 9)[0], (1, 1, 1), "has shape (9, 9) and dtype float32; it must be numbers"),
        (
            np.stack([noise(9, 9, 9)] * 2),
            (1, 1, 1),
            "the array has 2 channels; the networks were trained with 1: image",
        ),
        (np.zeros((9, 9, 9)), (1, 1, 1), "the array is empty: every voxel is 0"),
        (np.full((9, 9, 9), np.nan), (1, 1, 1), "NaN or infinite"),
        (np.array([["a"]]), (1, 1, 1), "it must be numbers"),
        ("missing.nii.gz", None, "missing.nii.gz does not exist"),
        ([], None, "there is no file to segment"),
        ("missing.nii.gz", (1, 1, 1), "spacing belongs to an array; a file has its own"),
    ],
)
def test_a_volume_that_cannot_be_segmented_is_named(tmp_path: Path, given: Any, spacing: Any, message: str) -> None:
    segmenter = sslfast.load(saved(tmp_path), device="cpu")
    with pytest.raises(sslfast.UserError) as error:
        segmenter.segment(given, spacing=spacing)
    assert message in str(error.value)


@pytest.mark.parametrize("spacing", [None, 0.8])
def test_maps_lie_on_the_scans_grid(tmp_path: Path, spacing: float | None) -> None:
    path = write_volume(tmp_path / "scans" / "scan.nii.gz", noise(21, 15, 18), OBLIQUE)
    checkpoint, out = saved(tmp_path, spacing), tmp_path / "out"
    flags = ["--checkpoint", str(checkpoint), "--images", str(path), "--output", str(out), "--precision", "fp32"]
    flags += ["--device", "cpu", "--probabilities", "all", "--uncertainty", "--disagreement"]
    assert main(flags) == 0
    files = {str(file.relative_to(out)): nib.load(file) for file in out.rglob("*.nii.gz")}
    assert sorted(files) == [
        "disagreement/scan.nii.gz",
        "probabilities/scan_0-background.nii.gz",
        "probabilities/scan_1-x.nii.gz",
        "scan.nii.gz",
        "uncertainty/scan_entropy.nii.gz",
        "uncertainty/scan_mutual-information.nii.gz",
    ]
    assert all(np.array_equal(file.affine, files["scan.nii.gz"].affine) for file in files.values())
    assert len({bytes(file.header["descrip"]) for file in files.values()}) == 1
    maps = {name: file.get_fdata() for name, file in files.items()}
    p = np.stack([maps["probabilities/scan_0-background.nii.gz"], maps["probabilities/scan_1-x.nii.gz"]])
    expected = sslfast.load(checkpoint, device="cpu", precision="fp32").probabilities(path)
    assert np.allclose(p, expected, atol=2e-5)
    if spacing is None:
        assert np.allclose(maps["uncertainty/scan_entropy.nii.gz"], -(p * np.log(p)).sum(0), atol=1e-4)
    assert maps["uncertainty/scan_mutual-information.nii.gz"].min() >= -1e-6
    assert 0 <= maps["disagreement/scan.nii.gz"].min() < maps["disagreement/scan.nii.gz"].max() <= 1 + 1e-6


def test_a_lost_map_is_made_again_and_a_foreign_one_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_volume(tmp_path / "scans" / "scan.nii.gz", noise(9, 9, 9))
    out = tmp_path / "out"
    flags = ["--checkpoint", str(saved(tmp_path)), "--images", str(path), "--output", str(out), "--device", "cpu"]
    assert main([*flags, "--disagreement"]) == 0
    (out / "disagreement" / "scan.nii.gz").unlink()
    assert main([*flags, "--disagreement"]) == 0
    assert (out / "disagreement" / "scan.nii.gz").exists()
    assert main([*flags, "--disagreement"]) == 0
    assert "1 of 1 segmentations are in" in capsys.readouterr().out
    write_volume(out / "uncertainty" / "scan_entropy.nii.gz", noise(9, 9, 9))
    assert main([*flags, "--uncertainty"]) == 2
    assert "would replace, the first" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--probabilities", "--largest-component"])
def test_a_class_that_does_not_exist_is_named(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_volume(tmp_path / "scan.nii.gz", noise(9, 9, 9))
    flags = ["--checkpoint", str(saved(tmp_path)), "--images", str(path), "--output", str(tmp_path / "out")]
    assert main([*flags, flag, "liver"]) == 2
    assert f"{flag} liver: the networks have no such class; choose from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_the_largest_component_is_kept(tmp_path: Path) -> None:
    array = np.full((12, 12, 12), -1.0)
    array[1:5, 1:5, 1:5] = array[8:10, 8:10, 8:10] = 1
    model = replace(make_model(Preprocessing(intensity="none")), network_a=Bright(), network_b=Bright())
    before = Segmenter(model).segment(array, spacing=(1, 1, 1))
    after = Segmenter(model, largest=[1]).segment(array, spacing=(1, 1, 1))
    assert (before.quality["x"]["components"], after.quality["x"]["components"]) == (2, 1)
    assert after.quality["x"]["volume_ml"] == pytest.approx(0.064)
    assert np.array_equal(after.labels[:8], array[:8] > 0)
    assert not after.labels[8:].any()
    with pytest.raises(sslfast.UserError, match="largest: \\[3\\] are no values of classes"):
        sslfast.load(saved(tmp_path), largest=[3])


class Sided(nn.Module):
    """Says left where the image is above 0 and x is low, right where it is and x is high."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.linspace(-1, 1, images.shape[2]).view(1, 1, -1, 1, 1)
        bright = self.scale * images
        return torch.cat((-bright, bright * (place < 0), bright * (place >= 0)), 1), images


def test_mirrored_windows_exchange_left_and_right() -> None:
    model = make_model(Preprocessing(intensity="none"))
    classes = {0: "background", 1: "left lung", 2: "right lung"}
    model = replace(model, classes=classes, network_a=Sided(), network_b=Sided(), mirrored=("left-right",))
    array = noise(8, 8, 8)
    plain = Segmenter(model, precision="fp32").probabilities(array, spacing=(1, 1, 1))
    mirrored = Segmenter(model, precision="fp32", windows=Windows(mirror=True)).probabilities(array, spacing=(1, 1, 1))
    assert np.allclose(plain, mirrored, atol=1e-6)


def test_mirrored_windows_are_the_mean_over_all_flips() -> None:
    axes: tuple[MirrorAxis, ...] = ("left-right", "head-foot")
    model = replace(make_model(Preprocessing(intensity="none")), mirrored=axes)
    model.network_a.eval()
    model.network_b.eval()
    array = noise(8, 8, 8)
    found = Segmenter(model, precision="fp32", windows=Windows(mirror=True)).probabilities(array, spacing=(1, 1, 1))
    plain = Segmenter(model, precision="fp32")
    flips = [list(chosen) for n in range(3) for chosen in itertools.combinations((0, 2), n)]
    each = [
        np.flip(plain.probabilities(np.flip(array, axes), spacing=(1, 1, 1)), [1 + axis for axis in axes])
        for axes in flips
    ]
    assert np.allclose(found, np.mean(each, 0), atol=1e-6)


def test_networks_that_never_saw_a_mirror_are_not_given_one(tmp_path: Path) -> None:
    with pytest.raises(sslfast.UserError, match="--mirror: these networks were trained without mirrored volumes"):
        sslfast.load(saved(tmp_path), windows=Windows(mirror=True))


def test_a_checkpoint_keeps_the_mirrored_axes() -> None:
    model = replace(make_model(), mirrored=("front-back",))
    assert Model.restore(model.state()).mirrored == ("front-back",)
    state = model.state()
    del state["mirrored"]
    assert Model.restore(state).mirrored == ()


def test_without_maps_nothing_is_written(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "scan.nii.gz", noise(9, 9, 9))
    assert segment(make_model(), read_channels([path]), extras=Extras()).maps is None
