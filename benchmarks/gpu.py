"""Everything that wants a GPU, in one command: tests, memory checks, timings. Needs torch, triton, numpy and pytest only.

    python -m benchmarks.gpu                  # some 8 minutes; writes benchmarks/results/gpu-<device>.{json,md}
    python -m benchmarks.gpu --output DIR --skip-tests

Wall time is what a training loop sees, with the host's work; device time is that of a captured graph, replayed. The cache is
flushed before each call. Implementations take turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sslfast
from benchmarks import eager
from benchmarks.cases import (
    PERCENTILE,
    VOLUMES,
    Call,
    Case,
    Inputs,
    check_same,
    floor_bytes,
    op_implementations,
    step_implementations,
)
from sslfast.networks import build_networks
from sslfast.ops.backend import unavailable
from sslfast.options import NetworkOptions
from sslfast.streams import SideBySide

CASES = ("la,2,16,fp32", "la,2,16,bf16", "la,4,16,fp32", "la,14,32,fp32", "pancreas,2,16,fp32", "whole,2,16,bf16")
SANITIZED = """
import torch, sslfast
maps = [torch.randn(3, c, 5, 7, 9, device="cuda").requires_grad_() for c in (3, 3, 7, 7)]
labels = torch.randint(-1, 3, (1, 5, 7, 9), device="cuda")
for options in ({}, {"pseudo_label": "cross"}, {"per_class_percentile": True, "anchor_label": "loser"}, {"grad_keys": True}):
    loss = sslfast.DualContrastiveLoss(3, ramp_steps=2, anchors=9, negatives=11, **options)
    loss(*maps, labels, step=2).loss.backward()
sslfast.ops.masked_consistency(*maps[:2], max_entropy=0.5).loss.backward()
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Row:
    """One implementation of one op at one case, forward and backward."""

    op: str
    case: str
    implementation: str
    wall_ms: float
    device_ms: float | None  # of a captured graph, where it can be captured
    times_slower: float  # wall, than the best of ours
    peak_mb: float  # beyond the inputs
    bytes_a_voxel: float  # at least
    percent_of_floor: float | None  # the floor's time at the measured bandwidth / device time


class Flush:
    """Writes more than the cache holds."""

    def __init__(self) -> None:
        self.block = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.block.zero_()


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written: the best of ten."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.nbytes / (start.elapsed_time(end) / 1e3))
    return best


def step(call: Call, leaves: list[Tensor]) -> None:
    """Forward and, where there is a gradient, backward."""
    for leaf in leaves:
        leaf.grad = None
    loss = call()
    if loss.requires_grad:
        loss.backward()


def wall_ms(run: Callable[[], None], flush: Flush) -> float:
    """From the first host instruction to the last kernel's end."""
    flush()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def device_ms(run: Callable[[], None], flush: Flush, rounds: int = 20) -> float | None:
    """Median of a captured graph's replays; None if the host takes part in the step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(rounds):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_mb(run: Callable[[], None]) -> float:
    """Beyond what is allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def within(backend: str, run: Callable[[], None]) -> Callable[[], None]:
    """The same, forward and backward, by this backend."""

    def chosen() -> None:
        with sslfast.backend(backend):
            run()

    return chosen


def measure(op: str, case: Case, backends: list[str], speed: float, flush: Flush) -> list[Row]:
    """Every implementation of one op at one case."""
    inputs = Inputs(case, "contiguous", "cuda")
    calls = step_implementations(inputs, case) if op == "dual_contrastive" else op_implementations(inputs, case)[op]
    check_same(op, calls)
    runs: dict[str, Callable[[], None]] = {name: partial(step, call, inputs.leaves) for name, call in calls.items()}
    ours = runs.pop("sslfast")
    runs |= {f"sslfast {name}": within(name, ours) for name in backends}
    for run in runs.values():
        run()
    walls: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            walls[name].append(wall_ms(run, flush))
    medians = {name: statistics.median(times) for name, times in walls.items()}
    best = min(medians[f"sslfast {name}"] for name in backends)
    floor = floor_bytes(op, case)["fwd+bwd"]
    rows = []
    for name, run in runs.items():
        device = device_ms(run, flush) if name.startswith("sslfast ") else None
        for leaf in inputs.leaves:
            leaf.grad = None
        share = None if device is None else 100 * floor * case.voxels / speed / (device / 1e3)
        rows.append(Row(op, str(case), name, medians[name], device, medians[name] / best, peak_mb(run), floor, share))
    return rows


