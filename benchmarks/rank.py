"""Whether the scans that `sslfast.rank` chooses for labels teach more than scans chosen at random, on real cohorts."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.accuracy.cohorts import linked_folder, locate
from benchmarks.accuracy.runs import Result, Trial, fingerprint, read_run, run, write_rows
from benchmarks.accuracy.study import AccuracyConfig, cohort_settings
from benchmarks.accuracy.tables import DEFAULT, collect, p_value, paired, with_interval
from benchmarks.report import RESULTS, markdown, write_page
from sslfast import rank
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command
from sslfast.errors import UserError
from sslfast.ranking import TABLE

STRATEGIES = ("ranked", "random")
NOTE = """\
Each seed starts with the first labelled cases of the cohort, trains, adds cases, and trains anew from the beginning
with all of them. `ranked`: the first cases of `python -m sslfast.rank` on the run before, with its seed. `random`:
drawn by the seed. The unlabelled cases are all others. Dice is of the last step on the test cases; 95 % intervals from
resampled seeds and cases; p is of Wilcoxon's signed-rank test on the test cases, each the mean over the seeds."""


@dataclass(frozen=True)
class RankBenchmarkConfig:
    """Simulate the labelling of more cases, those that the networks ask for and others.

        python -m benchmarks --suite rank --real DIR

    A run that is finished in the output folder is not repeated; the first ones are those of the accuracy study.
    """

    real: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder that holds hippocampus/ and la_1.25mm/ (docs/datasets.md says how to get them)."""
    cohorts: tuple[str, ...] = ("la", "hippocampus")
    """Cohorts of the study."""
    labeled: tuple[int, ...] = (2, 4, 8)
    """Numbers of labelled cases: at first, and after each addition."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One simulation of each strategy for each seed."""
    steps: int | None = None
    """Steps of a run instead of the study's."""
    jobs: int = 2
    """Runs at once, each with its share of the processor's cores."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy")
    """Folder for the runs."""
    name: str = "rank"
    """Name of the page and the CSV in benchmarks/results/, or a path without suffix."""


def simulate(config: RankBenchmarkConfig) -> None:
    """Trains with the first cases, adds cases, trains again; writes the CSV and the page."""
    cohorts = cohort_settings(AccuracyConfig(real=config.real, cohorts=config.cohorts, steps=config.steps))
    output = config.output / "small"
    keys = [(cohort, seed, of) for cohort in cohorts for seed in config.seeds for of in STRATEGIES]
    data = {key: Path(locate(str(cohorts[key[0]]["data"]), config.real)) for key in keys}  # the labelled cases first
    results: dict[Trial, Result] = {}
    folders: dict[Trial, Path] = {}
    for number, count in enumerate(config.labeled):
        trials: dict[Trial, dict[str, object]] = {}
        located: dict[str, str] = {}
        for key in keys:
            cohort, seed, strategy = key
            trial = Trial(cohort, DEFAULT, count, seed, strategy if number else "")
            name = str(cohorts[cohort]["data"])
            if number:
                fewer = config.labeled[number - 1]
                before = folders[Trial(cohort, DEFAULT, fewer, seed, strategy if number > 1 else "")]
                data[key] = add_labels(
                    data[key], fewer, count - fewer, before, strategy, seed, output / "data" / cohort
                )
                name += f" {data[key].name}"
            trials[trial], located[name] = {**cohorts[cohort], "data": name}, str(data[key])
        for trial in run(trials, output, config.jobs, located):
            settings = fingerprint(trial.method, trials[trial])
            folders[trial] = trial.folder(output, settings)
            results[trial] = read_run(folders[trial], settings)
            write_rows(results, RESULTS / f"{config.name}.csv")
    print(write_page(config.name, page(results)))
    draw(results, RESULTS / f"{config.name}.png")


def add_labels(data: Path, labeled: int, more: int, run_before: Path, strategy: str, seed: int, folders: Path) -> Path:
    """The cohort in `data` with `more` of its unlabelled training cases behind the first `labeled`, in a new folder.

    Raises:
        UserError: the ranking failed.
    """
    description = json.loads((data / "dataset.json").read_text())
    labelled, others = description["training"][:labeled], description["training"][labeled:]
    if strategy == "random":
        chosen = np.random.default_rng(seed).permutation(others)[:more].tolist()
    else:
        with open(run_before / "rank.txt", "w") as said, redirect_stdout(said), redirect_stderr(said):
            status = rank.main([str(run_before), "--seed", str(seed), "--count", str(more)])
        if status != 0:
            raise UserError(f"the ranking failed; see {run_before / 'rank.txt'}")
        with open(run_before / "unlabelled" / TABLE, newline="") as file:
            chosen = [row["case"] for row in csv.DictReader(file)][:more]
    description["training"] = [*labelled, *chosen, *(name for name in others if name not in chosen)]
    digest = hashlib.sha256(json.dumps(description["training"]).encode()).hexdigest()[:8]
    return linked_folder(data.resolve(), folders / digest, description)


def page(results: Mapping[Trial, Result]) -> list[str]:
    """The lines of the page: Dice by cohort, number of labels and strategy."""
    rows = []
    for cohort, by_key in collect(results).items():
        for (strategy, count), scores in sorted(by_key.items(), key=lambda item: (item[0][1], item[0][0])):
            seeds = ", ".join(f"{dice:.3f}" for dice in scores.last.mean(1))
            more = ["–", "–"]
            if strategy == "ranked":
                own, other = paired(scores, by_key["random", count])
                more = [with_interval(own - other, "+"), f"{p_value(own, other):.2g}"]
            named = "first cases" if strategy == DEFAULT else strategy
            rows.append([f"`{cohort}`", str(count), named, with_interval(scores.last), seeds, *more])
    table = markdown(["cohort", "labels", "chosen", "Dice", "by seed", "ranked - random", "p"], rows)
    made = "; ".join(sorted({result.made for result in results.values()}))
    return [*table, "", *NOTE.splitlines(), "", f"{made}."]


def draw(results: Mapping[Trial, Result], path: Path) -> None:
    """Dice against the number of labels, a panel a cohort, a line a strategy and seed."""
    from matplotlib.figure import Figure

    cohorts = sorted({trial.cohort for trial in results})
    figure = Figure(figsize=(4 * len(cohorts), 3.3), layout="constrained")
    for i, cohort in enumerate(cohorts):
        axes = figure.add_subplot(1, len(cohorts), i + 1)
        here = {trial: result.last.mean() for trial, result in results.items() if trial.cohort == cohort}
        for k, strategy in enumerate(STRATEGIES):
            for seed in sorted({trial.seed for trial in here}):
                points = {t.labeled: d for t, d in here.items() if t.seed == seed and t.variant in ("", strategy)}
                counts = sorted(points)
                label = strategy if seed == min(trial.seed for trial in here) else None
                axes.plot(counts, [points[n] for n in counts], f"C{k}.-", label=label, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set(title=cohort, xlabel="labelled volumes", ylabel="Dice, a line a seed")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(RankBenchmarkConfig, simulate, argv)


if __name__ == "__main__":
    sys.exit(main())
