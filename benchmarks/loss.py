"""Time and memory of the fused ops and of the whole step against plain PyTorch.

Every implementation of a row computes the same numbers (checked before timing) and they take turns within one process, so
that a busy machine slows all of them. Memory is the process's peak
beyond inputs and gradients, in a process of its own.
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.cases import (
    STEP_WITH_TEACHER,
    STEP_WITHOUT,
    Call,
    Case,
    Inputs,
    check_same,
    floor_bytes,
    op_implementations,
    step_implementations,
)
from benchmarks.memory import forget_peak, probe, resident_mb
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class LossConfig:
    """Time the loss and its ops against plain PyTorch, and write the table, the CSV and the plot.

    python -m benchmarks
    """

    cases: tuple[str, ...] = (
        "la,2,16,fp32",
        "la,2,16,bf16",
        "la,4,16,fp32",
        "la,14,32,fp32",
        "pancreas,2,16,fp32",
        "whole,2,16,bf16",
    )
    """Volume, classes, feature channels, dtype. la: 112x112x80, pancreas: 96^3, whole: 256x256x128; batch 2 + 2 (whole: 1 + 1)."""
    ops: bool = True
    """Also each op on its own, at the first case."""
    seconds: float = 30.0
    """Timing of one row; at least three rounds are made."""
    layout: Literal["contiguous", "channels-last"] = "contiguous"
    """Memory layout of the maps."""
    name: str = "loss"
    """The table's name in benchmarks/results/."""


@dataclass(frozen=True)
class Row:
    """One implementation of one op at one case."""

    op: str
    case: str
    device: str
    implementation: str
    kind: str  # fwd, bwd, fwd+bwd
    median_ms: float
    iqr_ms: float
    ratio: float  # its median / sslfast's
    voxels: int  # of one network's output, half of them unlabelled
    extra_mb: float  # the peak beyond inputs and gradients
    bytes_a_voxel: float  # moved at least, by the floor's count
    percent_of_floor: float  # the floor's time at the measured bandwidth / the median


def bandwidth() -> float:
    """Bytes a second of a large copy, counted as read and written once: the best of ten."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - started))
    return best


def time_once(call: Call, leaves: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds forward and backward; the backward of what has no gradient takes 0."""
    for leaf in leaves:
        leaf.grad = None
    started = time.perf_counter()
    loss = call()
    middle = time.perf_counter()
    if not loss.requires_grad:
        return middle - started, 0.0
    loss.backward()
    return middle - started, time.perf_counter() - middle


