"""Two networks on streams of their own: stand-ins that note what is asked of them; test_gpu.py has real ones."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sslfast.ops.linear_logits import LinearLogits
from sslfast.training.streams import SideBySide


class Stream:
    """Notes which streams and events it waits for."""

    def __init__(self) -> None:
        self.waits: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: object) -> None:
        self.waits.append(stream)


class Event:
    def record(self) -> None: ...


class Network(nn.Module):
    def forward(self, images: Tensor) -> tuple[LinearLogits, Tensor]:
        features = images + 1
        return LinearLogits(features, torch.ones(len(images), 2, 2)), features


def test_memory_that_two_streams_use_is_kept_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    recorded: list[tuple[int, object]] = []
    for name, stand_in in (
        ("Stream", Stream),
        ("Event", Event),
        ("current_stream", lambda: current),
        ("stream", lambda stream: nullcontext()),
    ):
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append((self.data_ptr(), stream)))
    step = SideBySide(Network(), Network())
    images = torch.zeros(1, 1, 2, 2, 2)
    step.begin(images)
    assert step.images is images
    for network in step.networks:
        logits, features = network(images)
        assert network.stream.waits == [step.ready]
        assert current.waits[-1] is network.stream
        assert (images.data_ptr(), network.stream) in recorded
        for tensor in (logits.features, logits.weights, features):
            assert (tensor.data_ptr(), current) in recorded
    others = torch.ones(1, 1, 2, 2, 2)
    step.networks[0](others)
    assert step.images is others  # for which the other network waits too
