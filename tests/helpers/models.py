"""A small model, a network whose answer is known, and an oblique affine."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions, Preprocessing

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.array([[0, 0, -1.7], [0.9, 0, 0], [0, -1.3, 0]]), [12.5, -40, 7]
)


class Bright(nn.Module):
    """Says class 1 where the image is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((-self.scale * images, self.scale * images), 1), images


def make_model(preprocessing: Preprocessing | None = None) -> Model:
    options = NetworkOptions(width=2, depth=2)
    networks = build_networks(options, 2)
    return Model(options, preprocessing or Preprocessing(), {0: "background", 1: "x"}, (8, 8, 8), *networks)
