"""Time and memory of the fused ops and of the whole step against plain PyTorch.

Every implementation of a row computes the same numbers (checked before timing) and they take turns within one process, so
that a busy machine slows all of them. Memory is the process's peak
beyond inputs and gradients, in a process of its own.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks import eager
from sslfast.cli import run_command
from sslfast.files import whole_file
from sslfast.losses import DualContrastiveLoss
from sslfast.ops import (
    VoxelSample,
    class_prototypes,
    dual_supervised,
    gather_voxels,
    pseudo_supervised,
    reliability,
    sample_voxels,
    voxel_infonce,
)

RESULTS = Path(__file__).parent / "results"
PERCENTILE = 80.0
STEP = 6000  # the end of the ramp
COLUMNS = ("median_ms", "iqr_ms")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOLUMES = {"la": (112, 112, 80), "pancreas": (96, 96, 96), "whole": (256, 256, 128), "tiny": (24, 20, 16)}


@dataclass(frozen=True)
class LossConfig:
    """Time the loss and its ops against plain PyTorch, and write the table, the CSV and the plot.

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
    """Volume, classes, feature channels, dtype. la: 112x112x80, pancreas: 96^3, whole: 256x256x128; batch 2 + 2 (whole: 1 + 1)."""
    ops: bool = True
    """Also each op on its own, at the first case."""
    seconds: float = 30.0
    """Timing of one row; at least three rounds are made."""
    layout: Literal["contiguous", "channels-last"] = "contiguous"
    """Memory layout of the maps."""
    name: str = "loss"
    """The table's name in benchmarks/results/."""


@dataclass(frozen=True)
class Case:
    """The inputs of one row."""

    volume: str
    classes: int
    width: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """From `volume,classes,width,dtype`."""
        volume, classes, width, dtype = text.split(",")
        return cls(volume, int(classes), int(width), dtype)

    @property
    def volumes(self) -> int:
        """Half of them labelled."""
        return 2 if self.volume == "whole" else 4

    @property
    def voxels(self) -> int:
        """Of one network's output."""
        size = VOLUMES[self.volume]
        return self.volumes * size[0] * size[1] * size[2]

    def __str__(self) -> str:
        size = "x".join(map(str, VOLUMES[self.volume]))
        return f"{self.volumes} x {size}, C={self.classes}, K={self.width}, {self.dtype}"


@dataclass(frozen=True)
class Row:
    """One implementation of one op at one case."""

    op: str
    case: str
    device: str
    implementation: str
    kind: str  # fwd, bwd, fwd+bwd
    median_ms: float
    iqr_ms: float
    ratio: float  # its median / sslfast's
    voxels: int  # of one network's output, half of them unlabelled
    extra_mb: float  # the peak beyond inputs and gradients
    bytes_a_voxel: float  # moved at least, by the floor's count
    percent_of_floor: float  # the floor's time at the measured bandwidth / the median


