"""Checkpoints: all that resuming and prediction need, as tensors and plain values, without pickled code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError
from sslfast.model import Model
from sslfast.options import LAST

FORMAT = 3
DIGEST = 32  # bytes of a SHA-256 at the end of the file
END = 22  # bytes of the record that ends a zip file, when no comment follows


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values to `path`, whole or not at all, with a digest of the file.

    The file is the zip archive of `torch.save`. The digest is the archive's comment, so `torch.load` reads it too.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    buffer.seek(-2, io.SEEK_END)  # the length of the comment
    buffer.write(DIGEST.to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    with whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, once its digest is checked. Nothing in it is executed.

    Checkpoints that were written before there was a digest are read too: of them, the checksums of the archive are
    checked, which cover all tensors and values.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this version of sslfast.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the folder of a run, or a checkpoint file")
    try:
        data = path.read_bytes()
        _check_content(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading the bytes of another program may raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is not a readable checkpoint: {reason}. Copy it again, or use another one, such as that of the "
            "best validation or of another run."
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int) or found != FORMAT or "model" not in content:
        raise UserError(f"{path} is not a checkpoint of this version of sslfast; use the version that wrote it")
    return content


def _check_content(data: bytes) -> None:
    if not data:
        raise ValueError("it is empty")
    if hashlib.sha256(memoryview(data)[:-DIGEST]).digest() == data[-DIGEST:]:
        return
    if data[-END:][:4] != b"PK\5\6":
        raise ValueError("it is damaged, cut short, or from another program")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part {damaged} is damaged")


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turns what goes wrong in the block, which takes the content of the checkpoint `path`, into a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).splitlines()[:2]).replace("\t", " ")
        raise UserError(
            f"{path} does not hold what a checkpoint of this run or version holds ({reason}). Use another one, or the "
            "version of sslfast that wrote it."
        ) from error


def checkpoint_file(path: str | Path) -> Path:
    """The last checkpoint of a run's folder; a file is itself."""
    path = Path(path)
    return path / LAST if path.is_dir() else path


def load_model(path: str | Path) -> Model:
    """The model of a run's folder (its last checkpoint) or of a checkpoint file, on the CPU, in evaluation mode.

    Raises:
        UserError: see `load_checkpoint`; or it does not hold a model.
    """
    path = checkpoint_file(path)
    content = load_checkpoint(path)
    with fitting(path):
        model = Model.restore(content["model"])
    network: Any  # torch's stubs lack the argument
    for network in (model.network_a, model.network_b):
        network.eval().to(memory_format=torch.channels_last_3d)
    return model
