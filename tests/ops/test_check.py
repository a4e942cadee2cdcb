"""What an op's arguments must be, beyond the refusals that each op's own tests name."""

from __future__ import annotations

import pytest
import torch

from sslfast.ops.check import check_step


def test_a_capture_that_would_repeat_the_draw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslfast.ops.check._is_capturing", lambda device: True)
    check_step(5, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="step 5 would be part of it, so that every replay drew the same voxels"):
        check_step(5, torch.device("cuda"))
