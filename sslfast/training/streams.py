"""Both networks at once on one GPU: each on a CUDA stream of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslfast.ops.linear_logits import LinearLogits


class SideBySide:
    """Two networks whose passes may overlap, forward and backward: what one leaves idle, the other takes.

        step = SideBySide(network_a, network_b)
        step.begin(images)
        outputs = [network(images) for network in step.networks]

    A network called with the images of `begin`, or some of them, waits for those alone; called with others, for all that was
    asked of the GPU before, and so does the other network called with the same. Whoever reads an output waits for it as usual.
    """

    def __init__(self, network_a: nn.Module, network_b: nn.Module) -> None:
        self.ready = torch.cuda.Event()
        self.images: Tensor | None = None  # held, so that no other ones take their memory
        self.identity: tuple[int, int] | None = None
        self.networks = _OwnStream(network_a, self), _OwnStream(network_b, self)

    def begin(self, images: Tensor) -> None:
        """At the start of a step, once its images are on their way."""
        self.ready.record()
        self.images, self.identity = images, _identity(images)


class _OwnStream(nn.Module):
    def __init__(self, network: nn.Module, step: SideBySide) -> None:
        super().__init__()
        self.network = network
        self.step = step
        self.stream = torch.cuda.Stream()

    def forward(self, images: Tensor, **options: Any) -> Any:
        current = torch.cuda.current_stream()
        if _identity(images) != self.step.identity:
            self.step.begin(images)
        self.stream.wait_event(self.step.ready)
        images.record_stream(self.stream)  # else their memory may be taken again while a kernel there still reads them
        with torch.cuda.stream(self.stream):
            output = self.network(images, **options)
        current.wait_stream(self.stream)
        for values in (output,) if isinstance(output, Tensor) else output:
            for part in (values.features, values.weights) if isinstance(values, LinearLogits) else (values,):
                part.record_stream(current)
        return output


def _identity(images: Tensor) -> tuple[int, int]:
    """Equal for views of one tensor that nobody has written to in between."""
    return images.untyped_storage().data_ptr(), images._version
