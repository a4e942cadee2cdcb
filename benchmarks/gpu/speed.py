"""How fast: a loss step or each of its ops at one case, a whole training step, a step on volumes of 512^3.

Wall time is what a training loop sees, with the host's work; device time is without it. The cache is flushed before
each call. Implementations take turns; medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sslfast
from benchmarks import eager
from benchmarks.cases import (
    NORMS,
    PERCENTILE,
    STEP_WITH_TEACHER,
    STEP_WITHOUT,
    VOLUMES,
    Call,
    Case,
    Inputs,
    check_same,
    floor_bytes,
    op_implementations,
    step_implementations,
)
from benchmarks.gpu.device import (
    BACKENDS,
    DEVICE,
    ROUNDS,
    Flush,
    Run,
    available,
    copy_speed,
    device_ms,
    peak_mb,
    product_speed,
    synchronize,
    wall_ms,
    within,
)
from benchmarks.gpu.records import append
from benchmarks.gpu.rehearsal import REHEARSES
from benchmarks.timing import Spread, forget_gradients, forward_backward, percent_of_peak, take_turns
from sslfast.networks import build_networks
from sslfast.ops.backend import unavailable
from sslfast.options import NetworkOptions, Norm
from sslfast.training.streams import SideBySide


def measure(op: str, case: Case, folder: Path, calls: dict[str, Call], inputs: Inputs, backend: str) -> None:
    """Every implementation of one op at one case, the last of them ours on one backend."""
    failure = None
    with sslfast.backend(BACKENDS[backend]):
        try:
            check_same(op, calls)
        except Exception as error:  # what is compared may differ, or fail below for itself
            failure = first_line(error)
    runs: dict[str, Run] = {name: partial(forward_backward, call, inputs.leaves) for name, call in calls.items()}
    runs[f"sslfast {backend}"] = within(backend, runs.pop("sslfast"))
    flush = Flush()
    record = partial(append, folder, "speed", op=op, case=str(case))
    medians = _medians(runs, flush, record)
    floor, speed = floor_bytes(op, case), copy_speed()
    for name, median in medians.items():
        device = device_ms(runs[name], flush) if name.startswith("sslfast ") else None
        forget_gradients(inputs.leaves)
        record(
            implementation=name,
            wall_ms=median,
            device_ms=device,
            times_slower=_against_ours(median, medians),
            peak_mb=peak_mb(runs[name]),
            bytes_a_voxel=floor,
            percent_of_copy=device and 100 * floor * case.voxels / speed / (device / 1e3),
            error=failure,
        )
        print(f"{op}, {case}, {name}: {median:.2f} ms", flush=True)


def first_line(error: Exception) -> str:
    """Its type, and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _medians(runs: dict[str, Run], flush: Flush, record: Callable[..., None]) -> dict[str, float]:
    """Wall milliseconds of each that runs, after one run to warm up; they take turns. Errors are recorded."""
    timed: dict[str, Callable[[], float]] = {}
    for name, run in runs.items():
        try:
            run()
            synchronize()
        except Exception as error:  # of Triton's compiler, out of memory, or a fault of the device
            record(implementation=name, error=first_line(error))
            print(f"{name}: {first_line(error)}", flush=True)
        else:
            timed[name] = partial(wall_ms, run, flush)
    return {name: Spread.of(ms).median for name, ms in take_turns(timed, range(ROUNDS), warm_up=False).items()}


def _against_ours(median: float, medians: dict[str, float]) -> float | None:
    """Times the best of ours, if one runs."""
    ours = [other for name, other in medians.items() if name.startswith("sslfast ")]
    return median / min(ours) if ours else None


def measure_steps(case: Case, backends: Sequence[str], folder: Path) -> None:
    """The loss step, with a teacher and with a contrastive loss."""
    inputs = Inputs(case, "contiguous", DEVICE)
    for backend in backends:
        for op in (STEP_WITH_TEACHER, STEP_WITHOUT):
            calls = step_implementations(inputs, case, op == STEP_WITH_TEACHER, compiled=False)
            measure(op, case, folder, calls, inputs, backend)


def measure_compiled(case: Case, backends: Sequence[str], folder: Path) -> None:
    """The loss step with a contrastive loss, beside plain PyTorch compiled."""
    inputs = Inputs(case, "contiguous", DEVICE)
    measure(STEP_WITHOUT, case, folder, step_implementations(inputs, case), inputs, backends[0])


def measure_ops(case: Case, backends: Sequence[str], folder: Path) -> None:
    """Each op by itself."""
    inputs = Inputs(case, "contiguous", DEVICE)
    for backend in backends:
        with sslfast.backend(BACKENDS[backend]):
            ops = op_implementations(inputs, case)
        for op, calls in ops.items():
            measure(op, case, folder, calls, inputs, backend)


