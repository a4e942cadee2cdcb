"""How every benchmark measures: runs take turns, medians over the rounds, peaks of memory in processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

T = TypeVar("T")
Key = TypeVar("Key")


class Spread(NamedTuple):
    """Median and spread of repeated measurements."""

    median: float
    iqr: float  # interquartile range

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values."""
        lower, median, upper = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(upper - lower))


def take_turns(
    runs: Mapping[Key, Callable[[], T]], rounds: Iterable[object], warm_up: bool = True
) -> dict[Key, list[T]]:
    """What each run returns, such as its seconds, in each round.

    The runs take turns, so that a busy machine slows all of them alike.

    Args:
        rounds: yields once a round, such as `range(5)` or `for_seconds(30)`.
        warm_up: run each once before the first round.
    """
    if warm_up:
        for run in runs.values():
            run()
    results: dict[Key, list[T]] = {name: [] for name in runs}
    for _ in rounds:
        for name, run in runs.items():
            results[name].append(run())
    return results


def for_seconds(seconds: float, at_least: int = 3) -> Iterator[int]:
    """Counts rounds until the time is used up, and to `at_least` in any case."""
    started, done = time.perf_counter(), 0
    while done < at_least or time.perf_counter() - started < seconds:
        yield done
        done += 1


def forward_backward(call: Callable[[], Tensor], leaves: Iterable[Tensor]) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass; the latter is 0 where there is no gradient."""
    forget_gradients(leaves)
    started = time.perf_counter()
    loss = call()
    middle = time.perf_counter()
    if not loss.requires_grad:
        return middle - started, 0.0
    loss.backward()
    return middle - started, time.perf_counter() - middle


def forget_gradients(leaves: Iterable[Tensor]) -> None:
    """Drops the gradients, so that the next backward pass allocates them."""
    for leaf in leaves:
        leaf.grad = None


def copy_speed(device: str = "cpu", elements: int = 2**26) -> float:
    """Bytes a second of a large copy, read and written: the best of ten."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def product_speed(device: str = "cpu", side: int = 4096) -> float:
    """FLOP a second of a large bfloat16 matrix product of random numbers: the best of ten."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: a @ b, device)


def percent_of_peak(run: Callable[[], object], seconds: float, speed: float) -> float:
    """The FLOP a second of a run that takes these seconds, in percent of `product_speed`; runs it once to count."""
    return 100 * flop_of(run) / seconds / speed


def flop_of(run: Callable[[], object]) -> int:
    """The FLOP of the convolutions and matrix products of a run."""
    ops = torch.ops.mkldnn  # not counted by torch
    formulas: dict[Any, Any] = {
        ops._convolution_pointwise: _fused_convolution,
        ops._convolution_transpose_pointwise: partial(_fused_convolution, transposed=True),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return int(counter.get_total_flops())


def _fused_convolution(x: Any, *others: Any, out_shape: Any, transposed: bool = False, **_: Any) -> int:
    """`others` are shapes of the weight and the bias, or of a residual, the weight and the bias."""
    weight = others[1] if others[1] is not None and len(others[1]) == len(x) else others[0]
    return int(conv_flop_count(x, weight, out_shape, transposed=transposed))


def _best_seconds(run: Callable[[], object], device: str) -> float:
    synchronize = torch.get_device_module(device).synchronize
    best = float("inf")
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """Calls a module's function in a fresh process whose allocator gives freed memory back at once."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # read when a process starts
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_mb(field: str = "VmRSS") -> float:
    """Memory of this process; with VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def forget_peak() -> float:
    """Resets the peak of this process's memory and returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb()


def peak_beyond_gradients(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> float:
    """MB that a forward and backward pass takes at its peak beyond inputs and gradients."""
    forward_backward(call, leaves)  # loads what loads lazily, compiles what compiles
    forget_gradients(leaves)
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
