"""Checkpoints: what a run needs to go on, and what prediction needs to know. Tensors and plain values, no pickled code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError
from sslfast.model import Model

FORMAT = 1


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
