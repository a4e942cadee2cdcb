"""The device of a run and how it is timed; in a rehearsal the CPU, with what stands there for the GPU's kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import sslfast
from benchmarks import timing
from benchmarks.gpu.rehearsal import BACKEND_IN_REHEARSAL, REHEARSES, mend_interpreter, store_logits
from sslfast.ops.backend import unavailable

mend_interpreter()
store_logits()
DEVICE = "cpu" if REHEARSES else "cuda"
BACKENDS = BACKEND_IN_REHEARSAL if REHEARSES else {"cuda": "cuda", "triton": "triton"}
ROUNDS = 1 if REHEARSES else 7

Run = Callable[[], object]


def available() -> dict[str, str]:
    """The backends that can run here, as `BACKENDS`."""
    return {name: backend for name, backend in BACKENDS.items() if unavailable(backend) is None}


def within(backend: str, run: Run) -> Run:
    """The same, forward and backward, by this backend of `BACKENDS`."""

    def chosen() -> None:
        with sslfast.backend(BACKENDS[backend]):
            run()

    return chosen


def synchronize() -> None:
    """Waits for all that was asked of the device."""
    torch.get_device_module(DEVICE).synchronize()


class Flush:
    """Writes more than the device's cache holds."""

    def __init__(self) -> None:
        self.block = torch.empty(2**12 if REHEARSES else 2**28, dtype=torch.uint8, device=DEVICE)

    def __call__(self) -> None:
        self.block.zero_()


def copy_speed() -> float:
    """Bytes a second of a large copy."""
    return timing.copy_speed(DEVICE, 2**12 if REHEARSES else 2**28)


def product_speed() -> float:
    """FLOP a second of a large bfloat16 matrix product."""
    return timing.product_speed(DEVICE, 64 if REHEARSES else 8192)


def wall_ms(run: Run, flush: Flush) -> float:
    """From the first host instruction to the last kernel's end."""
    flush()
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - started)


def device_ms(run: Run, flush: Flush) -> float | None:
    """From the first kernel's start to the last one's end, the host being ahead: median; None where there is no GPU.

    The device sleeps first, long enough for the host to ask for all of it. A run that waits for the host shows that
    time too.
    """
    if REHEARSES:
        return None
    times = []
    for _ in range(2 * ROUNDS):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(40_000_000)  # cycles: 20 ms
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_mb(run: Run) -> float | None:
    """Memory beyond what is allocated before; None where there is no GPU."""
    if REHEARSES:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
