"""Prediction: the scan's own geometry to the bit, and scans that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_volume
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from sslfast.data.nifti import read_image
from sslfast.data.volumes import from_grid, image_to_grid
from sslfast.inference import predict_probabilities, probability_slabs, segment
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions, Preprocessing, Windows
from sslfast.predict import main
from sslfast.training.checkpoint import Model, save_checkpoint

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.array([[0, 0, -1.7], [0.9, 0, 0], [0, -1.3, 0]]), [12.5, -40, 7]
)


def make_model(preprocessing: Preprocessing | None = None) -> Model:
    options = NetworkOptions(width=2, depth=2)
    networks = build_networks(options, 2)
    return Model(options, preprocessing or Preprocessing(), {0: "background", 1: "x"}, (8, 8, 8), *networks)


def run(tmp_path: Path, images: Path, *flags: str) -> int:
    save_checkpoint(tmp_path / "model.pt", {"model": make_model().state()})
    paths = ["--checkpoint", str(tmp_path / "model.pt"), "--images", str(images), "--output", str(tmp_path / "out")]
    return main([*paths, "--device", "cpu", *flags])


@pytest.mark.parametrize("size", [(13, 9, 11), (5, 17, 3)])
def test_oblique_affine_and_odd_shape_come_back_exactly(tmp_path: Path, size: tuple[int, int, int]) -> None:
    array = np.random.default_rng().normal(size=size).astype(np.float32)
    write_volume(tmp_path / "scans" / "scan.nii.gz", array, OBLIQUE)
    assert run(tmp_path, tmp_path / "scans") == 0
    scan, written = (nib.load(tmp_path / folder / "scan.nii.gz") for folder in ("scans", "out"))
    assert written.shape == size
    assert np.array_equal(written.affine, scan.affine)
    for field in ("sform_code", "qform_code", "pixdim", "xyzt_units"):
        assert np.array_equal(written.header[field], scan.header[field]), field
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1}


class Bright(nn.Module):
    """Says class 1 where the image is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((-self.scale * images, self.scale * images), 1), images


@pytest.mark.parametrize("spacing", [None, 0.8])
def test_the_segmentation_lies_where_the_structure_is(tmp_path: Path, spacing: float | None) -> None:
    array = np.full((21, 15, 18), -1, np.float32)
    array[4:12, 5:9, 2:14] = 1
    path = write_volume(tmp_path / "scan.nii.gz", array, OBLIQUE)
    model = make_model(Preprocessing(spacing=spacing, intensity="none"))
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), Bright(), Bright())
    segmentation = segment(model, read_image(path), precision="fp32")
    overlap = 2 * (segmentation * (array > 0)).sum() / (segmentation.sum() + (array > 0).sum())
    assert overlap == 1


def test_windows_are_blended_to_the_networks_own_answer() -> None:
    model = make_model()
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), Bright(), Bright())
    image = np.random.default_rng().normal(size=(19, 8, 12)).astype(np.float32)
    whole = Bright()(torch.from_numpy(image)[None, None])[0].softmax(1)[0]
    assert torch.allclose(predict_probabilities(model, image, precision="fp32"), whole, atol=1e-5)


def test_the_mean_of_both_networks_counts() -> None:
    model = make_model()
    model.network_a.eval()
    model.network_b.eval()
    image = np.random.default_rng().normal(size=(8, 8, 8)).astype(np.float32)
    with torch.no_grad():
        single = [
            net(torch.from_numpy(image)[None, None])[0].softmax(1)[0] for net in (model.network_a, model.network_b)
        ]
    result = predict_probabilities(model, image, precision="fp32")
    assert torch.allclose(result, (single[0] + single[1]) / 2, atol=1e-5)
    assert torch.allclose(result.sum(0), torch.ones(8, 8, 8), atol=1e-5)


def test_one_bad_scan_does_not_cost_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "c"):
        write_volume(
            tmp_path / "scans" / f"{name}.nii.gz", np.random.default_rng().normal(size=(9, 9, 9)).astype(np.float32)
        )
    (tmp_path / "scans" / "b.nii.gz").write_bytes(b"broken")
    assert run(tmp_path, tmp_path / "scans") == 2
    error = capsys.readouterr().err
    assert "1 of 3 scans could not be read" in error
    assert "b.nii.gz" in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]


