"""Sliding windows: MONAI's results in slabs, both networks' mean, the place in space."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from benchmarks import inference
from helpers.models import OBLIQUE, Bright, make_model
from helpers.volumes import noise, write_volume
from sslfast.data.nifti import read_image
from sslfast.data.volumes import from_grid, image_to_grid
from sslfast.inference import predict_probabilities, probability_slabs
from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.options import Preprocessing, Windows
from sslfast.quality import WindowScores
from sslfast.segmenter import segment


@pytest.mark.parametrize("spacing", [None, 0.8])
def test_the_segmentation_lies_where_the_structure_is(tmp_path: Path, spacing: float | None) -> None:
    array = np.full((21, 15, 18), -1, np.float32)
    array[4:12, 5:9, 2:14] = 1
    path = write_volume(tmp_path / "scan.nii.gz", array, OBLIQUE)
    model = make_model(Preprocessing(spacing=spacing, intensity="none"))
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), Bright(), Bright())
    segmentation = segment(model, read_image(path), precision="fp32").labels
    overlap = 2 * (segmentation * (array > 0)).sum() / (segmentation.sum() + (array > 0).sum())
    assert overlap == 1


def test_windows_are_blended_to_the_networks_own_answer() -> None:
    model = make_model()
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), Bright(), Bright())
    image = noise(19, 8, 12)
    whole = Bright()(torch.from_numpy(image)[None, None])[0].softmax(1)[0]
    assert torch.allclose(predict_probabilities(model, image[None], precision="fp32"), whole, atol=1e-5)


def test_the_mean_of_both_networks_counts() -> None:
    model = make_model()
    model.network_a.eval()
    model.network_b.eval()
    image = noise(8, 8, 8)
    with torch.no_grad():
        single = [
            net(torch.from_numpy(image)[None, None])[0].softmax(1)[0] for net in (model.network_a, model.network_b)
        ]
    result = predict_probabilities(model, image[None], precision="fp32")
    assert torch.allclose(result, (single[0] + single[1]) / 2, atol=1e-5)
    assert torch.allclose(result.sum(0), torch.ones(8, 8, 8), atol=1e-5)


def test_the_published_windows_give_what_window_by_window_gives() -> None:
    model = make_model()
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), *build_networks(model.options, 2))
    model.network_a.eval()
    model.network_b.eval()
    image = noise(31, 26, 13)
    windows = Windows(strides=(5, 7, 4), blend="constant", at_once=3)
    expected = inference.window_by_window(model, image, windows.strides)
    probabilities = predict_probabilities(model, image[None], precision="fp32", windows=windows)
    assert torch.allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(31, 26, 13), (8, 8, 8), (5, 3, 19), (30, 4, 6)])
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_slabs_are_monais_sliding_window(size: tuple[int, int, int], blend: Literal["gaussian", "constant"]) -> None:
    model = make_model()
    model.network_a.eval()
    model.network_b.eval()
    image = noise(*size)

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
    slabs = list(probability_slabs(model, image[None], precision="fp32", windows=Windows(blend=blend, at_once=3)))
    assert max(slab.shape[1] for slab in slabs) <= model.patch[0]
    assert len(slabs) == max(1, -(-(size[0] - model.patch[0]) // (model.patch[0] // 2)) + 1)
    torch.testing.assert_close(torch.cat(slabs, 1), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spacing", [None, 0.7])
def test_the_segmentation_is_the_most_probable_class(tmp_path: Path, spacing: float | None) -> None:
    path = write_volume(tmp_path / "scan.nii.gz", noise(21, 15, 18), OBLIQUE)
    model = make_model(Preprocessing(spacing=spacing))
    model.network_a.eval()
    model.network_b.eval()
    volume = read_image(path)
    probabilities = predict_probabilities(model, image_to_grid(volume, model.preprocessing), precision="fp32")
    expected = from_grid(probabilities, volume, model.preprocessing).argmax(0)
    assert np.array_equal(segment(model, volume, precision="fp32").labels, expected.numpy())


def test_padding_counts_in_no_score() -> None:
    """Networks that agree within the scan and differ in its padding, which is darker."""

    class Dark(Bright):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits, features = super().forward(images)
            return torch.where(images == images.min(), logits.flip(1), logits), features

    image = torch.rand(1, 4, 12, 4).numpy() + 0.5
    image[0, 0, 0, 0] = -1
    model = make_model()
    model = Model(model.options, model.preprocessing, model.classes, (8, 8, 8), Bright(), Dark())
    scores = WindowScores(2)
    list(probability_slabs(model, image, precision="fp32", scores=scores))
    agreement = scores.scores()["agreement"][0]
    assert 0.98 < agreement < 1  # all but the one voxel


def test_an_image_of_other_channels_is_refused() -> None:
    for image in (noise(2, 8, 8, 8), noise(8, 8, 8)):
        with pytest.raises(ValueError, match=r"image has shape \(.*8, 8, 8\); it must be \[1, X, Y, Z\]"):
            predict_probabilities(make_model(), image)
