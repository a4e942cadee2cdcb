"""How fast: a loss step or each of its ops at one case, a whole training step, a step on volumes of 512^3.

Wall time is what a training loop sees, with the host's work; device time is without it. The cache is flushed before each call.
Implementations take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
from benchmarks.gpu.device import (
    DEVICE,
    REHEARSES,
    ROUNDS,
    Flush,
    Run,
    available,
    copy_speed,
    device_ms,
    peak_mb,
    product_speed,
    wall_ms,
    within,
)
from benchmarks.gpu.records import append
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions
from sslfast.streams import SideBySide

STEP = "dual_contrastive"
TAUGHT = "dual_contrastive, taught"  # the default method's: with a teacher


def measure(op: str, case: Case, folder: Path, calls: dict[str, Call], inputs: Inputs) -> None:
    """Every implementation of one op at one case, the last of them ours on each backend."""
    said = None
    try:
        check_same(op, calls)
    except RuntimeError as error:  # a fault of the device ends what follows; a difference does not
        said = str(error).splitlines()[0]
    runs: dict[str, Run] = {name: partial(_step, call, inputs.leaves) for name, call in calls.items()}
    ours = runs.pop("sslfast")
    runs |= {f"sslfast {name}": within(name, ours) for name in available()}
    flush = Flush()
    medians = _medians(runs, flush)
    best = _best_of_ours(medians)
    floor, speed = floor_bytes(op, case)["fwd+bwd"], copy_speed()
    for name, run in runs.items():
        device = device_ms(run, flush) if name.startswith("sslfast ") else None
        for leaf in inputs.leaves:
            leaf.grad = None
        append(
            folder,
            "speed",
            op=op,
            case=str(case),
            implementation=name,
            wall_ms=medians[name],
            device_ms=device,
            times_slower=medians[name] / best,
            peak_mb=peak_mb(run),
            bytes_a_voxel=floor,
            percent_of_copy=device and 100 * floor * case.voxels / speed / (device / 1e3),
            said=said,
        )
        print(f"{op}, {case}, {name}: {medians[name]:.2f} ms", flush=True)


def _step(call: Call, leaves: list[Tensor]) -> None:
    """Forward and, where there is a gradient, backward."""
    for leaf in leaves:
        leaf.grad = None
    loss = call()
    if loss.requires_grad:
        loss.backward()


def _medians(runs: dict[str, Run], flush: Flush, rounds: int = ROUNDS) -> dict[str, float]:
    """Wall milliseconds of each after one to warm up; they take turns."""
    for run in runs.values():
        run()
    walls: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            walls[name].append(wall_ms(run, flush))
    return {name: statistics.median(times) for name, times in walls.items()}


def _best_of_ours(medians: dict[str, float]) -> float:
    return min(median for name, median in medians.items() if name.startswith("sslfast "))


def measure_steps(case: Case, folder: Path, ops: Sequence[str] = (TAUGHT, STEP), compiled: bool = False) -> None:
    """The loss step, with a teacher and without."""
    inputs = Inputs(case, "contiguous", DEVICE)
    for op in ops:
        measure(op, case, folder, step_implementations(inputs, case, op == TAUGHT, compiled), inputs)


def measure_ops(case: Case, folder: Path) -> None:
    """Each op by itself."""
    inputs = Inputs(case, "contiguous", DEVICE)
    for op, calls in op_implementations(inputs, case).items():
        measure(op, case, folder, calls, inputs)


def training_step(
    is_plain: bool, backend: str = "", views: bool = False, streams: bool = False, checkpointing: bool = False
) -> Run:
    """A step of both networks of published width on 2 + 2 random patches: plain (float32, contiguous, plain losses, host
    percentiles, the loss read), or as the trainer does it, with `views` as the default method does."""
    size = (16, 16, 32) if REHEARSES else VOLUMES["la"]
    torch.manual_seed(0)
    networks = build_networks(NetworkOptions(width=2 if REHEARSES else 16, checkpointing=checkpointing), 2)
    images, labels = torch.randn(4, 1, *size, device=DEVICE), torch.randint(0, 2, (2, *size), device=DEVICE)
    network: Any  # torch's stubs lack the argument
    for network in networks:
        network.to(DEVICE)
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
        batch, teacher = images, None
        with torch.autocast(DEVICE, torch.bfloat16, enabled=not REHEARSES):
            if views:
                view, teacher = sslfast.taught_view(*networks, images[len(labels) :])
                batch = torch.cat((images[: len(labels)], view))
            if side_by_side:
                side_by_side.begin(batch)
            pair = side_by_side.networks if side_by_side else networks
            (za, fa), (zb, fb) = (network(batch, linear=True) for network in pair)
        criterion(za, zb, fa, fb, labels, step=1, teacher=teacher).loss.backward()
        optimizer.step()

    return plain if is_plain else within(backend, ours)


def measure_training(folder: Path) -> None:
    """Whole training steps, which take turns."""
    steps = {"plain, no views": training_step(True)}
    for name in available():
        steps[f"sslfast {name}, no views"] = training_step(False, name)
    for name in list(available())[:1]:
        steps[f"sslfast {name}"] = training_step(False, name, views=True)
        steps[f"sslfast {name}, checkpointing"] = training_step(False, name, views=True, checkpointing=True)
        if not REHEARSES:
            steps[f"sslfast {name}, two streams"] = training_step(False, name, views=True, streams=True)
    medians = _medians(steps, Flush(), rounds=min(ROUNDS, 5))
    best, speed = _best_of_ours(medians), product_speed()
    for name, run in steps.items():
        with FlopCounterMode(display=False) as counter:
            run()
        share = 100 * counter.get_total_flops() / speed / (medians[name] / 1e3)
        values = {"wall_ms": medians[name], "times_slower": medians[name] / best, "peak_mb": peak_mb(run)}
        append(
            folder,
            "speed",
            op="training step",
            case="2 + 2 patches",
            implementation=name,
            percent_of_peak=share,
            **values,
        )
        print(f"training step, {name}: {medians[name]:.1f} ms", flush=True)


def measure_large(folder: Path) -> None:
    """A step on whole volumes of 512^3, one labelled and one not, on each backend: its time, or why it does not run."""
    side = 16 if REHEARSES else 512
    case = f"2 x {side}^3, C=2, K=8, bf16, cold"
    for name in available():
        wall = said = None
        try:
            wall = _large_step(name, side)
        except RuntimeError as error:  # out of memory is one
            said = str(error).splitlines()[0]
        append(folder, "speed", op=STEP, case=case, implementation=f"sslfast {name}", wall_ms=wall, said=said)
        print(f"{side}^3, {name}: {said or f'{wall:.1f} ms'}", flush=True)


def _large_step(backend: str, side: int) -> float:
    maps = [torch.empty(2, c, side, side, side, dtype=torch.bfloat16, device=DEVICE) for c in (2, 2, 8, 8)]
    for m in maps:
        m.normal_().requires_grad_()
    labels = torch.zeros(1, side, side, side, dtype=torch.uint8, device=DEVICE)
    criterion = sslfast.DualContrastiveLoss(2, ramp_steps=1)
    run = partial(_step, lambda: criterion(*maps, labels, step=1).loss, maps)
    return wall_ms(within(backend, run), Flush())


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "ops", "training", "large", "compiled"))
    parser.add_argument("--case", type=Case.parse, default=Case.parse("la,2,16,fp32"), help="volume,C,K,dtype")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    flags = parser.parse_args()
    tiny = replace(flags.case, volume="tiny", classes=min(flags.case.classes, 5))
    case = tiny if REHEARSES else flags.case
    measures: dict[str, Callable[[Path], None]] = {
        "step": partial(measure_steps, case),
        "ops": partial(measure_ops, case),
        "training": measure_training,
        "large": measure_large,
        "compiled": partial(measure_steps, case, ops=(STEP,), compiled=True),
    }
    measures[flags.what](flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
