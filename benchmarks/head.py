"""The fused head against a classifier and the fused loss: time and memory, forward and backward.

The classifier is the 1x1x1 convolution of torch, under autocast for bfloat16 features, with and without the channel dropout that
the published networks put before it. All take turns within one process; memory is the peak beyond features and gradients, in a
process of its own.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, PERCENTILE, STEP, Call, Case, Inputs
from benchmarks.loss import RESULTS, peak_beyond_gradients, processor, time_in_turns
from benchmarks.memory import probe
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command
from sslfast.losses import DualContrastiveHead


@dataclass(frozen=True)
class HeadConfig:
    """Time the fused head against a classifier and the fused loss, and write the table and the CSV.

    python -m benchmarks --suite head
    """

    cases: tuple[str, ...] = ("la,2,16,fp32", "la,2,16,bf16", "la,14,32,bf16")
    """Volume, classes, feature channels, dtype; see the suite loss."""
    layouts: tuple[str, ...] = ("contiguous", "channels-last")
    """Memory layouts of the features; the trainer's is channels-last."""
    seconds: float = 30.0
    """Timing of one case and layout; at least three rounds are made."""
    name: str = "head"
    """The table's name in benchmarks/results/."""


@dataclass(frozen=True)
class Row:
    """One implementation at one case and layout."""

    case: str
    layout: str
    implementation: str
    forward_ms: float
    backward_ms: float
    median_ms: float
    iqr_ms: float
    share: float  # sslfast's median / its
    extra_mb: float


def implementations(inputs: Inputs, case: Case) -> dict[str, Call]:
    """By name; the last is ours."""
    torch.manual_seed(1)
    head = DualContrastiveHead(case.classes, case.width, percentile=PERCENTILE, ramp_steps=STEP, dropout=0.5)
    for classifier in (head.classifier_a, head.classifier_b):
        torch.nn.init.normal_(classifier.weight, std=2 / case.width**0.5)  # logits of a network that has learnt
    classifiers, features = (head.classifier_a, head.classifier_b), (inputs.features_a, inputs.features_b)

    def unfused(dropout: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=DTYPES[case.dtype] == torch.bfloat16):
            logits = [c(head.dropout(f) if dropout else f) for c, f in zip(classifiers, features, strict=True)]
        return head.criterion(*logits, *features, inputs.labels, step=STEP).loss

    return {
        "classifier, fused loss": lambda: unfused(dropout=False),
        "dropout, classifier, fused loss": lambda: unfused(dropout=True),
        "sslfast": lambda: head(*features, inputs.labels, step=STEP).loss,
    }


def _probe(volume: str, classes: str, width: str, dtype: str, layout: str, name: str) -> None:
    case = Case(volume, int(classes), int(width), dtype)
    inputs = Inputs(case, layout)
    print(peak_beyond_gradients(implementations(inputs, case)[name], [inputs.features_a, inputs.features_b]))


def measure(config: HeadConfig) -> None:
    """Times all, writes the results and prints them."""
    from tqdm import tqdm

    rows = []
    for text, layout in tqdm([(c, layout) for c in config.cases for layout in config.layouts], leave=False):
        case = Case.parse(text)
        inputs = Inputs(case, layout)
        leaves = [inputs.features_a, inputs.features_b]
        times = time_in_turns(implementations(inputs, case), leaves, config.seconds)
        del inputs, leaves
        totals = {name: [1e3 * sum(t) for t in found] for name, found in times.items()}
        for name, found in times.items():
            median, quartiles = statistics.median(totals[name]), statistics.quantiles(totals[name], n=4)
            forward, backward = (1e3 * statistics.median(part) for part in zip(*found, strict=True))
            share = statistics.median(totals["sslfast"]) / median
            extra = probe("benchmarks.head", *map(str, asdict(case).values()), layout, name)
            rows.append(
                Row(str(case), layout, name, forward, backward, median, quartiles[2] - quartiles[0], share, extra)
            )
    with whole_file(RESULTS / f"{config.name}.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        "| features | layout | implementation | forward ms | backward ms | both, median | IQR | sslfast takes | extra MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.case} | {r.layout} | {r.implementation} | {r.forward_ms:.1f} | {r.backward_ms:.1f} | {r.median_ms:.1f} | "
            f"{r.iqr_ms:.1f} | {r.share:.2f} | {r.extra_mb:.0f} |"
        )
    lines += [
        "",
        f"{date.today()}, {processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}. Medians of interleaved rounds. Memory: beyond features and their gradients, in a process of its own.",
    ]
    with whole_file(RESULTS / f"{config.name}.md") as part:
        part.write_text("\n".join(lines) + "\n")
    print((RESULTS / f"{config.name}.md").read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(HeadConfig, measure, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        _probe(*sys.argv[2:])
    else:
        sys.exit(main())