class Inputs:
    """Logits with a signal, features, labels; seeded."""

    def __init__(self, case: Case, layout: str) -> None:
        torch.manual_seed(0)
        size = VOLUMES[case.volume]
        memory = torch.channels_last_3d if layout == "channels-last" else torch.contiguous_format

        def leaf(values: Tensor) -> Tensor:
            return values.to(DTYPES[case.dtype]).to(memory_format=memory).requires_grad_()

        truth = torch.randint(0, case.classes, (case.volumes, *(s // 4 for s in size))).repeat_interleave(4, 1)
        truth = truth.repeat_interleave(4, 2).repeat_interleave(4, 3)
        signal = 2 * torch.nn.functional.one_hot(truth, case.classes).movedim(-1, 1)
        self.logits_a, self.logits_b = (leaf(signal + torch.randn(signal.shape)) for _ in range(2))
        self.features_a, self.features_b = (leaf(torch.randn(case.volumes, case.width, *size)) for _ in range(2))
        self.labelled = case.volumes // 2
        self.labels = truth[: self.labelled].contiguous()

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient."""
        return [self.logits_a, self.logits_b, self.features_a, self.features_b]


Call = Callable[[], Tensor]  # the loss


def step_implementations(inputs: Inputs, case: Case) -> dict[str, Call]:
    """The whole step, by name; the last is ours."""
    criterion = DualContrastiveLoss(case.classes, percentile=PERCENTILE, ramp_steps=STEP)
    arguments = (inputs.logits_a, inputs.logits_b, inputs.features_a, inputs.features_b, inputs.labels)
    compiled = torch.compile(eager.dual_contrastive)
    return {
        "eager, host percentile": lambda: eager.dual_contrastive(*arguments, PERCENTILE, eager.numpy_percentile),
        "eager, kthvalue": lambda: eager.dual_contrastive(*arguments, PERCENTILE, eager.kthvalue_percentile),
        "torch.compile, kthvalue": lambda: compiled(*arguments, PERCENTILE, eager.kthvalue_percentile),
        "sslfast": lambda: criterion(*arguments, step=STEP).loss,
    }


def op_implementations(inputs: Inputs, case: Case) -> dict[str, dict[str, Call]]:
    """Each op, by name: eager and ours. An op without gradient gives a number that depends on its result."""
    first = inputs.labelled
    za, zb, labels = inputs.logits_a, inputs.logits_b, inputs.labels
    features = inputs.features_b[first:]
    state = reliability(za[first:], zb[first:], PERCENTILE, winner=0).state
    kept, label = (state & 32) > 0, (state & 31).long()

    def draw_ours() -> list[VoxelSample]:
        return [
            sample_voxels(state, [256] * case.classes, 1, STEP, role="anchors"),
            sample_voxels(state, [512] * case.classes, 1, STEP, role="negatives"),
        ]

    with torch.no_grad():
        sums, members = class_prototypes(features, state, case.classes)
        samples = draw_ours()
        anchors, negatives = (gather_voxels(features, s.indices) for s in samples)
    anchors.requires_grad_()

    def draw() -> Tensor:
        flat, all_labels = kept.flatten(), label.flatten()
        drawn = []
        for c in range(case.classes):
            for mask, quota in ((~flat & (all_labels == c), 256), (flat & (all_labels != c), 512)):
                candidates = mask.nonzero().squeeze(1)
                drawn.append(candidates[torch.randperm(len(candidates))[:quota]].sort().values)
        return torch.cat(drawn).sum()

    def thresholds() -> Tensor:
        found = [eager.reliability(z[first:], PERCENTILE, eager.kthvalue_percentile)[0] for z in (za, zb)]
        return torch.as_tensor(found).sum()

    def sums_by_class() -> Tensor:
        rows = torch.nn.functional.normalize(features.movedim(1, -1)[kept].float(), dim=1)
        return torch.stack([rows[label[kept] == c].sum(0) for c in range(case.classes)]).sum()

    def infonce() -> Tensor:
        unit = functools.partial(torch.nn.functional.normalize, dim=-1)
        to_prototypes, to_negatives = unit(anchors) @ unit(sums).T, unit(anchors) @ unit(negatives).mT
        targets = torch.arange(case.classes).repeat_interleave(anchors.shape[1])
        similarity = torch.cat((to_prototypes, to_negatives), -1).flatten(0, 1) / 0.1
        return torch.nn.functional.cross_entropy(similarity, targets)

    return {
        "dual_supervised": {
            "eager": lambda: torch.stack(eager.dual_supervised(za[:first], zb[:first], labels)).sum(),
            "sslfast": lambda: torch.stack(dual_supervised(za[:first], zb[:first], labels)[:3]).sum(),
        },
        "reliability": {
            "eager": thresholds,
            "sslfast": lambda: reliability(za[first:], zb[first:], PERCENTILE, winner=0).thresholds.sum(),
        },
        "pseudo_supervised": {
            "eager": lambda: (
                eager.pseudo_supervised(za[first:], kept, label) + eager.pseudo_supervised(zb[first:], kept, label)
            ),
            "sslfast": lambda: pseudo_supervised(za[first:], zb[first:], state).ce.sum(),
        },
        "class_prototypes": {
            "eager": lambda: sums_by_class().detach(),
            "sslfast": lambda: class_prototypes(features.detach(), state, case.classes).sums.sum(),
        },
        "sample_voxels": {
            "eager": draw,
            "sslfast": lambda: sum((sample.indices.sum() for sample in draw_ours()), torch.zeros(())),
        },
        "voxel_infonce": {
            "eager": infonce,
            "sslfast": lambda: (
                voxel_infonce(anchors, samples[0].counts, sums, members, negatives, samples[1].counts).loss
            ),
        },
    }


def floor_bytes(op: str, case: Case) -> dict[str, float]:
    """Bytes that must move at least, by kind: every input read once and every output written once in each direction."""
    s = torch.finfo(DTYPES[case.dtype]).bits / 8
    logits, features, half = 2 * case.classes * s, case.width * s, 0.5
    forward = {
        "dual_contrastive": half * (logits + 8) + half * (logits + 1 + features),
        "dual_supervised": half * (logits + 8),
        "reliability": half * (logits + 1),
        "pseudo_supervised": half * (logits + 1),
        "class_prototypes": half * (features + 1),
        "sample_voxels": half * 1,
        "voxel_infonce": 0.0,
    }[op]
    backward = {
        "dual_contrastive": half * (2 * logits + 8) + half * (2 * logits + 1) + features,
        "dual_supervised": half * (2 * logits + 8),
        "pseudo_supervised": half * (2 * logits + 1),
    }.get(op, 0.0)
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}


def bandwidth() -> float:
    """Bytes a second of a large copy, counted as read and written once: the best of ten."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - started))
    return best


def time_once(call: Call, leaves: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds forward and backward; the backward of what has no gradient takes 0."""
    for leaf in leaves:
        leaf.grad = None
    started = time.perf_counter()
    loss = call()
    middle = time.perf_counter()
    if not loss.requires_grad:
        return middle - started, 0.0
    loss.backward()
    return middle - started, time.perf_counter() - middle


def time_in_turns(
    calls: dict[str, Call], leaves: Sequence[Tensor], seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """All implementations once to warm up, then in turns until the time is used up; three rounds at least."""
    for call in calls.values():
        time_once(call, leaves)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    started = time.perf_counter()
    while len(found["sslfast"]) < 3 or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            found[name].append(time_once(call, leaves))
    return found


def extra_mb(op: str, case: Case, implementation: str, layout: str) -> float:
    """Peak memory of one forward and backward pass beyond inputs and gradients, in a fresh process."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.loss",
            "--probe",
            op,
            *map(str, asdict(case).values()),
            implementation,
            layout,
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},  # keeps nothing freed
    )
    return float(json.loads(result.stdout.splitlines()[-1]))


def _probe(op: str, volume: str, classes: str, width: str, dtype: str, implementation: str, layout: str) -> None:
    case = Case(volume, int(classes), int(width), dtype)
    inputs = Inputs(case, layout)
    calls = step_implementations(inputs, case) if op == "dual_contrastive" else op_implementations(inputs, case)[op]
    call = calls[implementation]
    time_once(call, inputs.leaves)  # loads what loads lazily, compiles what compiles
    for leaf in inputs.leaves:
        leaf.grad = None

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1024

    def forget_peak() -> float:
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")

    before = forget_peak()
    loss = call()
    extra = status("VmHWM") - before
    if loss.requires_grad:
        forget_peak()
        loss.backward()
        peak = status("VmHWM")
        del loss
        extra = max(extra, peak - status("VmRSS"))  # what remains are the gradients
    print(json.dumps(extra))


def measure(config: LossConfig) -> None:
    """Times every case and writes the results."""
    from tqdm import tqdm

    speed = bandwidth()
    rows: list[Row] = []
    cases = [Case.parse(text) for text in config.cases]
    jobs = [("dual_contrastive", case) for case in cases]
    if config.ops:
        inputs = Inputs(cases[0], config.layout)
        jobs += [(op, cases[0]) for op in op_implementations(inputs, cases[0])]
    for op, case in tqdm(jobs, desc="benchmark", unit="row", leave=False):
        inputs = Inputs(case, config.layout)
        calls = step_implementations(inputs, case) if op == "dual_contrastive" else op_implementations(inputs, case)[op]
        check_same(op, calls)
        times = time_in_turns(calls, inputs.leaves, config.seconds)
        for kind, of in (("fwd", 0), ("bwd", 1), ("fwd+bwd", None)):
            values = {n: [1e3 * (t[of] if of is not None else sum(t)) for t in ts] for n, ts in times.items()}
            ours = statistics.median(values["sslfast"])
            if ours == 0 or (kind == "fwd+bwd" and statistics.median(t[1] for t in times["sslfast"]) == 0):
                continue
            floor = floor_bytes(op, case)[kind]
            for name, milliseconds in values.items():
                median = statistics.median(milliseconds)
                quartiles = statistics.quantiles(milliseconds, n=4)
                rows.append(
                    Row(
                        op,
                        str(case),
                        "cpu",
                        name,
                        kind,
                        median,
                        quartiles[2] - quartiles[0],
                        median / ours,
                        case.voxels,
                        extra_mb(op, case, name, config.layout) if kind == "fwd+bwd" else float("nan"),
                        floor,
                        100 * floor * case.voxels / speed / (median / 1e3),
                    )
                )
        _write(rows, speed, config)
    print((RESULTS / f"{config.name}.md").read_text())


def check_same(op: str, calls: dict[str, Call]) -> None:
    """What is compared must be equal: exactly but for the draw and the rounding of the percentile.

    Raises:
        RuntimeError: an implementation computes something else.
    """
    values = {name: float(call().detach()) for name, call in calls.items()}
    for name, value in values.items():
        tolerance = {"sample_voxels": 0.1, "dual_contrastive": 0.02, "class_prototypes": 0.02}.get(op, 2e-3)
        if abs(value - values["sslfast"]) > tolerance * max(abs(value), 1.0):
            raise RuntimeError(f"{op}: {name} gives {value}, sslfast gives {values['sslfast']}")


def _write(rows: Sequence[Row], speed: float, config: LossConfig) -> None:
    RESULTS.mkdir(exist_ok=True)
    with whole_file(RESULTS / f"{config.name}.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        "| op | input | implementation | kind | median ms | IQR | times slower than sslfast | extra MB | extra B/unlabelled voxel | B/voxel at least | % of floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        memory = " | " if r.extra_mb != r.extra_mb else f"{r.extra_mb:.0f} | {r.extra_mb * 2**20 / r.voxels * 2:.0f}"
        lines.append(
            f"| `{r.op}` | {r.case} | {r.implementation} | {r.kind} | {r.median_ms:.1f} | {r.iqr_ms:.1f} | "
            f"{r.ratio:.1f} | {memory} | {r.bytes_a_voxel:.0f} | {r.percent_of_floor:.0f} |"
        )
    lines += [
        "",
        f"{date.today()}, {_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}; a copy moves {speed / 1e9:.1f} GB/s; {config.layout}. Medians "
        "of interleaved rounds. Floor: every input read and every output written once, at the copy's bandwidth. Memory: beyond "
        "inputs and gradients, in a process of its own.",
    ]
    with whole_file(RESULTS / f"{config.name}.md") as part:
        part.write_text("\n".join(lines) + "\n")
    _draw(rows, config)


def _draw(rows: Sequence[Row], config: LossConfig) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    whole = [r for r in rows if r.op == "dual_contrastive" and r.kind == "fwd+bwd"]
    cases, names = list(dict.fromkeys(r.case for r in whole)), list(dict.fromkeys(r.implementation for r in whole))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.9 * len(cases)), layout="constrained")
    for i, name in enumerate(names):
        mine = {r.case: r.median_ms for r in whole if r.implementation == name}
        places = [cases.index(case) + (i - len(names) / 2) * 0.2 for case in mine]
        bars = axes.barh(places, list(mine.values()), 0.18, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set(
        xscale="log", xlabel="ms, forward and backward", yticks=range(len(cases)), title="The dual contrastive step"
    )
    axes.set_yticklabels(cases, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    with whole_file(RESULTS / f"{config.name}.png") as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(LossConfig, measure, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        _probe(*sys.argv[2:])
    else:
        sys.exit(main())