def training_step(
    is_plain: bool, backend: str, size: tuple[int, ...], checkpointing: bool = False, streams: bool = False
) -> Callable[[], None]:
    """A step of both networks of published width on 2 + 2 random patches: plain (float32, contiguous, plain losses, host
    percentiles, the loss read), or as the trainer does it."""
    torch.manual_seed(0)
    networks = build_networks(NetworkOptions(checkpointing=checkpointing), 2)
    images, labels = torch.randn(4, 1, *size, device="cuda"), torch.randint(0, 2, (2, *size), device="cuda")
    network: Any  # torch's stubs lack the argument
    for network in networks:
        network.cuda()
        if not is_plain:
            network.to(memory_format=torch.channels_last_3d)
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4, fused=not is_plain)
    criterion = sslfast.DualContrastiveLoss(2, percentile=PERCENTILE, ramp_steps=1)

    def plain() -> None:
        (za, fa), (zb, fb) = (network(images) for network in networks)
        loss = eager.dual_contrastive(za, zb, fa, fb, labels, PERCENTILE, eager.numpy_percentile)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss.detach())

    side_by_side = SideBySide(*networks) if streams else None

    def ours() -> None:
        optimizer.zero_grad()
        if side_by_side:
            side_by_side.begin(images)
        pair = side_by_side.networks if side_by_side else networks
        with torch.autocast("cuda", torch.bfloat16):
            (za, fa), (zb, fb) = (network(images, linear=True) for network in pair)
        criterion(za, zb, fa, fb, labels, step=1).loss.backward()
        optimizer.step()

    return plain if is_plain else within(backend, ours)


def measure_training(backends: list[str], flush: Flush, size: tuple[int, ...] = VOLUMES["la"]) -> list[Row]:
    """Whole training steps, which take turns."""
    steps = {"plain": training_step(True, "", size)}
    for name in backends:
        steps[f"sslfast {name}"] = training_step(False, name, size)
        steps[f"sslfast {name}, two streams"] = training_step(False, name, size, streams=True)
        steps[f"sslfast {name}, checkpointing"] = training_step(False, name, size, checkpointing=True)
    for run in steps.values():
        run()
    walls: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(5):
        for name, run in steps.items():
            walls[name].append(wall_ms(run, flush))
    medians = {name: statistics.median(times) for name, times in walls.items()}
    best = min(medians[f"sslfast {name}"] for name in backends)
    case = f"4 x {'x'.join(map(str, size))}"
    return [
        Row("training step", case, name, medians[name], None, medians[name] / best, peak_mb(run), 0.0, None)
        for name, run in steps.items()
    ]


def large_step(name: str) -> str:
    """A step on whole volumes of 512^3, one labelled and one not: its time, or why it does not run."""
    torch.cuda.empty_cache()
    try:
        maps = [torch.empty(2, c, 512, 512, 512, dtype=torch.bfloat16, device="cuda") for c in (2, 2, 8, 8)]
        for m in maps:
            m.normal_().requires_grad_()
        labels = torch.zeros(1, 512, 512, 512, dtype=torch.uint8, device="cuda")
        loss = sslfast.DualContrastiveLoss(2, ramp_steps=1)
        with sslfast.backend(name):
            return f"{wall_ms(lambda: step(lambda: loss(*maps, labels, step=1).loss, maps), Flush()):.1f} ms, cold"
    except RuntimeError as error:  # out of memory is one
        return str(error).splitlines()[0]


