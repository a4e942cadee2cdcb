"""Every method on real anatomy: twenty steps on patches of the demo cohorts, by the kernels and by the references."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from helpers.methods import make_method
from sslfast.data.demo.cohorts import COHORTS, write_cohort
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import read_image, read_label
from sslfast.methods import METHODS
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions

STEPS = 20
PATCH = 16


@pytest.fixture(scope="module", params=["demo", "demo-brain"])
def volumes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor, int]:
    """Four subjects on a coarse grid: images [4, 1, D, H, W], labels [4, D, H, W]; and the number of classes."""
    cohort = COHORTS[request.param]
    small = replace(cohort.parameters, training=4, validation=0, test=0, spacing=5.0, size=(30, 28, 26), size_jitter=0)
    folder = tmp_path_factory.mktemp(request.param)
    try:
        write_cohort(replace(cohort, parameters=replace(small, clipped=0.0)), folder)
    except sslfast.UserError as error:
        pytest.skip(str(error))
    cases = open_dataset(folder).training
    classes = len(cohort.classes)
    images = np.stack([read_image(case.image).array for case in cases])
    labels = np.stack([read_label(case.label, classes=range(classes)).array for case in cases])
    images = (images - images.mean((1, 2, 3), keepdims=True)) / images.std((1, 2, 3), keepdims=True)
    return torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(labels).long(), classes


@pytest.mark.parametrize("name", [*METHODS])
def test_twenty_steps_learn_and_give_the_references_losses(name: str, volumes: tuple[Tensor, Tensor, int]) -> None:
    images, labels, classes = volumes
    torch.manual_seed(3)
    networks = build_networks(NetworkOptions(width=4, depth=2, norm="instance", dropout=0.0), classes)
    # at percentile 100, rounding chooses the anchors
    method = make_method(name, classes, STEPS, 3, percentile=(80, 80), gate=(0.0, 0.0), ramp=0.1)
    method.prepare(*networks)
    parameters = [p for part in (*networks, method) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-2)
    from_unlabelled = 0.0
    for step in range(STEPS):
        corner = [int(torch.randint(size - PATCH + 1, ())) for size in images.shape[2:]]
        box = (..., *(slice(c, c + PATCH) for c in corner))
        patches = images[box].clone().requires_grad_()
        if step % 5 == 4:
            with torch.random.fork_rng(), torch.no_grad(), sslfast.backend("reference"):
                expected = copy.deepcopy(method).step(*networks, images[box], labels[box][:2], step).loss
        with sslfast.backend("cpu"):
            loss = method.step(*networks, patches, labels[box][:2], step).loss
        if step % 5 == 4:
            torch.testing.assert_close(
                loss.detach(), expected, rtol=2e-3, atol=1e-5
            )  # some voxels are at the percentile
        optimizer.zero_grad()
        loss.backward()
        assert patches.grad is not None
        assert all(torch.isfinite(p.grad).all() for p in (*parameters, patches) if p.grad is not None)
        from_unlabelled = max(from_unlabelled, float(patches.grad[2:].abs().max()))
        optimizer.step()
    learns = method.uses_unlabelled and name != "as-released"
    assert (from_unlabelled > 0) == learns
