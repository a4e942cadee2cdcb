"""Everything that wants a GPU, in one command: tests, memory checks, profiles, timings.

python -m benchmarks.gpu --output runs/gpu                        all of it, in at most 20 minutes
python -m benchmarks.gpu --output runs/gpu --call 1 --minutes 9   where a GPU is lent for minutes: first whether it is right, then
python -m benchmarks.gpu --output runs/gpu --call 2 --minutes 10  how fast it is; what the minutes do not reach is dropped
python -m benchmarks.gpu --output runs/gpu --rehearse             every part on a CPU, with tiny volumes, in a few minutes

It runs from a checkout that was not installed, and needs torch, triton, numpy, pytest and pytest-xdist; with kernels built ahead
(python -m sslfast.build --output DIR --cuda 9.0, then SSLFAST_PREBUILT=DIR) no compiler. Each part is a process of its own with a
limit of its own: one that crashes or hangs costs that part only. What a part learns is in DIR/results.jsonl at once, what it prints
in DIR/log.txt, and DIR/results.md is made anew after each. Exit status 0: all parts passed; 1: not all; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.parts import Part, run_parts
from benchmarks.gpu.records import line, write_page
from benchmarks.gpu.rehearsal import environment

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_backends.py", "tests/test_consistency.py")


def parts_of(call: int, folder: Path, rehearses: bool) -> list[Part]:
    """The parts of one call in their order: is it right, then is it fast."""
    python = sys.executable
    output = ("--output", str(folder.resolve()))

    def module(name: str, limit: float, *arguments: str) -> Part:
        return Part(name, limit, (python, "-m", f"benchmarks.gpu.{arguments[0]}", *arguments[1:], *output))

    def tests(name: str, limit: float, *files: str) -> Part:
        workers = min(len(os.sched_getaffinity(0)), 12)
        flags = ("-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.workers")
        spread = ("-n", str(workers), "--max-worker-restart", "100", "--dist", "loadgroup")
        where = {"SSLFAST_TEST_BACKEND": name, "SSLFAST_TEST_DEVICE": "cuda"}
        if rehearses:
            emulated = {"SSLFAST_TEST_BACKEND": "cpu", "SSLFAST_TEST_EMULATED": "1", "TRITON_INTERPRET": "0"}
            where = {"SSLFAST_TEST_DEVICE": "cpu", **(emulated if name == "cuda" else {"SSLFAST_TEST_BACKEND": name})}
        return Part(
            f"tests {name}", limit, (python, "-m", "pytest", *flags, *spread, *files), where, r" (passed|failed|error)"
        )

    def sanitizer(tool: str, limit: float) -> Part:
        smoke = (python, "-m", "benchmarks.gpu.smoke", "cuda")
        if rehearses:
            return Part(tool, limit, smoke)
        program = (shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", "--tool", tool)
        # initcheck must see who writes memory, torch's kernels too
        ours = () if tool == "initcheck" else ("--kernel-name", "kns=sslfast")
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor a block of its own, whose ends are watched
        return Part(tool, limit, (*program, "--error-exitcode", "9", *ours, *smoke), own, "SUMMARY|rror")

    if call == 1:
        return [
            module("machine", 45, "machine"),
            module("smoke cuda", 30, "smoke", "cuda"),
            module("smoke triton", 60, "smoke", "triton"),
            module("default step", 55, "speed", "step"),
            tests("cuda", 95, "tests/test_gpu.py", *TESTS),
            tests("triton", 80, *TESTS),
            sanitizer("memcheck", 38),
            sanitizer("racecheck", 38),
            sanitizer("initcheck", 38),
            module("profile", 20, "launches", "profile"),
            module("counters", 40, "launches", "counters"),
        ]
    return [
        module("machine", 45, "machine"),
        module("training step", 110, "speed", "training"),
        module("step bf16", 40, "speed", "step", "--case", "la,2,16,bf16"),
        module("step C=14", 50, "speed", "step", "--case", "la,14,32,fp32"),
        module("ops", 80, "speed", "ops"),
        module("step C=4", 40, "speed", "step", "--case", "la,4,16,fp32"),
        module("step 96^3", 40, "speed", "step", "--case", "pancreas,2,16,fp32"),
        module("step whole", 50, "speed", "step", "--case", "whole,2,16,bf16"),
        module("step 512^3", 45, "speed", "large"),
        module("torch.compile", 95, "speed", "compiled"),
    ]


def main() -> int:
    """The command; returns the exit status."""
    formatter: Callable[..., argparse.HelpFormatter] = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)"
    )
    parser.add_argument("--call", type=int, choices=(1, 2), help="half of the parts (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="limit of the whole; the last parts are dropped"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU: does every part run?")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits and run none")
    flags = parser.parse_args()
    calls = (flags.call,) if flags.call else (1, 2)
    if flags.list:
        for call in calls:
            parts = parts_of(call, flags.output, flags.rehearse)
            print(line((f"call {call}", "limit, s")), line(("---", "---")), sep="\n")
            print(*(line((part.name, f"{part.limit:.0f}")) for part in parts), sep="\n")
            print(line(("together", f"{sum(part.limit for part in parts):.0f}")), end="\n\n")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if flags.rehearse:
            os.environ.update(environment(flags.output / "emulated"))
        elif not _has_gpu():
            print(
                "error: torch sees no CUDA device; run it where `nvidia-smi` shows one, or --rehearse", file=sys.stderr
            )
            return 2
        parts = [part for call in calls for part in parts_of(call, flags.output, flags.rehearse)]
        if flags.rehearse:  # an emulated or interpreted kernel takes seconds
            parts = [replace(part, limit=10 * part.limit) for part in parts]
        passed = run_parts(parts, flags.output, flags.minutes, ROOT)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n" + write_page(flags.output))
    return int(not passed)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
