"""Checkpoint files: tensors and plain values, of this program alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sslfast import UserError
from sslfast.training.checkpoint import load_checkpoint


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Boom()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
