"""Everything that wants a GPU, in one command: tests, memory checks, profiles, timings.

python -m benchmarks.gpu                          all of it, in at most 20 minutes
python -m benchmarks.gpu --call 1 --minutes 9     in two short calls: first whether the kernels are right,
python -m benchmarks.gpu --call 2 --minutes 9.6   then how fast they are; what the minutes do not reach is dropped
python -m benchmarks.gpu --rehearse               every part on a CPU, with tiny volumes, in some minutes

It runs from a checkout that was not installed, and needs torch, triton, numpy, pytest and pytest-xdist; nvcc and ninja
too, except with kernels built ahead (python -m sslfast.build --output DIR --cuda 9.0, then SSLFAST_PREBUILT=DIR). Each
part is a process of its own with a limit of its own: one that crashes or hangs costs that part only. What a part
measures is in results.jsonl at once, what it prints in log.txt, and results.md is made anew after each. Exit status 0:
all parts passed; 1: not all; 2: none could run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.parts import LOG, Part, run_parts
from benchmarks.gpu.records import PAGE, RESULTS, digest_of_tree, read, write_page
from benchmarks.gpu.rehearsal import RUN, environment
from benchmarks.report import markdown
from sslfast.atomic_io import make_folder
from sslfast.errors import UserError
from sslfast.kernel_library import BuildError, cpu_library, cuda_library

ROOT = Path(__file__).parents[2]
TESTS = ("tests/ops", "tests/test_losses_backends.py", "tests/test_losses_properties.py", "tests/test_gpu.py")
IN_REHEARSAL = {"cuda": "cuda-emulated", "triton": "triton-interpreted"}


def parts_of(call: int, folder: Path, rehearses: bool) -> list[Part]:
    """The parts of one call in their order. The first call: are the kernels right? The second: how fast are they?"""

    def module(part: str, limit: float, name: str, *flags: str) -> Part:
        command = (sys.executable, "-m", f"benchmarks.gpu.{name}", *flags, "--output", str(folder.resolve()))
        return Part(part, limit, command)

    def speed(part: str, limit: float, *flags: str) -> Part:
        return module(part, limit, "speed", *flags)

    if call == 1:
        return [
            module("machine", 25, "machine"),
            module("smoke cuda", 20, "smoke", "cuda"),
            speed("default step cuda", 25, "step", "--backend", "cuda"),
            spread_tests("cuda", 100, TESTS, rehearses),
            spread_tests("triton", 125, TESTS, rehearses),  # on all cores, so most kernels are compiled after it
            module("smoke triton", 60, "smoke", "triton"),
            speed("default step triton", 40, "step", "--backend", "triton"),
            sanitizer("memcheck", 20, rehearses),
            sanitizer("racecheck", 30, rehearses),
            sanitizer("initcheck", 20, rehearses),
            module("profile", 20, "launches", "profile"),
            module("counters", 45, "launches", "counters"),
        ]
    return [
        module("machine", 20, "machine"),
        speed("training step", 80, "training"),
        module("profile training", 40, "launches", "training"),
        speed("step bf16", 35, "step", "--case", "la,2,16,bf16"),
        speed("step C=14", 45, "step", "--case", "la,14,32,fp32"),
        speed("ops", 50, "ops"),
        speed("step C=4", 45, "step", "--case", "la,4,16,fp32"),
        speed("step 96^3", 35, "step", "--case", "pancreas,2,16,fp32"),
        speed("step whole", 55, "step", "--case", "whole,2,16,bf16"),
        speed("step 512^3", 40, "large"),
        speed("torch.compile", 80, "compiled"),
    ]


def spread_tests(backend: str, limit: float, files: Sequence[str], rehearses: bool) -> Part:
    """The tests of one backend, spread over the cores."""
    workers = str(min(len(os.sched_getaffinity(0)), 12))
    spread = ("-n", workers, "--dist", "load", "--max-worker-restart", "100", "-p", "benchmarks.gpu.workers")
    chosen = ("--backend", IN_REHEARSAL[backend], "--seconds", "300") if rehearses else ("--backend", backend)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *chosen, *files)
    return Part(f"tests {backend}", limit, command, summary=r"^failed:|passed|error")


def sanitizer(tool: str, limit: float, rehearses: bool) -> Part:
    """The smoke test of the CUDA kernels under one of compute-sanitizer's tools; a rehearsal does without."""
    smoke = (sys.executable, "-m", "benchmarks.gpu.smoke", "cuda")
    if rehearses:
        return Part(tool, limit, smoke)
    program = (shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", "--tool", tool)
    patience = ("--launch-timeout", "0", "--error-exitcode", "9")
    # initcheck must see who writes memory, torch's kernels too
    chosen = () if tool == "initcheck" else ("--kernel-name", "kns=sslfast")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor a block of its own, whose ends are watched
    return Part(
        tool, limit, (*program, *patience, *chosen, *smoke), environment, "SUMMARY|rror", required="SUMMARY: 0 "
    )


def main() -> int:
    """The command; returns the exit status."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/gpu, or runs/gpu-rehearsal)")
    parser.add_argument("--call", type=int, choices=(1, 2), help="half of the parts (default: all)")
    parser.add_argument("--parts", metavar="WORDS", help="only those whose names match this regular expression")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="limit of the whole; the last parts are dropped"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU: does every part run?")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits and run none")
    flags = parser.parse_args()
    folder = flags.output or Path("runs/gpu-rehearsal" if flags.rehearse else "runs/gpu")
    calls = (flags.call,) if flags.call else (1, 2)
    if flags.list:
        for call in calls:
            print(*limits(call, parts_of(call, folder, flags.rehearse)), sep="\n", end="\n\n")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # of a process with a GPU's memory it would take longer than the limits
    try:
        if not flags.minutes > 0:
            raise UserError(f"--minutes is {flags.minutes:g}; it must be more than 0")
        prepare(folder, flags.rehearse)
        if flags.rehearse:
            os.environ.update(environment())
        elif not _has_gpu():
            raise UserError("torch sees no CUDA device; run it where `nvidia-smi` shows one, or --rehearse")
        else:
            ignore_stale_kernels()
        parts = [part for call in calls for part in parts_of(call, folder, flags.rehearse)]
        parts = [part for part in parts if re.search(flags.parts or "", part.name)]
        if not parts:
            raise UserError(f"no part's name matches --parts {flags.parts}; --list shows them")
        if flags.rehearse:  # an emulated or interpreted kernel takes seconds
            parts = [replace(part, limit=10 * part.limit) for part in parts]
        passed = run_parts(parts, folder, started + 60 * flags.minutes, ROOT)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n" + write_page(folder))
    return int(not passed)


def limits(call: int, parts: Sequence[Part]) -> list[str]:
    """The parts of a call as a Markdown table."""
    rows = [(part.name, f"{part.limit:.0f}") for part in parts]
    together = ("together", f"{sum(part.limit for part in parts):.0f}")
    return markdown((f"call {call}", "limit, s"), [*rows, together])


def prepare(folder: Path, rehearses: bool) -> None:
    """Makes the folder ready: a rehearsal starts anew, a run on a GPU continues results of the same sources.

    Raises:
        UserError: it cannot be made or written, or holds results that must not be mixed with this run's.
    """
    make_folder(folder)
    others = {(r["run"], r["sources"]) for r in read(folder) if r["kind"] == "machine"} - {
        (RUN[rehearses], digest_of_tree())
    }
    if rehearses and all(run == RUN[True] for run, _ in others):
        for name in (RESULTS, PAGE, LOG):
            (folder / name).unlink(missing_ok=True)
    elif others:
        raise UserError(
            f"{folder} holds results of other sources or of a rehearsal; move them away or choose another --output"
        )


def ignore_stale_kernels() -> None:
    """Unsets SSLFAST_PREBUILT where it lacks kernels of these sources, so that they are compiled here."""
    if "SSLFAST_PREBUILT" not in os.environ:
        return
    try:
        cpu_library()
        cuda_library()
    except BuildError as error:
        print(f"compiling the kernels here: {error}", flush=True)
        del os.environ["SSLFAST_PREBUILT"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
