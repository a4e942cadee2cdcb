"""Ctrl-C and SIGTERM end a run after the step that is being computed, once its checkpoint is written."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from sslfast.ops.reduce import SINGLE_PROCESS, Reducer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"


class Stopping:
    """Catches SIGINT and SIGTERM in a `with` block of the main thread. A second SIGINT raises KeyboardInterrupt.

    Args:
        reducer: processes that must stop after the same step.
        device: where their messages are.
    """

    def __init__(self, reducer: Reducer = SINGLE_PROCESS, device: torch.device | None = None) -> None:
        self.reducer = reducer
        self.device = device
        self.received = 0  # number of the signal
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and self.reducer.rank == 0:
            os.write(2, NOTICE)  # print may be what the signal interrupted
        self.received = self.received or number

    def agreed(self) -> int:
        """The signal that any of the processes has received; 0 if none has. Every process must call it."""
        if self.reducer.size == 1:
            return self.received
        agreed = int(self.reducer.gather(torch.tensor(self.received, device=self.device)).max())
        self.received = self.received or agreed  # a signal that came meanwhile counts after the next step
        return agreed
