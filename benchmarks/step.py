"""A whole training step, networks included: this trainer's against a plain one, with the same networks and patch.

The plain step is written like the published code: float32, contiguous, torch's own layers, the same losses in plain
PyTorch with two percentiles on the host, every term read each step. The trainer's default also has views, one more pass
of the unlabelled volumes, which counts as part of the forward passes; the rows without views are for the comparison.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks import eager
from benchmarks.cases import NORMS
from benchmarks.report import write
from benchmarks.timing import (
    Spread,
    flop_of,
    forget_peak,
    in_own_process,
    product_speed,
    resident_mb,
    take_turns,
)
from sslfast.cli import run_command
from sslfast.data.classes import Classes
from sslfast.data.volumes import DecodedCase
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.networks import build_networks
from sslfast.ops.buffers import keep_freed_memory, reuse_blocks
from sslfast.options import NetworkOptions, Norm
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer

CLASSES = Classes({0: "background", 1: "foreground"})


@dataclass(frozen=True)
class StepConfig:
    """Time a whole training step against a plain one, and write the table and the CSV.

    python -m benchmarks --suite step
    """

    patch: tuple[int, int, int] = (112, 112, 80)
    """Voxels of a patch; 2 labelled and 2 unlabelled in a step."""
    width: int = 16
    """Channels of the networks' first stage; 16 as published."""
    depth: int = 5
    """Stages of the networks; 5 as published."""
    rounds: int = 3
    """Processes of each, which take turns; two steps are timed in each."""
    name: str = "step"
    """The table's name in benchmarks/results/, or a path without suffix."""


@dataclass(frozen=True)
class Row:
    """One implementation: seconds of a step and of its parts, and its memory."""

    norm: Norm
    implementation: str
    seconds: float
    iqr: float
    times_faster: float  # than the plain step
    percent_of_peak: float  # its FLOP a second, of a bfloat16 matrix product's
    peak_mb: float
    percent_of_memory: float  # of the plain step's
    data_wait: float
    forward_a: float
    forward_b: float
    loss: float
    rest: float  # backward pass and optimizer


Step = Callable[[], dict[str, float]]  # seconds of its parts


def synthetic_cases(patch: tuple[int, int, int], folder: Path) -> list[DecodedCase]:
    """Two labelled and two unlabelled volumes, a bright ball in noise, in files in `folder`."""
    random = np.random.default_rng(0)
    size = tuple(s + 16 for s in patch)
    offsets = np.indices(size) - np.array(size).reshape(3, 1, 1, 1) / 2
    ball: np.ndarray = np.linalg.norm(offsets, axis=0) < min(size) / 3
    volumes = []
    for i in range(4):
        image = (random.normal(size=size) + 2 * ball).astype(np.float32)
        case = DecodedCase(f"ball_{i}", folder / f"{i}.image.npy", folder / f"{i}.label.npy" if i < 2 else None)
        case.save(image[None], ball.astype(np.int16) if i < 2 else None)
        volumes.append(case)
    return volumes


def ours(config: StepConfig, folder: Path, norm: Norm, *, views: bool = True, checkpointing: bool = False) -> Step:
    """The trainer's step."""
    networks = NetworkOptions(width=config.width, depth=config.depth, norm=norm, checkpointing=checkpointing)
    settings = TrainConfig(
        "demo",
        folder,
        optimizer="sgd",
        learning_rate=0.01,
        patch=config.patch,
        networks=networks,
        options=SSLContrastive.Options(views="random" if views else "none"),
        device="cpu",
    )
    trainer = Trainer(settings, CLASSES, synthetic_cases(config.patch, folder), 2, [], torch.device("cpu"))
    batches = iter(trainer._loader())
    ends = watch(trainer.model.network_a, trainer.model.network_b, trainer.method)
    steps = iter(range(settings.steps))

    def step() -> dict[str, float]:
        times = {"start": time.perf_counter()}
        batch = next(batches)
        times["data_wait"] = time.perf_counter()
        trainer._step(next(steps), batch, log_row=False)
        return parts(times, ends)

    return step


def ours_keeping_activations(config: StepConfig, folder: Path, norm: Norm) -> Step:
    """The trainer's step without `recompute_activations`."""
    step = ours(config, folder, norm)

    def keeping() -> dict[str, float]:
        with mock.patch("sslfast.networks.vnet.recompute_activations", return_value=nullcontext()):
            return step()

    return keeping


