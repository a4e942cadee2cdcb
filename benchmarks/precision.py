"""Training curves in float32 and in bfloat16, on the demo cohort, over seeds."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.loss import RESULTS, processor
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command
from sslfast.errors import UserError
from sslfast.train import main as train

PRECISIONS = ("fp32", "bf16")
LAST = 5  # rows of the log that stand for a run's end


@dataclass(frozen=True)
class PrecisionConfig:
    """Train with the same seeds in both precisions and compare the curves.

    python -m benchmarks --suite precision

    A run that is already in the output folder is not repeated.
    """

    settings: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path(__file__).parent / "demo.yaml"
    """Training settings as for `python -m sslfast.train --config`."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run in each precision for each seed."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/precision")
    """Folder for the runs."""
    name: str = "precision"
    """The table's name in benchmarks/results/."""


@dataclass(frozen=True)
class Run:
    """The curves of one run."""

    precision: str
    seed: int
    steps: list[int]
    loss: list[float]  # of both networks together
    validation: dict[int, float]  # Dice by step

    @property
    def final_loss(self) -> float:
        """Mean of the last rows."""
        return statistics.mean(self.loss[-LAST:])

    @property
    def final_dice(self) -> float:
        """Of the last validation."""
        return self.validation[max(self.validation)]


def run_once(config: PrecisionConfig, precision: str, seed: int) -> Run:
    """Trains, if need be, and reads the log."""
    output = config.output / f"{precision}-{seed}"
    if not (output / "test" / "metrics.json").exists():
        flags = ["--config", str(config.settings), "--output", str(output), "--resume", "--validate-every", "50"]
        if train([*flags, "--precision", precision, "--seed", str(seed)]) != 0:
            raise UserError(f"the run in {output} failed; see above")
    with open(output / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    validation = {int(r["step"]): float(r["validation_dice"]) for r in rows if r.get("validation_dice")}
    rows = [r for r in rows if r["loss_a"]]
    losses = [float(r["loss_a"]) + float(r["loss_b"]) for r in rows]
    return Run(precision, seed, [int(r["step"]) for r in rows], losses, validation)


def compare(config: PrecisionConfig) -> None:
    """Runs what is missing; writes the table and the picture."""
    runs = [run_once(config, precision, seed) for seed in config.seeds for precision in PRECISIONS]
    lines = ["| precision | Dice on the validation cases, mean | by seed | loss at the end, mean | by seed |"]
    lines.append("|---|---|---|---|---|")
    for precision in PRECISIONS:
        own = [run for run in runs if run.precision == precision]
        cells = []
        for values in ([run.final_dice for run in own], [run.final_loss for run in own]):
            cells += [f"{statistics.mean(values):.3f}", " ".join(f"{value:.3f}" for value in values)]
        lines.append(f"| {precision} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Seeds {' '.join(map(str, config.seeds))}, the settings of `{config.settings.name}`. {date.today()}, {processor()}.",
    ]
    RESULTS.mkdir(exist_ok=True)
    with whole_file(RESULTS / f"{config.name}.md") as part:
        part.write_text("\n".join(lines) + "\n")
    draw(runs, RESULTS / f"{config.name}.png")
    print((RESULTS / f"{config.name}.md").read_text())


def draw(runs: Sequence[Run], path: Path) -> None:
    """Loss and validation Dice over the steps, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for run in runs:
        colour = f"C{PRECISIONS.index(run.precision)}"
        label = run.precision if run.seed == runs[0].seed else None
        left.plot(run.steps, run.loss, colour, alpha=0.7, linewidth=1, label=label)
        right.plot(list(run.validation), list(run.validation.values()), colour, alpha=0.7, linewidth=1, label=label)
    left.set(xlabel="step", ylabel="loss of both networks", yscale="log")
    right.set(xlabel="step", ylabel="Dice on the validation cases")
    right.legend()
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(PrecisionConfig, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
