"""Small models, a network whose answer is known, and an oblique affine."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.options import NetworkName, NetworkOptions, Norm, Preprocessing
from sslfast.training.checkpoint import save_checkpoint

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


def make_run(
    folder: Path,
    a: NetworkName = "vnet",
    b: NetworkName = "resvnet",
    norm: Norm = "instance",
    channels: int = 1,
    preprocessing: Preprocessing | None = None,
) -> tuple[Path, Model]:
    """A checkpoint of networks with 2 stages, whose statistics are not those of the beginning."""
    depth = 3 if "dynunet" in (a, b) else 2
    options = NetworkOptions(a, b, width=4, depth=depth, norm=norm)
    networks = build_networks(options, 3, channels)
    for network in networks:
        network.train()
        with torch.no_grad():
            network(2 * torch.randn(2, channels, 16, 16, 16) + 1)
        network.eval()
    names = tuple(f"c{i}" for i in range(channels))
    preprocessing = preprocessing or Preprocessing(spacing=(1, 1, 3), intensity=("ct", "zscore")[:channels])
    classes = {0: "background", 5: "liver", 7: "spleen"}
    model = Model(options, preprocessing, classes, (16, 16, 8), *networks, names)
    save_checkpoint(folder / "model.pt", {"model": model.state()})
    return folder / "model.pt", model