def plain(config: StepConfig, folder: Path, norm: Norm) -> Step:
    """Float32, contiguous, plain losses, host percentiles; every term is read, as for a log."""
    networks = NetworkOptions(width=config.width, depth=config.depth, norm=norm)
    network_a, network_b = map(eager.plain_network, build_networks(networks, len(CLASSES.names)))
    parameters = [*network_a.parameters(), *network_b.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4)
    settings = TrainConfig("demo", folder, patch=config.patch, networks=networks, device="cpu")
    loader = Trainer(settings, CLASSES, synthetic_cases(config.patch, folder), 2, [], torch.device("cpu"))._loader()
    batches = iter(loader)
    ends = watch(network_a, network_b, None)

    def step() -> dict[str, float]:
        times = {"start": time.perf_counter()}
        batch = next(batches)
        times["data_wait"] = time.perf_counter()
        (logits_a, features_a), (logits_b, features_b) = network_a(batch.images), network_b(batch.images)
        loss = eager.dual_contrastive(
            *(logits_a, logits_b, features_a, features_b, batch.labels, 20.0, eager.numpy_percentile),
            contrast_weight=0.0,
        )
        ends["loss"] = time.perf_counter()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss.detach())
        return parts(times, ends)

    return step


def watch(network_a: nn.Module, network_b: nn.Module, method: nn.Module | None) -> dict[str, float]:
    """The times at which the networks' and the loss's forward passes end."""
    ends: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            ends[name] = time.perf_counter()

        return hook

    network_a.register_forward_hook(note("forward_a"))
    network_b.register_forward_hook(note("forward_b"))
    if method is not None:
        method.criterion.register_forward_hook(note("loss"))  # type: ignore[union-attr]
    return ends


def parts(times: dict[str, float], ends: dict[str, float]) -> dict[str, float]:
    """Seconds between the ends of the parts, and of all."""
    times.update({name: ends[name] for name in ("forward_a", "forward_b", "loss")})
    times["rest"] = time.perf_counter()
    names = list(times)
    durations = {name: times[name] - times[before] for before, name in zip(names, names[1:], strict=False)}
    return {**durations, "seconds": times["rest"] - times["start"]}


WARM_UP, STEPS = 2, 2  # untimed and timed steps of a process
PLAIN = "plain, no views"
IMPLEMENTATIONS: dict[str, Callable[[StepConfig, Path, Norm], Step]] = {
    PLAIN: plain,
    "sslfast, no views": partial(ours, views=False),
    "sslfast": ours,
    "sslfast, activations kept": ours_keeping_activations,
    "sslfast, checkpointing": partial(ours, checkpointing=True),
}


def peak_and_flop(config: StepConfig, norm: Norm, name: str) -> tuple[float, int]:
    """Peak memory of one step in MB, and its FLOP; to be called in a process of its own."""
    reuse_blocks(0)  # as `train` does
    with tempfile.TemporaryDirectory() as folder:
        before = resident_mb()
        step = IMPLEMENTATIONS[name](config, Path(folder), norm)
        step()  # makes the optimizer's state
        forget_peak()
        step()
        return resident_mb("VmHWM") - before, flop_of(step)


def timed_steps(config: StepConfig, norm: Norm, name: str) -> tuple[list[dict[str, float]], float]:
    """Seconds of the parts of some steps, and `product_speed` then; to be called in a process of its own."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        step = IMPLEMENTATIONS[name](config, Path(folder), norm)
        times = [step() for _ in range(WARM_UP + STEPS)]
        return times[WARM_UP:], product_speed()


def measure(config: StepConfig) -> None:
    """Times all, writes the results and prints them."""
    from tqdm import tqdm

    pairs = [(norm, name) for norm in NORMS for name in IMPLEMENTATIONS]
    single = {pair: in_own_process(peak_and_flop, config, *pair) for pair in tqdm(pairs, desc="memory", leave=False)}
    runs = {pair: partial(in_own_process, timed_steps, config, *pair) for pair in pairs}
    taken = take_turns(runs, tqdm(range(config.rounds), desc="round", leave=False), warm_up=False)
    speed = Spread.of([speed for turns in taken.values() for _, speed in turns]).median
    medians, rows = {}, []
    for pair, turns in taken.items():
        times = [step for steps, _ in turns for step in steps]
        medians[pair] = {part: Spread.of([t[part] for t in times]).median for part in times[0]}
        seconds, iqr = Spread.of([t["seconds"] for t in times])
        norm, name = pair
        mb, flop = single[pair]
        rows.append(
            Row(
                norm,
                name,
                seconds,
                iqr,
                times_faster=medians[norm, PLAIN]["seconds"] / seconds,
                percent_of_peak=100 * flop / seconds / speed,
                peak_mb=mb,
                percent_of_memory=100 * mb / single[norm, PLAIN][0],
                **{part: value for part, value in medians[pair].items() if part != "seconds"},
            )
        )
    note = (
        f"2 + 2 patches of {'x'.join(map(str, config.patch))}, V-Net and ResNet V-Net of width {config.width} and "
        f"depth {config.depth}, SGD. Medians of {config.rounds} processes, which take turns, of {STEPS} steps each "
        f"after {WARM_UP} untimed ones. Peak: of {speed / 1e9:.0f} GFLOP/s, a bfloat16 matrix product's in the same "
        "processes. Memory: weights included, in a process whose allocator returns freed memory at once. Rest: "
        "backward pass and optimizer."
    )
    print(write(config.name, rows, note))


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(StepConfig, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
