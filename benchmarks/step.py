"""A whole training step, networks included: this trainer's against a plain one, with the same networks and patch.

Plain, as the published code is written: float32, contiguous, the same losses in plain PyTorch with two percentiles on the host, every
term read each step. The two take turns within one process; memory is the peak of one step beyond weights, in a process of its own. By default the trainer has views besides, one pass more of
the unlabelled volumes: a row of its own, whose parts count that pass to the forward passes.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import eager
from benchmarks.loss import RESULTS, processor
from benchmarks.memory import forget_peak, probe, resident_mb
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command
from sslfast.data.volumes import DecodedCase
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer

CLASSES = {0: "background", 1: "foreground"}


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
    rounds: int = 5
    """Steps of each that are timed."""
    name: str = "step"
    """The table's name in benchmarks/results/."""


@dataclass(frozen=True)
class Row:
    """One implementation: seconds of a step and of its parts, and its memory."""

    implementation: str
    seconds: float
    iqr: float
    times_slower: float  # than sslfast
    samples_a_second: float
    peak_mb: float
    share_of_memory: float  # of the plain step's, percent
    data_wait: float
    forward_a: float
    forward_b: float
    loss: float
    rest: float  # backward pass and optimizer


Step = Callable[[], dict[str, float]]  # seconds of its parts


def cases(patch: tuple[int, int, int]) -> list[DecodedCase]:
    """Two labelled and two unlabelled volumes: a bright ball in noise."""
    random = np.random.default_rng(0)
    size = tuple(s + 16 for s in patch)
    offsets = np.indices(size) - np.array(size).reshape(3, 1, 1, 1) / 2
    ball: np.ndarray = np.linalg.norm(offsets, axis=0) < min(size) / 3
    found = []
    for i in range(4):
        image = (random.normal(size=size) + 2 * ball).astype(np.float32)
        label, foreground = (ball.astype(np.int16), np.argwhere(ball).astype(np.int32)) if i < 2 else (None, None)
        found.append(DecodedCase(f"ball_{i}", image, label, foreground))
    return found


def ours(config: StepConfig, folder: Path, *, checkpointing: bool = False, views: bool = False) -> Step:
    """The trainer's step; without views, which the plain one has not."""
    networks = NetworkOptions(width=config.width, depth=config.depth, checkpointing=checkpointing)
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
    trainer = Trainer(settings, CLASSES, cases(config.patch), 2, [], torch.device("cpu"))
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


def plain(config: StepConfig, folder: Path) -> Step:
    """Float32, contiguous, plain losses, host percentiles; every term is read, as for a log."""
    networks = NetworkOptions(width=config.width, depth=config.depth)
    network_a, network_b = build_networks(networks, len(CLASSES))
    parameters = [*network_a.parameters(), *network_b.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4)
    settings = TrainConfig("demo", folder, patch=config.patch, networks=networks, device="cpu")
    loader = Trainer(settings, CLASSES, cases(config.patch), 2, [], torch.device("cpu"))._loader()
    batches = iter(loader)
    ends = watch(network_a, network_b, None)

    def step() -> dict[str, float]:
        times = {"start": time.perf_counter()}
        batch = next(batches)
        times["data_wait"] = time.perf_counter()
        (logits_a, features_a), (logits_b, features_b) = network_a(batch.images), network_b(batch.images)
        loss = eager.dual_contrastive(
            logits_a, logits_b, features_a, features_b, batch.labels, 20.0, eager.numpy_percentile
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
    found = {name: times[name] - times[before] for before, name in zip(names, names[1:], strict=False)}
    return {**found, "seconds": times["rest"] - times["start"]}


IMPLEMENTATIONS: dict[str, Callable[[StepConfig, Path], Step]] = {
    "plain": plain,
    "sslfast": ours,
    "sslfast, checkpointing": lambda config, folder: ours(config, folder, checkpointing=True),
    "sslfast, views": lambda config, folder: ours(config, folder, views=True),
}


def peak_mb(config: StepConfig, name: str) -> float:
    """Of one step, beyond weights and volumes, in a fresh process."""
    return probe("benchmarks.step", json.dumps(asdict(config)), name)


def _probe(text: str, name: str) -> None:
    values = json.loads(text)
    config = StepConfig(**{**values, "patch": tuple(values["patch"])})
    with tempfile.TemporaryDirectory() as folder:
        step = IMPLEMENTATIONS[name](config, Path(folder))
        before = resident_mb()
        step()  # makes the optimizer's state
        forget_peak()
        step()
        print(resident_mb("VmHWM") - before)


def measure(config: StepConfig) -> None:
    """Times all, writes the results and prints them."""
    from tqdm import tqdm

    memory = {name: peak_mb(config, name) for name in tqdm(IMPLEMENTATIONS, desc="memory", leave=False)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in IMPLEMENTATIONS}
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: make(config, Path(folder)) for name, make in IMPLEMENTATIONS.items()}
        for step in steps.values():
            step()
        for _ in tqdm(range(config.rounds), desc="time", leave=False):
            for name, step in steps.items():
                found[name].append(step())
    rows = []
    for name, times in found.items():
        medians = {part: statistics.median(t[part] for t in times) for part in times[0]}
        quartiles = statistics.quantiles([t["seconds"] for t in times], n=4)
        base = statistics.median(t["seconds"] for t in found["sslfast"])
        seconds = medians.pop("seconds")
        share = 100 * memory[name] / memory["plain"]
        rows.append(
            Row(name, seconds, quartiles[2] - quartiles[0], seconds / base, 4 / seconds, memory[name], share, **medians)
        )
    with whole_file(RESULTS / f"{config.name}.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        "| step | seconds | IQR | times slower | samples/s | peak MB | of plain | data wait | network a | network b | loss | backward, optimizer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.implementation} | {r.seconds:.2f} | {r.iqr:.2f} | {r.times_slower:.2f} | {r.samples_a_second:.2f} | "
            f"{r.peak_mb:.0f} | {r.share_of_memory:.0f} % | {r.data_wait:.3f} | {r.forward_a:.2f} | {r.forward_b:.2f} | "
            f"{r.loss:.3f} | {r.rest:.2f} |"
        )
    size = "x".join(map(str, config.patch))
    lines += [
        "",
        f"2 + 2 patches of {size}, V-Net and ResNet V-Net of width {config.width} and depth {config.depth}, SGD. {date.today()}, "
        f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}. Medians of {config.rounds} interleaved steps, in seconds; the peak is beyond weights and volumes.",
    ]
    with whole_file(RESULTS / f"{config.name}.md") as part:
        part.write_text("\n".join(lines) + "\n")
    print((RESULTS / f"{config.name}.md").read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(StepConfig, measure, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        _probe(*sys.argv[2:])
    else:
        sys.exit(main())
