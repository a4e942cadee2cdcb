"""A whole volume through both networks at the published strides: ours against window by window in float32.

Window by window, as published: contiguous float32, one window at a time, probabilities and counts added up with equal
weights. Both use the same random networks of the published widths. The share of voxels with equal argmax is measured.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.eager import plain_network
from benchmarks.report import write
from benchmarks.timing import Spread, flop_of, product_speed, take_turns
from sslfast.cli import run_command
from sslfast.inference import predict_probabilities
from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.ops.buffers import keep_freed_memory
from sslfast.options import NetworkOptions, Norm, Precision, Preprocessing, Windows

STRIDES = (18, 18, 4)


@dataclass(frozen=True)
class InferenceConfig:
    """Time the segmentation of one volume at the published strides, and write the table and the CSV.

    python -m benchmarks --suite inference
    """

    size: tuple[int, int, int] = (208, 176, 88)
    """Voxels of the volume."""
    patch: tuple[int, int, int] = (112, 112, 80)
    """Voxels of a window."""
    width: int = 16
    """Channels of the networks' first stage; 16 as published."""
    norm: Norm = "batch"
    """The networks' normalisation."""
    rounds: int = 2
    """How often each is timed, in turns."""
    name: str = "inference"
    """The table's name in benchmarks/results/, or a path without suffix."""


@dataclass(frozen=True)
class Row:
    """One way to segment the volume."""

    implementation: str
    seconds: float
    times_faster: float  # than window by window
    percent_of_peak: float  # its FLOP a second, of a bfloat16 matrix product's
    percent_equal_argmax: float  # of the voxels, to window by window's


@torch.inference_mode()
def window_by_window(model: Model, image: np.ndarray, strides: tuple[int, int, int] = STRIDES) -> Tensor:
    """[C, X, Y, Z], as the published test code goes about it; the image is no smaller than a window."""
    starts = [
        [min(i * stride, size - edge) for i in range(-(-(size - edge) // stride) + 1)]
        for size, edge, stride in zip(image.shape, model.patch, strides, strict=True)
    ]
    total = torch.zeros(len(model.classes), *image.shape)
    count = torch.zeros(image.shape)
    for corner in itertools.product(*starts):
        window = tuple(slice(start, start + edge) for start, edge in zip(corner, model.patch, strict=True))
        patch = torch.from_numpy(image[window])[None, None]
        p = [network(patch)[0].softmax(1)[0] for network in (model.network_a, model.network_b)]
        total[(slice(None), *window)] += (p[0] + p[1]) / 2
        count[window] += 1
    return total / count


def measure(config: InferenceConfig) -> None:
    """Times all in turns, writes the results and prints them."""
    from tqdm import tqdm

    keep_freed_memory()
    torch.manual_seed(0)
    options = NetworkOptions(width=config.width, norm=config.norm)
    networks = build_networks(options, 2)
    network: Any  # torch's stubs lack the argument of `to`
    for network in networks:
        network.eval()
    classes = {0: "background", 1: "foreground"}
    model = Model(options, Preprocessing(), classes, config.patch, *networks)
    plain = Model(
        options, Preprocessing(), classes, config.patch, plain_network(networks[0]), plain_network(networks[1])
    )
    random = np.random.default_rng(0)
    grid = np.indices(config.size) - np.array(config.size).reshape(3, 1, 1, 1) / 2
    image = (random.normal(size=config.size) + 2 * (np.linalg.norm(grid, axis=0) < min(config.size) / 3)).astype(
        np.float32
    )
    windows = Windows(strides=STRIDES, blend="constant")

    for network in networks:
        network.to(memory_format=torch.channels_last_3d)  # as `load_model` does

    def ours(precision: Precision) -> Tensor:
        return predict_probabilities(model, image[None], precision=precision, windows=windows)

    runs = {
        "window by window, fp32": lambda: window_by_window(plain, image),
        "sslfast, fp32": lambda: ours("fp32"),
        "sslfast, bf16": lambda: ours("bf16"),
    }
    answers: dict[str, Tensor] = {}

    def timed(name: str, run: Callable[[], Tensor]) -> float:
        started = time.perf_counter()
        answers[name] = run().argmax(0)
        return time.perf_counter() - started

    calls = {name: partial(timed, name, run) for name, run in runs.items()}
    times = take_turns(calls, tqdm(range(config.rounds), desc="round", leave=False), warm_up=False)
    medians = {name: Spread.of(taken).median for name, taken in times.items()}
    first, speed = next(iter(runs)), product_speed()
    flop = flop_of(runs["sslfast, bf16"])
    rows = []
    for name, median in medians.items():
        equal = 100 * float((answers[name] == answers[first]).double().mean())
        rows.append(Row(name, median, medians[first] / median, 100 * flop / median / speed, equal))
    note = (
        f"A volume of {'x'.join(map(str, config.size))} voxels, windows of {'x'.join(map(str, config.patch))} every "
        f"{STRIDES}, both networks of width {config.width} with {config.norm} norm and random weights. Peak: of "
        f"{speed / 1e9:.0f} GFLOP/s, a bfloat16 matrix product's. "
        + ("One round." if config.rounds == 1 else f"Medians of {config.rounds} interleaved rounds.")
    )
    print(write(config.name, rows, note))


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(InferenceConfig, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
