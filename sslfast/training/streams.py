"""Both networks at the same time on one GPU, each on its own CUDA stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslfast.ops.linear_logits import LinearLogits


class SideBySide:
    """Two networks whose forward and backward passes may overlap, so that one uses what the other leaves idle.

        step = SideBySide(network_a, network_b)
        step.begin(images)
        outputs = [network(images) for network in step.networks]

    A network called with the images of `begin`, or with a view of them, waits for these images only. Called with other
    images, it waits for all work queued on the current stream before; the other network, called with the same images,
    waits for the same work. The outputs are ready for use on the current stream.
    """

    def __init__(self, network_a: nn.Module, network_b: nn.Module) -> None:
        self.ready = torch.cuda.Event()
        self.images: Tensor | None = None  # kept, so that their memory is not reused
        self.identity: tuple[int, int] | None = None
        self.networks = _OwnStream(network_a, self), _OwnStream(network_b, self)

    def begin(self, images: Tensor) -> None:
        """Call it at the start of a step, once the copy of its images to the GPU is queued."""
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
        images.record_stream(self.stream)  # else their memory could be reused while this stream reads them
        with torch.cuda.stream(self.stream):
            output = self.network(images, **options)
        current.wait_stream(self.stream)
        for values in (output,) if isinstance(output, Tensor) else output:
            for part in (values.features, values.weights) if isinstance(values, LinearLogits) else (values,):
                part.record_stream(current)
        return output


def _identity(images: Tensor) -> tuple[int, int]:
    """Equal for views of the same tensor, unless it was written to in between."""
    return images.untyped_storage().data_ptr(), images._version
