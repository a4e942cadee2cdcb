"""Checkpoints: what a run needs to go on, and what prediction needs to know. Tensors and plain values, no pickled code."""

from __future__ import annotations

import io
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslfast.errors import UserError
from sslfast.files import whole_file
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions, Preprocessing

FORMAT = 1


@dataclass(frozen=True)
class Model:
    """What turns a scan into a segmentation: networks, their classes, and how scans are prepared for them."""

    options: NetworkOptions
    preprocessing: Preprocessing
    classes: dict[int, str]
    patch: tuple[int, int, int]
    network_a: nn.Module
    network_b: nn.Module

    def to(self, device: torch.device) -> Model:
        """The same model with its networks on `device`."""
        return replace(self, network_a=self.network_a.to(device), network_b=self.network_b.to(device))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as tensors and plain values."""
        return {
            "networks": asdict(self.options),
            "preprocessing": asdict(self.preprocessing),
            "classes": self.classes,
            "patch": self.patch,
            "network_a": self.network_a.state_dict(),
            "network_b": self.network_b.state_dict(),
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> Model:
        """The model of a checkpoint's `model` entry."""
        options = NetworkOptions(**state["networks"])
        preprocessing = Preprocessing(**{**state["preprocessing"], "window": tuple(state["preprocessing"]["window"])})
        network_a, network_b = build_networks(options, len(state["classes"]))
        network_a.load_state_dict(state["network_a"])
        network_b.load_state_dict(state["network_b"])
        x, y, z = state["patch"]
        return Model(options, preprocessing, dict(state["classes"]), (x, y, z), network_a, network_b)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values to `path`, whole or not at all (UserError: unwritable folder, full disk)."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        UserError: missing, corrupt, or no checkpoint of this program.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no readable checkpoint, it is corrupt or another program's ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise UserError(f"{path} is no checkpoint of this version of sslfast")
    return content


def load_model(path: Path) -> Model:
    """The model of a checkpoint file, on the CPU, in evaluation mode."""
    model = Model.restore(load_checkpoint(path)["model"])
    network: Any  # torch's stubs lack the argument
    for network in (model.network_a, model.network_b):
        network.eval().to(memory_format=torch.channels_last_3d)
    return model
