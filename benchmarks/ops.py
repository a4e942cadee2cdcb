"""Time and memory of each op against plain PyTorch, timed by pytest-benchmark.

`python -m benchmarks --suite ops` runs pytest on this file. The implementations of an op compute the same (checked
before timing) and take turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.cases import OPS, Call, Case, Inputs, check_same, floor_bytes, op_implementations
from benchmarks.loss import extra_mb
from benchmarks.report import write
from benchmarks.timing import Spread, copy_speed, forget_gradients, in_own_process
from sslfast.cli import run_command
from sslfast.errors import UserError

TURNS = 3


@dataclass(frozen=True)
class OpsConfig:
    """Time each op against plain PyTorch by pytest-benchmark, and write the table and the CSV.

    python -m benchmarks --suite ops
    """

    case: str = "la,2,16,fp32"
    """Volume, classes, feature channels, dtype; see the suite loss."""
    rounds: int = 10
    """Rounds in each of an implementation's three turns."""
    memory: bool = True
    """Also measure peak memory, each in a process of its own, which takes longer than the timing."""
    name: str = "ops"
    """The table's name in benchmarks/results/, or a path without suffix."""


@dataclass(frozen=True)
class Row:
    """One implementation of one op; no backward pass where the op has no gradient."""

    op: str
    input: str
    implementation: str
    forward_ms: float
    forward_iqr_ms: float
    backward_ms: float | None
    backward_iqr_ms: float | None
    times_slower: float  # than sslfast, both passes together
    extra_mb: float | None  # the peak beyond inputs and gradients
    floor_bytes_a_voxel: float  # moved at least
    percent_of_floor: float  # the floor's time at the speed of a copy / the time of both passes


class Ops:
    """The pytest plugin that gives `test_op` its parameters."""

    def __init__(self, case: Case, rounds: int) -> None:
        self.inputs = Inputs(case, "contiguous")
        self.calls = op_implementations(self.inputs, case)
        self.rounds = rounds
        for op in OPS:
            check_same(op, self.calls[op])

    @pytest.fixture
    def ops(self) -> Ops:
        """This plugin."""
        return self

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """The implementations of an op take turns."""
        parameters = [
            (op, direction, turn, implementation)
            for op in OPS
            for direction in ("forward", "backward")
            if direction == "forward" or self.calls[op]["sslfast"]().requires_grad
            for turn in range(TURNS)
            for implementation in self.calls[op]
        ]
        metafunc.parametrize(("op", "direction", "turn", "implementation"), parameters)


def test_op(benchmark: Any, ops: Ops, op: str, direction: str, turn: int, implementation: str) -> None:
    """A turn of one pass of one implementation."""
    call: Call = ops.calls[op][implementation]

    def forward() -> tuple[tuple[Tensor], dict[str, object]]:
        forget_gradients(ops.inputs.leaves)
        return (call(),), {}

    if direction == "forward":
        benchmark.pedantic(call, rounds=ops.rounds, warmup_rounds=1)
    else:
        benchmark.pedantic(Tensor.backward, setup=forward, rounds=ops.rounds, warmup_rounds=1)


def measure(config: OpsConfig) -> None:
    """Runs pytest on this file, writes the results and prints them."""
    case = Case.parse(config.case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        flags = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-disable-gc", "--benchmark-quiet"]
        status = pytest.main([__file__, *flags, f"--benchmark-json={path}"], [Ops(case, config.rounds)])
        if status != pytest.ExitCode.OK:
            raise UserError("pytest-benchmark could not time the ops; see above")
        timed = json.loads(path.read_text())["benchmarks"]
    passes_ms: defaultdict[tuple[str, str], defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for test in timed:
        of = test["params"]
        passes_ms[of["op"], of["implementation"]][of["direction"]] += [
            1e3 * seconds for seconds in test["stats"]["data"]
        ]
    spreads = {key: {direction: Spread.of(ms) for direction, ms in times.items()} for key, times in passes_ms.items()}
    both = {key: sum(spread.median for spread in passes.values()) for key, passes in spreads.items()}
    speed, rows = copy_speed(), []
    for (op, implementation), passes in spreads.items():
        extra = in_own_process(extra_mb, op, case, "contiguous", implementation) if config.memory else None
        backward = passes.get("backward")
        ms, floor = both[op, implementation], floor_bytes(op, case)
        rows.append(
            Row(
                op,
                str(case),
                implementation,
                *passes["forward"],
                backward and backward.median,
                backward and backward.iqr,
                ms / both[op, "sslfast"],
                extra,
                floor,
                100 * floor * case.voxels / speed / (ms / 1e3),
            )
        )
    note = (
        f"A copy moves {speed / 1e9:.1f} GB/s. Timed by pytest-benchmark: medians of {TURNS} interleaved turns of "
        f"{config.rounds} rounds. Floor: every input read and every output written once in each pass, at the copy's "
        "speed. Extra: the peak beyond inputs and gradients, in a process of its own."
    )
    print(write(config.name, rows, note))


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(OpsConfig, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
