"""`norm_act` against torch's normalisation and ReLU, and against the speed at which the machine copies.

The sizes are those of the published networks' first stages at 4 patches of 112x112x80, and of one such patch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, NORMS
from benchmarks.eager import PlainNormAct
from benchmarks.report import write
from benchmarks.timing import Spread, for_seconds, forward_backward, take_turns
from sslfast.cli import run_command
from sslfast.networks import NormAct
from sslfast.ops.buffers import keep_freed_memory
from sslfast.options import Norm

SIZES = ((4, 16, 112, 112, 80), (4, 32, 56, 56, 40), (1, 16, 112, 112, 80))
FORWARD, BACKWARD = 3, 5  # how often a pass of ours reads or writes something of the activations' size
LAYOUTS = {"channels last": torch.channels_last_3d, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class NormActConfig:
    """Time normalisation and ReLU, and write the table and the CSV.

    python -m benchmarks --suite norm_act
    """

    seconds: float = 4.0
    """Time for each row."""
    sizes: tuple[tuple[int, int, int, int, int], ...] = SIZES
    """Shapes of the activations."""
    name: str = "norm_act"
    """The table's name in benchmarks/results/, or a path without suffix."""


@dataclass(frozen=True)
class Row:
    """One input."""

    shape: str
    layout: str
    dtype: str
    norm: Norm
    forward_ms: float
    backward_ms: float
    torch_forward_ms: float
    torch_backward_ms: float
    copy_gb_s: float  # of as many bytes
    forward_percent_of_copy: float  # of ours: its bytes a second
    backward_percent_of_copy: float


def row(shape: Sequence[int], layout: str, dtype: str, norm: Norm, seconds: float) -> Row:
    """Times one input; ours, torch's modules and a copy take turns."""
    torch.manual_seed(0)
    x, upstream = (torch.randn(*shape).to(dtype=DTYPES[dtype], memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    fused = NormAct(shape[1], norm)
    layers: dict[str, nn.Module] = {"sslfast": fused, "torch": PlainNormAct(fused)}

    def run(layer: nn.Module) -> tuple[float, float]:
        return forward_backward(lambda: _Upstream.apply(layer(x), upstream), [x])

    target = torch.empty_like(x)

    def copy() -> tuple[float]:
        start = time.perf_counter()
        target.copy_(x.detach())
        return (time.perf_counter() - start,)

    runs: dict[str, Callable[[], tuple[float, ...]]] = {name: partial(run, layer) for name, layer in layers.items()}
    taken = take_turns({**runs, "copy": copy}, for_seconds(seconds))
    ours, theirs, (copy_ms,) = (
        [1e3 * Spread.of(passes).median for passes in zip(*times, strict=True)] for times in taken.values()
    )
    speed = 2 * x.nbytes / (copy_ms / 1e3)
    forward, backward = (
        100 * passes * x.nbytes / (ms / 1e3) / speed for passes, ms in zip((FORWARD, BACKWARD), ours, strict=True)
    )
    return Row(
        "x".join(map(str, shape)), layout, dtype, norm, ours[0], ours[1], theirs[0], theirs[1], speed / 1e9,
        forward, backward,
    )  # fmt: skip


class _Upstream(torch.autograd.Function):
    """A number whose gradient with respect to the activations is `upstream`, at no cost."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, upstream: Tensor) -> Tensor:
        ctx.upstream = upstream
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.upstream, None


def measure(config: NormActConfig) -> None:
    """Times all, writes the results and prints them."""
    from tqdm import tqdm

    keep_freed_memory()
    inputs = [
        (shape, layout, dtype, norm)
        for shape in config.sizes
        for layout in LAYOUTS
        for dtype in DTYPES
        for norm in NORMS
        if layout == "channels last" or norm == "batch"
    ]
    rows = [row(*one, config.seconds) for one in tqdm(inputs, desc="inputs", leave=False)]
    note = (
        "Normalisation by the statistics of the input, and ReLU. Medians. A forward pass of ours moves the bytes of "
        f"its input {FORWARD} times, a backward pass {BACKWARD} times; a copy, which takes turns with them, "
        "twice. Freed memory is kept, as `train` does."
    )
    print(write(config.name, rows, note))


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(NormActConfig, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