def run_tests(backends: list[str]) -> dict[str, str]:
    """The GPU's tests and those of every op, once for each backend; the last line of each report."""
    found = {}
    jobs: dict[str, tuple[list[str], dict[str, str]]] = {"gpu": (["tests/test_gpu.py"], {})}
    for name in backends:
        files = ["tests/test_backends.py", "tests/test_consistency.py"]
        jobs[name] = (files, {"SSLFAST_TEST_BACKEND": name, "SSLFAST_TEST_DEVICE": "cuda"})
    for name, (files, environment) in jobs.items():
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        print(result.stdout[-4000:], flush=True)
        found[name] = (result.stdout.strip().splitlines() or [result.stderr[-300:]])[-1]
    return found


def run_sanitizer(backends: list[str]) -> dict[str, str]:
    """compute-sanitizer's memcheck over a few small steps."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"memcheck": "compute-sanitizer is not installed"}
    found = {}
    for name in backends:
        result = subprocess.run(
            [tool, "--tool", "memcheck", sys.executable, "-c", SANITIZED],
            env={**os.environ, "SSLFAST_BACKEND": name, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line] or [result.stderr[-300:]]
        found[f"memcheck {name}"] = lines[-1]
    return found


def write(folder: Path, device: str, checks: dict[str, str], rows: list[Row], speed: float) -> None:
    """One JSON file and one Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{device.lower().replace(' ', '-')}"
    facts = {
        "device": device,
        "date": str(date.today()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_s": speed / 1e9,
    }
    path.with_suffix(".json").write_text(
        json.dumps({**facts, "checks": checks, "rows": [asdict(row) for row in rows]}, indent=1)
    )
    lines = [f"{key}: {value}" for key, value in facts.items()] + [""]
    lines += [f"- {name}: {result}" for name, result in checks.items()] + [""]
    lines += [
        "| op | input | implementation | wall ms | device ms | times slower | peak MB | B/voxel at least | % of floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        device_time = "" if row.device_ms is None else f"{row.device_ms:.3f}"
        share = "" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}"
        lines.append(
            f"| `{row.op}` | {row.case} | {row.implementation} | {row.wall_ms:.2f} | {device_time} | "
            f"{row.times_slower:.1f} | {row.peak_mb:.0f} | {row.bytes_a_voxel:.0f} | {share} |"
        )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(path.with_suffix(".md").read_text())


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--skip-tests", action="store_true", help="timings only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU: torch sees no CUDA device; run it where `nvidia-smi` shows one", file=sys.stderr)
        return 2
    reasons = {name: unavailable(name) for name in ("cuda", "triton")}
    backends = [name for name, reason in reasons.items() if reason is None]
    checks = {name: reason for name, reason in reasons.items() if reason is not None}
    if not backends:
        print(f"error: no kernels can run: {checks}", file=sys.stderr)
        return 2
    if not arguments.skip_tests:
        checks |= run_tests(backends) | run_sanitizer(backends)
    speed, flush, rows = bandwidth(), Flush(), []
    device = torch.cuda.get_device_name()
    cases = [Case.parse(text) for text in CASES]
    jobs = [("dual_contrastive", case) for case in cases]
    jobs += [(op, cases[0]) for op in op_implementations(Inputs(cases[0], "contiguous", "cuda"), cases[0])]
    for op, case in jobs:
        print(f"{op} {case}", flush=True)
        rows += measure(op, case, backends, speed, flush)
        write(arguments.output, device, checks, rows, speed)
    print("training step", flush=True)
    rows += measure_training(backends, flush)
    write(arguments.output, device, checks, rows, speed)
    checks |= {f"512^3 {name}": large_step(name) for name in backends}
    write(arguments.output, device, checks, rows, speed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
