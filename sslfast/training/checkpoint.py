"""Checkpoints: all that resuming and prediction need, as tensors and plain values, without pickled code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError
from sslfast.model import Model
from sslfast.options import LAST

FORMAT = 3


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values to `path`, whole or not at all.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. Nothing in it is executed.

    Raises:
        UserError: the file is missing, corrupt, or not a checkpoint of this version of sslfast.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the folder of a run, or a checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a readable checkpoint; it is corrupt or from another program ({reason}). Use another one."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise UserError(f"{path} is not a checkpoint of this version of sslfast; use the version that wrote it")
    return content


def checkpoint_file(path: str | Path) -> Path:
    """The last checkpoint of a run's folder; a file is itself."""
    path = Path(path)
    return path / LAST if path.is_dir() else path


def load_model(path: str | Path) -> Model:
    """The model of a run's folder (its last checkpoint) or of a checkpoint file, on the CPU, in evaluation mode.

    Raises:
        UserError: see `load_checkpoint`.
    """
    path = checkpoint_file(path)
    model = Model.restore(load_checkpoint(path)["model"])
    network: Any  # torch's stubs lack the argument
    for network in (model.network_a, model.network_b):
        network.eval().to(memory_format=torch.channels_last_3d)
    return model
