"""Time and memory of the fused loss, and of the fused head, against plain PyTorch.

The loss gets the networks' logits, the head their features. The implementations of a row compute the same (checked
before timing, but for the head, whose dropout is random) and take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from benchmarks.cases import (
    HEAD,
    STEP_WITH_TEACHER,
    STEP_WITHOUT,
    Case,
    Inputs,
    check_same,
    floor_bytes,
    implementations,
)
from benchmarks.report import RESULTS, write
from benchmarks.timing import (
    Spread,
    copy_speed,
    for_seconds,
    forward_backward,
    in_own_process,
    peak_beyond_gradients,
    take_turns,
)
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command

Layout = Literal["contiguous", "channels-last"]


@dataclass(frozen=True)
class LossConfig:
    """Time the loss and the head against plain PyTorch, and write the table, the CSV and the plot.

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
    """Volume, classes, feature channels, dtype. la: 112x112x80, pancreas: 96^3, whole: 256x256x128. Batch 2 + 2, whole
    1 + 1."""
    seconds: float = 30.0
    """Timing of one row; at least three rounds are made."""
    layout: Layout = "contiguous"
    """Memory layout of the loss's maps. The head's features are channels-last, as in the trainer."""
    name: str = "loss"
    """The table's name in benchmarks/results/, or a path without suffix."""


@dataclass(frozen=True)
class Row:
    """One implementation of one op at one case."""

    op: str
    input: str
    layout: str
    implementation: str
    forward_ms: float
    backward_ms: float
    both_ms: float
    iqr_ms: float  # of both
    times_slower: float  # than sslfast
    extra_mb: float  # the peak beyond inputs and gradients
    extra_bytes_a_voxel: float  # of one network's unlabelled output
    floor_bytes_a_voxel: float  # moved at least
    percent_of_floor: float  # the floor's time at the speed of a copy / the time of both


def extra_mb(op: str, case: Case, layout: str, implementation: str) -> float:
    """Peak memory of one forward and backward pass beyond inputs and gradients; for a process of its own."""
    inputs = Inputs(case, layout)
    return peak_beyond_gradients(implementations(op, inputs, case)[implementation], inputs.leaves)


def time_case(op: str, case: Case, layout: Layout, seconds: float, speed: float) -> list[Row]:
    """A row for each implementation."""
    torch.compiler.reset()  # after some recompilations torch.compile runs a function as it is, whatever the shapes
    inputs = Inputs(case, layout)
    calls = implementations(op, inputs, case)
    if op != HEAD:
        check_same(op, calls)
    runs = {name: partial(forward_backward, call, inputs.leaves) for name, call in calls.items()}
    times = take_turns(runs, for_seconds(seconds))
    del inputs, calls, runs
    both = {name: Spread.of([1e3 * sum(pair) for pair in pairs]) for name, pairs in times.items()}
    floor = floor_bytes(op, case)
    rows = []
    for name, pairs in times.items():
        forward, backward = (1e3 * Spread.of(part).median for part in zip(*pairs, strict=True))
        extra = in_own_process(extra_mb, op, case, layout, name)
        rows.append(
            Row(
                op,
                str(case),
                layout,
                name,
                forward,
                backward,
                both[name].median,
                both[name].iqr,
                both[name].median / both["sslfast"].median,
                extra,
                2 * extra * 2**20 / case.voxels,
                floor,
                100 * floor * case.voxels / speed / (both[name].median / 1e3),
            )
        )
    return rows


def measure(config: LossConfig) -> None:
    """Times every case; writes the results after each, so that a stopped run keeps what it has."""
    from tqdm import tqdm

    speed = copy_speed()
    layouts: dict[str, Layout] = {STEP_WITH_TEACHER: config.layout, STEP_WITHOUT: config.layout, HEAD: "channels-last"}
    rows: list[Row] = []
    note = (
        f"A copy moves {speed / 1e9:.1f} GB/s. Medians of interleaved rounds. Floor: every input read and every output "
        "written once in each pass, at the copy's speed. Extra: the peak beyond inputs and gradients, in a process of "
        "its own."
    )
    jobs = [(op, Case.parse(text)) for text in config.cases for op in layouts]
    for op, case in tqdm(jobs, desc="benchmark", unit="row", leave=False):
        rows += time_case(op, case, layouts[op], config.seconds, speed)
        page = write(config.name, rows, note)
        draw(rows, config.name)
    print(page)


def draw(rows: Sequence[Row], name: str) -> None:
    """The time of the default method's loss, a group of bars a case."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.op == STEP_WITH_TEACHER]
    cases, names = list(dict.fromkeys(r.input for r in rows)), list(dict.fromkeys(r.implementation for r in rows))
    figure = Figure(figsize=(9, 1 + 0.9 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for i, implementation in enumerate(names):
        times = {r.input: r.both_ms for r in rows if r.implementation == implementation}
        positions = [cases.index(case) + (i - len(names) / 2) * 0.2 for case in times]
        bars = axes.barh(positions, list(times.values()), 0.18, label=implementation)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set(xscale="log", xlabel="ms, forward and backward", title="The loss of the default method")
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    with whole_file(RESULTS / f"{name}.png") as part:
        figure.savefig(part, dpi=130, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(LossConfig, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
