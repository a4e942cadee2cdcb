"""Held-out Dice of each method with the same labels, over seeds: the accuracy table of the README."""

from __future__ import annotations

import csv
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import tyro

from sslfast.cli import run_command
from sslfast.errors import UserError
from sslfast.files import whole_file
from sslfast.options import MethodName
from sslfast.train import main as train

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class AccuracyConfig:
    """Train every method on the same labels with several seeds and compare their held-out Dice.

    python -m benchmarks --suite accuracy --settings benchmarks/demo.yaml --seeds 1 2 3

    A run that is already in the output folder is not repeated, so a stopped study goes on where it was. The table shows,
    for each method, the mean over the seeds of the mean Dice over the test cases at the last step, its range, and the
    difference to `supervised` with its paired spread over the seeds.
    """

    settings: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path(__file__).parent / "demo.yaml"
    """Training settings as for `python -m sslfast.train --config`."""
    methods: tuple[MethodName, ...] = ("supervised", "ssl-contrastive")
    """Methods to compare."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each method for each seed."""
    labeled: tuple[int, ...] = (4,)
    """Numbers of labelled volumes."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy")
    """Folder for the runs."""
    name: str = "accuracy"
    """The table's name in benchmarks/results/."""


def compare(config: AccuracyConfig) -> None:
    """Runs what is missing and writes the table."""
    results: list[dict[str, Any]] = []
    for labeled in config.labeled:
        for seed in config.seeds:
            for method in config.methods:
                output = config.output / f"{method}-{labeled}-{seed}"
                if not (output / "test" / "metrics.json").exists():
                    flags = ["--config", str(config.settings), "--output", str(output), "--resume"]
                    flags += ["--method", method, "--labeled", str(labeled), "--seed", str(seed)]
                    if train(flags) != 0:
                        raise UserError(f"the run in {output} failed; see above")
                metrics = json.loads((output / "test" / "metrics.json").read_text())
                case_dice = {row["case"]: row["dice"] for row in metrics["rows"]}
                results.append(
                    {"method": method, "labeled": labeled, "seed": seed, "dice": metrics["mean_dice"], **case_dice}
                )
    _write(results, config)


def _write(results: list[dict[str, Any]], config: AccuracyConfig) -> None:
    lines = ["| method | labels | Dice, mean of seeds | by seed | against supervised |", "|---|---|---|---|---|"]
    dice = {(r["method"], r["labeled"], r["seed"]): r["dice"] for r in results}
    for labeled in config.labeled:
        for method in config.methods:
            values = [dice[method, labeled, seed] for seed in config.seeds]
            gain = "–"
            if method != "supervised" and "supervised" in config.methods:
                gains = [dice[method, labeled, s] - dice["supervised", labeled, s] for s in config.seeds]
                spread = f" ± {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
                gain = f"{statistics.mean(gains):+.3f}{spread}"
            by_seed = " ".join(f"{v:.3f}" for v in values)
            lines.append(f"| `{method}` | {labeled} | {statistics.mean(values):.3f} | {by_seed} | {gain} |")
    import torch

    settings = config.settings.read_text().strip()
    lines += [
        "",
        f"Seeds {' '.join(map(str, config.seeds))}, {date.today()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}. Settings:",
        "",
        *(f"    {line}" for line in settings.splitlines()),
    ]
    table = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    with whole_file(RESULTS / f"{config.name}.md") as part:
        part.write_text(table)
    with whole_file(RESULTS / f"{config.name}.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(AccuracyConfig, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
