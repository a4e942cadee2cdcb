"""What a step launches and where its time goes.

By torch's profiler for the loss, on every backend, and for a training step; by ncu's counters where ncu works.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType

from benchmarks.cases import NORMS, Case, Inputs, step_implementations
from benchmarks.gpu.device import BACKENDS, DEVICE, Run, available, synchronize, within
from benchmarks.gpu.records import append
from benchmarks.gpu.rehearsal import REHEARSES
from benchmarks.gpu.speed import training_step
from benchmarks.timing import forward_backward
from sslfast.options import Norm

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of SM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% occupancy",
    "launch__registers_per_thread": "registers",
}


def warm_step(backend: str) -> Run:
    """A default step, which has run twice."""
    case = Case.parse("tiny,2,16,fp32" if REHEARSES else "la,2,16,fp32")
    inputs = Inputs(case, "contiguous", DEVICE)
    call = step_implementations(inputs, case, with_teacher=True, compiled=False)["sslfast"]

    def step() -> None:
        forward_backward(call, inputs.leaves)
        synchronize()

    run = within(backend, step)
    run()
    run()
    return run


def warm_training(backend: str, norm: Norm) -> Run:
    """A training step of the default method, which has run twice."""
    run = training_step(False, backend, norm=norm, views=True)
    run()
    run()
    return run


def profile(folder: Path, steps: Mapping[str, Run]) -> None:
    """Every kernel of each step, which has run before, by torch's profiler."""
    for name, step in steps.items():
        with torch.profiler.profile() as profiler:
            step()
            synchronize()
        averages = profiler.key_averages()
        if REHEARSES:
            events = [(e.key, e.count, float(e.self_cpu_time_total)) for e in averages]
        else:  # the kernels themselves, not the operations that launched them
            on_device = [e for e in averages if e.device_type == DeviceType.CUDA]
            events = [(e.key, e.count, float(e.self_device_time_total)) for e in on_device]
        total = sum(microseconds for _, _, microseconds in events)
        for kernel, count, microseconds in sorted(events, key=lambda event: -event[2])[:25]:
            percent = 100 * microseconds / total if total else 0.0
            append(
                folder,
                "launch",
                backend=name,
                kernel=kernel[:80],
                count=count,
                microseconds=microseconds,
                percent=percent,
            )
        print(f"{name}: {sum(count for _, count, _ in events)} launches, {total:.0f} µs")


def counters(folder: Path) -> int:
    """ncu's counters of a default step of the CUDA kernels; returns its exit status."""
    step = [sys.executable, "-m", "benchmarks.gpu.launches", "one-step", "--output", str(folder)]
    if REHEARSES:
        return subprocess.run(step, check=False).returncode
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(tool).exists():
        print("ncu is not installed")
        return 1
    options = [
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
    ]
    kernels = ["--kernel-name-base", "demangled", "-k", "regex:sslfast", "--metrics", ",".join(METRICS)]
    result = subprocess.run([tool, *options, *kernels, *step], stdout=subprocess.PIPE, text=True, check=False)
    measured = parse(result.stdout.splitlines())
    if not measured:
        print(result.stdout[-2000:])
    for kernel, values in measured:
        append(folder, "metric", kernel=kernel, values=values)
    print(f"{len(measured)} kernels measured")
    return result.returncode or int(not measured)


def parse(lines: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    """ncu's CSV, a kernel a row, its second row the units: each kernel's name and numbers by the names of `METRICS`."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[start:]))
    kernels = [row for row in rows if (row["ID"] or "").isdigit()]
    units = {
        metric: f", {rows[0].get(metric)}".removesuffix(", %").removesuffix(", None") for metric in METRICS if rows
    }
    return [
        (
            _name(row["Kernel Name"]),
            {METRICS[m] + units[m]: n for m in METRICS if (n := _number(row.get(m))) is not None},
        )
        for row in kernels
    ]


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # "n/a"
        return None


def _name(signature: str) -> str:
    """`a_kernel<2, 1>` of `void sslfast::cuda::<unnamed>::a_kernel<(int)2, (bool)1>(sslfast::cuda::Arguments)`."""
    match = re.search(r"(\w+)(<[^<>]*>)?\(", re.sub(r"\((?:int|bool)\)|<unnamed>::", "", signature))
    return match[1] + (match[2] or "") if match else signature


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launches", description=__doc__)
    parser.add_argument("what", choices=("profile", "training", "counters", "one-step"))
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    flags = parser.parse_args()
    if flags.what == "profile":
        profile(flags.output, {name: warm_step(name) for name in available()})
        return 0
    if flags.what == "training":
        best = next(iter(available()))
        profile(flags.output, {f"training, {norm} norm": warm_training(best, norm) for norm in NORMS})
        return 0
    if flags.what == "counters":
        return counters(flags.output)
    step = warm_step(next(iter(BACKENDS)))
    if not REHEARSES:
        torch.cuda.profiler.start()
    step()
    if not REHEARSES:
        torch.cuda.profiler.stop()
    print("a step of the CUDA kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