def training_step(
    is_plain: bool,
    backend: str = "",
    norm: Norm = "batch",
    views: bool = False,
    streams: bool = False,
    checkpointing: bool = False,
) -> Run:
    """A step of both networks of published width on 2 + 2 random patches.

    Either plain (float32, contiguous, plain losses, host percentiles, the loss read) or as the trainer does it; with
    `views` as the default method does.
    """
    size = (16, 16, 32) if REHEARSES else VOLUMES["la"]
    torch.manual_seed(0)
    options = NetworkOptions(width=2 if REHEARSES else 16, norm=norm, checkpointing=checkpointing)
    networks = build_networks(options, 2)
    if is_plain:
        networks = eager.plain_network(networks[0]), eager.plain_network(networks[1])
    images, labels = torch.randn(4, 1, *size, device=DEVICE), torch.randint(0, 2, (2, *size), device=DEVICE)
    network: Any  # torch's stubs lack the argument
    for network in networks:
        network.to(DEVICE)
        if not is_plain:
            network.to(memory_format=torch.channels_last_3d)
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4, fused=not is_plain)
    criterion = sslfast.DualContrastiveLoss(2, percentile=PERCENTILE, gate=(0, 0), ramp_steps=1)

    def plain() -> None:
        (za, fa), (zb, fb) = (network(images) for network in networks)
        loss = eager.dual_contrastive(za, zb, fa, fb, labels, PERCENTILE, eager.numpy_percentile, contrast_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss.detach())

    side_by_side = SideBySide(*networks) if streams else None

    def ours() -> None:
        optimizer.zero_grad()
        batch, teacher = images, None
        with torch.autocast(DEVICE, torch.bfloat16):
            if views:
                view, teacher = sslfast.teacher_view(*networks, images[len(labels) :])
                batch = torch.cat((images[: len(labels)], view))
            if side_by_side:
                side_by_side.begin(batch)
            pair = side_by_side.networks if side_by_side else networks
            (za, fa), (zb, fb) = (network(batch, linear=True) for network in pair)
        criterion(za, zb, fa, fb, labels, step=1, teacher=teacher).loss.backward()
        optimizer.step()

    return plain if is_plain else within(backend, ours)


def cudnn_measures(run: Run) -> Run:
    """The same, while cuDNN times its algorithms for each shape and keeps the best."""

    def measured() -> None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            run()

    return measured


def measure_training(case: Case, backends: Sequence[str], folder: Path) -> None:
    """Whole training steps, which take turns."""
    steps = {f"plain, no views, {norm} norm": training_step(True, norm=norm) for norm in NORMS}
    for backend in backends:
        steps[f"sslfast {backend}, no views"] = training_step(False, backend)
    best = backends[0]
    for norm in NORMS:
        steps[f"sslfast {best}, {norm} norm"] = training_step(False, best, norm=norm, views=True)
    steps[f"sslfast {best}, checkpointing"] = training_step(False, best, views=True, checkpointing=True)
    steps[f"sslfast {best}, cuDNN's choice measured"] = cudnn_measures(training_step(False, best, views=True))
    if not REHEARSES:
        steps[f"sslfast {best}, two streams"] = training_step(False, best, views=True, streams=True)
    record = partial(append, folder, "speed", op="training step", case="2 + 2 patches")
    medians = _medians(steps, Flush(), record)
    speed = product_speed()
    for name, median in medians.items():
        record(
            implementation=name,
            wall_ms=median,
            times_slower=_against_ours(median, medians),
            peak_mb=peak_mb(steps[name]),
            percent_of_peak=percent_of_peak(steps[name], median / 1e3, speed),
        )
        print(f"training step, {name}: {median:.1f} ms", flush=True)


def measure_large(case: Case, backends: Sequence[str], folder: Path) -> None:
    """A step on whole volumes of 512^3, one labelled and one not, on each backend: its time, or why it does not run."""
    side = 16 if REHEARSES else 512
    record = partial(append, folder, "speed", op=STEP_WITHOUT, case=f"2 x {side}^3, C=2, K=8, bf16")
    for backend in backends:
        name = f"sslfast {backend}"
        try:
            wall = _large_step(backend, side)
        except Exception as error:  # out of memory is one
            record(implementation=name, error=first_line(error))
            print(f"{side}^3, {name}: {first_line(error)}", flush=True)
        else:
            record(implementation=name, wall_ms=wall)
            print(f"{side}^3, {name}: {wall:.1f} ms", flush=True)


def _large_step(backend: str, side: int) -> float:
    maps = [torch.empty(2, c, side, side, side, dtype=torch.bfloat16, device=DEVICE) for c in (2, 2, 8, 8)]
    for m in maps:
        m.normal_().requires_grad_()
    labels = torch.zeros(1, side, side, side, dtype=torch.uint8, device=DEVICE)
    criterion = sslfast.DualContrastiveLoss(2, gate=(0, 0), contrast_weight=0.1, ramp_steps=1)
    run = within(backend, partial(forward_backward, lambda: criterion(*maps, labels, step=1).loss, maps))
    run()
    return wall_ms(run, Flush())


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures: dict[str, Callable[[Case, Sequence[str], Path], None]] = {
        "step": measure_steps,
        "ops": measure_ops,
        "training": measure_training,
        "large": measure_large,
        "compiled": measure_compiled,
    }
    parser.add_argument("what", choices=tuple(measures))
    parser.add_argument("--case", type=Case.parse, default=Case.parse("la,2,16,fp32"), help="volume,C,K,dtype")
    parser.add_argument("--backend", choices=tuple(BACKENDS), help="whose kernels (default: all that run here)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    flags = parser.parse_args()
    backends = [name for name in available() if flags.backend in (None, name)]
    if not backends:
        print(f"no kernels run here: {unavailable(BACKENDS[flags.backend or 'cuda'])}")
        return 1
    if REHEARSES and not flags.backend:
        backends = backends[:1]  # interpreted, a Triton kernel takes a second; its parts rehearse it
    tiny = replace(flags.case, volume="tiny", classes=min(flags.case.classes, 5))
    measures[flags.what](tiny if REHEARSES else flags.case, backends, flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