def test_one_scan(tmp_path: Path) -> None:
    scan = write_volume(tmp_path / "one.nii", np.random.default_rng().normal(size=(9, 9, 9)).astype(np.float32))
    assert run(tmp_path, scan) == 0
    assert (tmp_path / "out" / "one.nii.gz").exists()


@pytest.mark.parametrize("kind", ["empty", "missing", "no-nifti"])
def test_bad_input(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scan.png").write_bytes(b"x")
    path = {"empty": tmp_path / "scans", "missing": tmp_path / "no.nii.gz", "no-nifti": tmp_path / "scan.png"}[kind]
    assert run(tmp_path, path) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "Traceback" not in error


def test_scans_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "out" / "a.nii.gz", np.zeros((9, 9, 9), np.float32))
    assert run(tmp_path, tmp_path / "out") == 2
    assert "would replace them" in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_volume(tmp_path / "a.nii.gz", np.zeros((9, 9, 9), np.float32))
    flags = ["--checkpoint", str(tmp_path), "--images", str(images), "--output", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_the_published_windows_give_what_window_by_window_gives() -> None:
    from benchmarks import inference

    model = make_model()
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), *build_networks(model.options, 2))
    model.network_a.eval()
    model.network_b.eval()
    image = np.random.default_rng().normal(size=(31, 26, 13)).astype(np.float32)
    windows = Windows(strides=(5, 7, 4), blend="constant", at_once=3)
    expected = inference.window_by_window(model, image, windows.strides)
    found = predict_probabilities(model, image, precision="fp32", windows=windows)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(31, 26, 13), (8, 8, 8), (5, 3, 19), (30, 4, 6)])
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_slabs_are_monais_sliding_window(size: tuple[int, int, int], blend: Literal["gaussian", "constant"]) -> None:
    model = make_model()
    model.network_a.eval()
    model.network_b.eval()
    image = np.random.default_rng().normal(size=size).astype(np.float32)

    def mean_softmax(patches: torch.Tensor) -> torch.Tensor:
        return (model.network_a(patches)[0].softmax(1) + model.network_b(patches)[0].softmax(1)) / 2

    with torch.inference_mode():
        expected = sliding_window_inference(
            torch.from_numpy(image)[None, None],
            model.patch,
            2,
            mean_softmax,
            overlap=0.5,
            mode=blend,
            cval=float(image.min()),
        )
    slabs = list(probability_slabs(model, image, precision="fp32", windows=Windows(blend=blend, at_once=3)))
    assert max(slab.shape[1] for slab in slabs) <= model.patch[0]
    assert len(slabs) == max(1, -(-(size[0] - model.patch[0]) // (model.patch[0] // 2)) + 1)
    torch.testing.assert_close(torch.cat(slabs, 1), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spacing", [None, 0.7])
def test_the_segmentation_is_the_most_probable_class(tmp_path: Path, spacing: float | None) -> None:
    path = write_volume(
        tmp_path / "scan.nii.gz", np.random.default_rng().normal(size=(21, 15, 18)).astype(np.float32), OBLIQUE
    )
    model = make_model(Preprocessing(spacing=spacing))
    model.network_a.eval()
    model.network_b.eval()
    volume = read_image(path)
    probabilities = predict_probabilities(model, image_to_grid(volume, model.preprocessing), precision="fp32")
    expected = from_grid(probabilities, volume, model.preprocessing).argmax(0)
    assert np.array_equal(segment(model, volume, precision="fp32"), expected.numpy())


@pytest.mark.parametrize("flags", [("--strides", "0", "1", "1"), ("--overlap", "1"), ("--at-once", "0")])
def test_windows_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", np.zeros((9, 9, 9), np.float32))
    assert run(tmp_path, tmp_path / "scans", *flags) == 2
    assert flags[0] in capsys.readouterr().err