def time_in_turns(
    calls: dict[str, Call], leaves: Sequence[Tensor], seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """All implementations once to warm up, then in turns until the time is used up; three rounds at least."""
    for call in calls.values():
        time_once(call, leaves)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    started = time.perf_counter()
    while len(found["sslfast"]) < 3 or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            found[name].append(time_once(call, leaves))
    return found


def extra_mb(op: str, case: Case, implementation: str, layout: str) -> float:
    """Peak memory of one forward and backward pass beyond inputs and gradients, in a fresh process."""
    return probe("benchmarks.loss", op, *map(str, asdict(case).values()), implementation, layout)


def peak_beyond_gradients(call: Call, leaves: Sequence[Tensor]) -> float:
    """MB that a forward and backward pass takes at its peak beyond what it leaves: the gradients."""
    time_once(call, leaves)  # loads what loads lazily, compiles what compiles
    for leaf in leaves:
        leaf.grad = None
    before = forget_peak()
    loss = call()
    extra = resident_mb("VmHWM") - before
    if loss.requires_grad:
        forget_peak()
        loss.backward()
        peak = resident_mb("VmHWM")
        del loss
        extra = max(extra, peak - resident_mb())
    return extra


def implementations(op: str, inputs: Inputs, case: Case) -> dict[str, Call]:
    """Of the whole step or of one op, by name."""
    if op in (STEP_WITH_TEACHER, STEP_WITHOUT):
        return step_implementations(inputs, case, op == STEP_WITH_TEACHER)
    return op_implementations(inputs, case)[op]


def _probe(op: str, volume: str, classes: str, width: str, dtype: str, implementation: str, layout: str) -> None:
    case = Case(volume, int(classes), int(width), dtype)
    inputs = Inputs(case, layout)
    calls = implementations(op, inputs, case)
    print(peak_beyond_gradients(calls[implementation], inputs.leaves))


def measure(config: LossConfig) -> None:
    """Times every case and writes the results."""
    from tqdm import tqdm

    speed = bandwidth()
    rows: list[Row] = []
    cases = [Case.parse(text) for text in config.cases]
    jobs = [(op, case) for case in cases for op in (STEP_WITH_TEACHER, STEP_WITHOUT)]
    if config.ops:
        inputs = Inputs(cases[0], config.layout)
        jobs += [(op, cases[0]) for op in op_implementations(inputs, cases[0])]
    for op, case in tqdm(jobs, desc="benchmark", unit="row", leave=False):
        inputs = Inputs(case, config.layout)
        calls = implementations(op, inputs, case)
        check_same(op, calls)
        times = time_in_turns(calls, inputs.leaves, config.seconds)
        for kind, of in (("fwd", 0), ("bwd", 1), ("fwd+bwd", None)):
            values = {n: [1e3 * (t[of] if of is not None else sum(t)) for t in ts] for n, ts in times.items()}
            ours = statistics.median(values["sslfast"])
            if ours == 0 or (kind == "fwd+bwd" and statistics.median(t[1] for t in times["sslfast"]) == 0):
                continue
            floor = floor_bytes(op, case)[kind]
            for name, milliseconds in values.items():
                median = statistics.median(milliseconds)
                quartiles = statistics.quantiles(milliseconds, n=4)
                rows.append(
                    Row(
                        op,
                        str(case),
                        "cpu",
                        name,
                        kind,
                        median,
                        quartiles[2] - quartiles[0],
                        median / ours,
                        case.voxels,
                        extra_mb(op, case, name, config.layout) if kind == "fwd+bwd" else float("nan"),
                        floor,
                        100 * floor * case.voxels / speed / (median / 1e3),
                    )
                )
        _write(rows, speed, config)
    print((RESULTS / f"{config.name}.md").read_text())


def _write(rows: Sequence[Row], speed: float, config: LossConfig) -> None:
    RESULTS.mkdir(exist_ok=True)
    with whole_file(RESULTS / f"{config.name}.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        "| op | input | implementation | kind | median ms | IQR | times slower than sslfast | extra MB | extra B/unlabelled voxel | B/voxel at least | % of floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        memory = " | " if r.extra_mb != r.extra_mb else f"{r.extra_mb:.0f} | {r.extra_mb * 2**20 / r.voxels * 2:.0f}"
        lines.append(
            f"| `{r.op}` | {r.case} | {r.implementation} | {r.kind} | {r.median_ms:.1f} | {r.iqr_ms:.1f} | "
            f"{r.ratio:.1f} | {memory} | {r.bytes_a_voxel:.0f} | {r.percent_of_floor:.0f} |"
        )
    lines += [
        "",
        f"{date.today()}, {processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}; a copy moves {speed / 1e9:.1f} GB/s; {config.layout}. Medians "
        "of interleaved rounds. Floor: every input read and every output written once, at the copy's bandwidth. Memory: beyond "
        "inputs and gradients, in a process of its own.",
    ]
    with whole_file(RESULTS / f"{config.name}.md") as part:
        part.write_text("\n".join(lines) + "\n")
    _draw(rows, config)


def _draw(rows: Sequence[Row], config: LossConfig) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    whole = [r for r in rows if r.op == STEP_WITH_TEACHER and r.kind == "fwd+bwd"]
    cases, names = list(dict.fromkeys(r.case for r in whole)), list(dict.fromkeys(r.implementation for r in whole))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.9 * len(cases)), layout="constrained")
    for i, name in enumerate(names):
        mine = {r.case: r.median_ms for r in whole if r.implementation == name}
        places = [cases.index(case) + (i - len(names) / 2) * 0.2 for case in mine]
        bars = axes.barh(places, list(mine.values()), 0.18, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set(
        xscale="log",
        xlabel="ms, forward and backward",
        yticks=range(len(cases)),
        title="The loss of the default method",
    )
    axes.set_yticklabels(cases, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    with whole_file(RESULTS / f"{config.name}.png") as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(LossConfig, measure, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        _probe(*sys.argv[2:])
    else:
        sys.exit(main())
