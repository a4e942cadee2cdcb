"""Methods with given options, and networks with given outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sslfast import DualLoss
from sslfast.methods import find_method
from sslfast.methods.method import Method

SIZE = (6, 7, 8)


def make_method(name: str, num_classes: int, steps: int, seed: int, **wanted: object) -> Method:
    """The method of this name, with those of the wanted options that it has."""
    method = find_method(name)
    names = {field.name for field in dataclasses.fields(method.Options)}
    return method(num_classes, steps, seed, method.Options(**{k: v for k, v in wanted.items() if k in names}))


class Given(nn.Module):
    """A network whose outputs are given, and which notes what it is shown."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(2 * torch.randn(4, classes, *SIZE))
        self.features = nn.Parameter(torch.randn(4, 5, *SIZE))
        self.width = 5
        self.shown: list[tuple[Tensor, bool, bool]] = []  # images, whether in training, whether with gradients

    def forward(self, images: Tensor, linear: bool = False) -> tuple[Tensor, Tensor]:
        self.shown.append((images.detach().clone(), self.training, torch.is_grad_enabled()))
        return self.logits[: len(images)], self.features[: len(images)]


def step(name: str, classes: int, labels: Tensor, networks: list[Given], images: int = 4, **options: Any) -> DualLoss:
    """The method's step 10, with teachers that know something else than the networks."""
    method = make_method(name, classes, 10, 1, **{"percentile": (50, 50), "gate": (0.0, 0.0), **options})
    method.prepare(Given(classes), Given(classes))
    return method.step(*networks, torch.zeros(images, 1, *SIZE), labels, step=10)
