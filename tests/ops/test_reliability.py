"""Entropy percentiles against numpy, every flag against its definition, and the kernels against both."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.maps import DTYPES, random_map
from helpers.options import TARGET, kernels_and_reference, not_on, on_every_backend, only_on, some
from sslfast.ops import reliability
from sslfast.ops.backend import backend, ops_for
from sslfast.ops.flags import CLASS, RELIABLE, is_reliable, pseudo_label
from sslfast.ops.reduce import SINGLE_PROCESS, exact_percentiles
from sslfast.ops.reliability import exact_percentile, reliability_ref


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("percentile", [-3.0, 150.0, float("nan"), -1e300])
def test_a_percentile_out_of_range_is_refused_or_makes_the_threshold_of_a_gpu_nan(name: str, percentile: float) -> None:
    logits, wanted = random_map(2, 3, (4, 5, 6)), torch.tensor(percentile, dtype=torch.float64)
    with backend(name):
        if TARGET.device == "cuda":
            assert reliability(logits, wanted).threshold.isnan()
            return
        for given in (percentile, wanted):
            with pytest.raises(ValueError, match=re.escape(f"percentile is {percentile}; it must be from 0 to 100")):
                reliability(logits, given)
    if name != "reference":
        threshold, flags = ops_for(logits).reliability(logits, None, wanted)
        assert threshold.isnan()
        assert not is_reliable(flags).any()
    assert reliability_ref(logits, wanted).threshold.isnan()
    assert exact_percentiles(logits.abs().flatten(), wanted, SINGLE_PROCESS).isnan()


def random_logits(volumes: int = 2, classes: int = 3, size: tuple[int, ...] = (4, 5, 3)) -> Tensor:
    return 2 * torch.randn(volumes, classes, *size, dtype=torch.float64)


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy()


@pytest.mark.parametrize("size", [1, 2, 3, 31, 1000, 65537])
@pytest.mark.parametrize("percentile", [0, 0.1, 20, 50, 83.7, 99.9, 100])
def test_a_percentile_is_numpys(size: int, percentile: float) -> None:
    values = torch.rand(size, dtype=torch.float64)
    assert exact_percentile(values, percentile).item() == np.percentile(values.numpy(), percentile)
    single = values.float()
    expected = np.float32(np.percentile(single.double().numpy(), percentile))
    assert exact_percentile(single, percentile).item() == expected


def test_the_references_percentile_of_more_than_2_to_the_24_values_is_numpys() -> None:
    values = torch.rand(2**24 + 12345)
    for percentile in (20.0, 99.999):
        expected = np.float32(np.percentile(values.double().numpy(), percentile))
        assert exact_percentile(values, percentile).item() == expected


def test_a_percentile_of_nothing_is_zero_and_one_of_nan_is_nan() -> None:
    assert exact_percentile(torch.empty(0), 20).item() == 0
    assert exact_percentile(torch.tensor([0.1, float("nan"), 0.3]), 20).isnan()


@pytest.mark.parametrize("classes", [2, 4, 32])
def test_flags_are_the_class_and_whether_the_entropy_is_below_the_threshold(classes: int) -> None:
    logits = random_logits(classes=classes)
    threshold, flags = reliability(logits, 60)
    entropies = entropy(logits)
    assert threshold.item() == pytest.approx(np.percentile(entropies.numpy(), 60), rel=1e-12)
    assert flags.dtype == torch.uint8
    assert torch.equal(pseudo_label(flags), logits.argmax(1))
    assert torch.equal(is_reliable(flags), entropies < threshold)
    assert not (flags & ~(CLASS | RELIABLE)).any()


def test_ties_go_to_the_lowest_class_and_equal_entropies_are_unreliable() -> None:
    threshold, flags = reliability(torch.zeros(1, 4, 3, 3, 3), 50)
    assert threshold.item() == pytest.approx(np.log(4))
    assert not flags.any()


def test_no_unlabelled_volume_gives_threshold_zero_and_no_flags() -> None:
    threshold, flags = reliability(torch.zeros(0, 2, 4, 4, 4), 50)
    assert threshold.item() == 0
    assert flags.shape == (0, 4, 4, 4)


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_logits_show_in_the_threshold_and_leave_no_voxel_reliable(name: str, bad: float) -> None:
    logits = random_logits().to(torch.float64 if name == "reference" else torch.float32)
    logits[0, 1, 0, 0, 0] = bad
    for percentile in (0, 50, 100):
        with backend(name):
            threshold, flags = reliability(logits, percentile)
        assert threshold.isnan()
        assert not is_reliable(flags).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_keep_their_entropy(dtype: torch.dtype) -> None:
    for sign in (1, -1):
        threshold, _ = reliability(sign * torch.full((1, 2, 2, 2, 2), 1e4).to(dtype), 50)
        assert threshold.item() == pytest.approx(np.log(2), rel=1e-6)
        assert threshold.dtype == torch.float32


def test_layouts_give_the_same_bytes() -> None:
    logits = random_logits(size=(6, 4, 5))
    _, expected = reliability(logits, 70)
    for other in (logits.to(memory_format=torch.channels_last_3d), logits.movedim(2, 4).contiguous().movedim(4, 2)):
        assert torch.equal(reliability(other, 70).flags, expected)


def test_no_gradient_flows() -> None:
    threshold, _ = reliability(random_logits().requires_grad_(), 50)
    assert not threshold.requires_grad


def test_refusals_name_the_argument() -> None:
    with pytest.raises(ValueError, match="percentile is 101"):
        reliability(random_logits(), 101)
    with pytest.raises(ValueError, match="logits has 1 classes"):
        reliability(random_logits(classes=1), 50)
    with pytest.raises(TypeError, match="logits has dtype"):
        reliability(random_logits().long(), 50)


# The kernels


@on_every_backend
@not_on("reference")
@pytest.mark.parametrize("dtype", some(DTYPES, 1))
@pytest.mark.parametrize("classes", some([5, 2, 32], 2))
def test_thresholds_are_numpys_and_flags_follow_from_them(classes: int, dtype: torch.dtype) -> None:
    z = random_map(2, classes, (13, 14, 15), dtype)
    entropy = ops_for(z).voxel_entropy(z, None)
    torch.testing.assert_close(entropy.double(), torch.special.entr(z.double().softmax(1)).sum(1), rtol=0, atol=1e-6)
    for percentile in some([37.3, 0.0, 50.0, 100.0], 2):
        threshold, flags = reliability(z, percentile)
        assert threshold.item() == np.float32(np.percentile(entropy.cpu().double().numpy(), percentile))
        assert torch.equal(flags, (z.argmax(1) + RELIABLE * (entropy < threshold)).byte())
        assert torch.equal(reliability(z, torch.tensor(percentile, dtype=torch.float64)).flags, flags)
        with backend("reference"):
            torch.testing.assert_close(threshold, reliability(z, percentile).threshold, rtol=1e-5, atol=1e-6)


@on_every_backend
@only_on("cpu")
def test_a_percentile_of_more_than_2_to_the_24_voxels_is_numpys() -> None:
    z = torch.randn(1, 2, 1, 2**24 + 77)
    entropy = ops_for(z).voxel_entropy(z, None).double().numpy()
    assert reliability(z, 66.6).threshold.item() == np.float32(np.percentile(entropy, 66.6))


@on_every_backend
@not_on("reference")
@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("percentile", some([50.0, 100.0, 0.0, 20.0, 99.9], 3))
def test_equal_entropies_give_numpys_threshold(values: int, percentile: float) -> None:
    z = torch.randint(0, values, (2, 1, 9, 10, 11)).float() * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    threshold, flags = reliability(z, percentile)
    entropy = ops_for(z).voxel_entropy(z, None)
    assert threshold.item() == np.float32(np.percentile(entropy.cpu().double().numpy(), percentile))
    assert torch.equal(flags >= RELIABLE, entropy < threshold)


@on_every_backend
@not_on("triton-interpreted")
def test_more_equal_entropies_than_16_bits_can_count_are_counted() -> None:
    z = torch.zeros(1, 2, 140_000)
    z[:, 1, 500:1500] = 3
    threshold, flags = reliability(z, 50)
    assert float(threshold) == pytest.approx(np.log(2), rel=1e-6)
    assert torch.equal(is_reliable(flags), z[:, 1] > 0)


@on_every_backend
@not_on("reference")
def test_a_threshold_that_is_given_decides_the_flags() -> None:
    z, given, unused = random_map(2, 3, (7, 8, 9)), torch.rand(()), torch.tensor(20.0, dtype=torch.float64)
    threshold, flags = ops_for(z).reliability(z, None, unused, given)
    assert torch.equal(threshold, given)
    differs = flags != reliability_ref(z, unused, given).flags
    assert differs.float().mean() < 1e-2  # an entropy may lie within rounding of the threshold
