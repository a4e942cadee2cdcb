"""Every method's step: unlabelled volumes teach, backends agree, absent classes and empty sets do no harm."""

from __future__ import annotations

import math
import re

import pytest
import torch

import sslfast
from helpers.methods import SIZE, Given, step
from sslfast.errors import too_many_classes
from sslfast.methods import METHODS, find_method
from sslfast.methods.supervised import Supervised

LEARNING = [name for name in METHODS if find_method(name).uses_unlabelled and name != "as-released"]


@pytest.mark.parametrize("name", [*METHODS])
def test_more_than_32_classes_are_refused_in_one_sentence(name: str) -> None:
    method = find_method(name)
    with pytest.raises(ValueError, match=f"^{re.escape(too_many_classes(33))}$"):
        method(33, 10, 1, method.Options())
    assert method(32, 10, 1, method.Options()).num_classes == 32


@pytest.mark.parametrize("classes", [2, 4, 14])
@pytest.mark.parametrize("name", LEARNING)
def test_unlabelled_volumes_teach(name: str, classes: int) -> None:
    networks = [Given(classes), Given(classes)]
    result = step(name, classes, torch.randint(0, classes, (2, *SIZE)), networks)
    result.loss.backward()
    grads = [network.logits.grad for network in networks]
    assert all(torch.isfinite(g).all() and g[:2].any() for g in grads)
    assert any(g[2:].any() for g in grads) or (name == "bcp" and all(result.terms["pseudo"] > 0))  # it mixes the two
    assert all(torch.isfinite(value).all() and not value.requires_grad for value in result.terms.values())


@pytest.mark.parametrize("name", [*METHODS])
def test_the_kernels_give_what_the_reference_gives(name: str) -> None:
    networks = [Given(3), Given(3)]
    labels = torch.randint(-1, 3, (2, *SIZE))
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(7)
        with sslfast.backend(backend):
            loss = step(name, 3, labels, networks).loss
            leaves = [networks[0].logits, networks[1].logits]
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*METHODS])
@pytest.mark.parametrize(
    ("classes", "labelled"),
    [pytest.param(1, 2, id="absent classes"), pytest.param(4, 4, id="no unlabelled volume")],
)
def test_losses_and_gradients_stay_finite(name: str, classes: int, labelled: int) -> None:
    networks = [Given(4), Given(4)]
    result = step(name, 4, torch.randint(0, classes, (labelled, *SIZE)), networks)
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert all(torch.isfinite(network.logits.grad).all() for network in networks)


def test_a_name_of_an_earlier_version_is_answered_with_todays() -> None:
    with pytest.raises(TypeError, match=r"Mine\.turns_unlabelled was renamed to augments_unlabelled"):

        class Mine(Supervised):
            turns_unlabelled = True


def test_options_of_another_class_are_refused() -> None:
    with pytest.raises(TypeError, match="options of Supervised must be its Options, got int"):
        Supervised(2, 10, 1, 3)  # type: ignore[arg-type]
