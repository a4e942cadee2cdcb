"""Held-out Dice of every method against the number of labels, on the demo cohorts, over seeds; and what its settings do."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro
import yaml

from benchmarks.loss import processor
from sslfast.atomic_io import make_folder, whole_file
from sslfast.cli import run_command
from sslfast.errors import UserError
from sslfast.methods import find_method
from sslfast.options import Augment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ALL_LABELS = 40
SMALL = {"width": 8, "steps": 400, "patch": [24, 24, 24], "learning_rate": 0.01, "validate_every": 200}
GRID = {"demo": 6, "demo-brain": 4}  # mm, with SMALL
FULL = {"width": 16, "depth": 5, "steps": 6000, "patch": [64, 64, 64], "spacing": 2}  # a GPU's work
METHODS: tuple[str, ...] = (
    "supervised",
    "ssl-contrastive",
    "as-released",
    "dual-networks",
    "mcf",
    "cps",
    "mean-teacher",
    "ua-mt",
    "u2pl",
    "bcp",
)
DRAWN = ("supervised", "as-released", "ssl-contrastive")  # overlays are kept of them
VARIANTS: dict[str, dict[str, dict[str, object]]] = {  # of a method: what changes
    "ssl-contrastive": {
        "no views": {"views": "none"},
        "no contrast": {"contrast_weight": 0.0},
        "no Dice with the teacher": {"pseudo_dice_weight": 0.0},
        "no pseudo-labels, no cosine": {"pseudo_weight": 0.0},
        "percentile 80": {"percentile": [80, 80]},
        "percentile 80 to 100": {"percentile": [80, 100]},
        "as in the paper, with views": {"preset": "paper", "views": "random"},
        "pseudo-labels, cosine x 0.3": {"pseudo_weight": 0.3},
        "all three x 0.3": {"pseudo_weight": 0.3, "pseudo_dice_weight": 0.3},
    },
    "u2pl": {"negatives of the step alone": {"memory": 0}},
}


@dataclass(frozen=True)
class AccuracyConfig:
    """Train the methods with the same few labels, several seeds each, and compare their Dice on the test cases.

        python -m benchmarks --suite accuracy                      every method, 2, 4 and 8 labels of 40, both cohorts
        python -m benchmarks --suite accuracy --ablation           one setting changed at a time, 4 labels, on tuning cases
        python -m benchmarks --suite accuracy --scale full --jobs 1   larger networks, finer grid, 6000 steps: for a GPU

    A run whose results are in the output folder is not repeated, so a stopped study goes on where it was; with --extend on another
    machine too. Every number is of the last step unless it says otherwise. Intervals are 95 %, from resampled seeds and cases; p
    is of Wilcoxon's signed-rank test on the test cases' Dice, each the mean over the seeds.
    """

    settings: tuple[Path, ...] = (HERE / "demo.yaml", HERE / "demo-brain.yaml")
    """Training settings as for `python -m sslfast.train --config`, a file for each cohort."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare."""
    labeled: tuple[int, ...] = (2, 4, 8)
    """Numbers of labelled volumes; `supervised` is also trained on all of them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each method for each seed."""
    ablation: bool = False
    """Compare settings in place of methods, with the middle one of --labeled: those of ssl-contrastive, each with one change from its
    defaults, and u2pl's memory. By the tuning cases (demo-tuning, demo-brain-tuning), so that test cases choose nothing."""
    variants: tuple[str, ...] = ()
    """Of the ablation these alone, such as "no views"; none: all."""
    scale: Literal["small", "as-is", "full"] = "small"
    """small: networks and grid of a study on two cores. as-is: those of the settings. full: those of a real run, for a GPU."""
    steps: int | None = None
    """Length of a run in place of the study's."""
    augment: Augment | None = None
    """Augmentation in place of the study's, which has none; of all methods alike, but that affine leaves unlabelled volumes to the views
    where a method has them."""
    jobs: int = 2
    """Runs at once, each with its share of the processor's cores."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy")
    """Folder for the runs."""
    name: str | None = None
    """Of the table and the CSV in benchmarks/results/; the ablation's table has -ablation behind it, its runs are in the same CSV.
    None: accuracy, with another scale behind it."""
    extend: bool = False
    """Do not repeat runs that the CSV has with the same settings: for more labels, methods or seeds than it was made with."""


class Trial(NamedTuple):
    """One run."""

    cohort: str
    method: str
    labeled: int
    seed: int
    variant: str = ""

    def folder(self, output: Path, settings: str) -> Path:
        """Where it lies, with the settings of that `fingerprint`."""
        variant = "-" + self.variant.replace(" ", "_") if self.variant else ""
        return output / self.cohort / f"{self.method}{variant}-{self.labeled}-{self.seed}-{settings}"


class Result(NamedTuple):
    """Dice of one run, the mean over the classes, and with which settings it ran (`fingerprint`)."""

    settings: str
    validation: float  # the mean over the validation cases, last step
    last: dict[str, float]  # by test case
    best: dict[str, float]  # by test case, of the validation-best checkpoint


class Scores(NamedTuple):
    """Dice, the mean over the classes."""

    last: np.ndarray  # [seeds, test cases]
    best: np.ndarray  # [seeds, test cases], of the validation-best checkpoint


def study(config: AccuracyConfig) -> None:
    """Runs what is missing; writes the table, the rows of every case, the curves and the first seed's overlays."""
    config = replace(config, output=config.output / config.scale)
    middle = config.labeled[len(config.labeled) // 2]
    settings = {}
    for path in config.settings:
        own = yaml.safe_load(path.read_text())
        if config.scale == "small":
            own |= {**SMALL, "spacing": GRID.get(own["data"], own.get("spacing"))}
        elif config.scale == "full":
            own |= FULL
        own |= {name: value for name in ("steps", "augment") if (value := getattr(config, name)) is not None}
        if config.ablation:
            own["data"] += "-tuning"
        settings[own["data"]] = own
    trials = [
        Trial(cohort, *rest, seed)
        for cohort in settings
        for rest in _methods_and_labels(config)
        for seed in config.seeds
    ]
    if config.ablation:
        chosen = {m: [v for v in of if not config.variants or v in config.variants] for m, of in VARIANTS.items()}
        trials = [
            Trial(cohort, method, middle, seed, variant)
            for method, variants in chosen.items()
            if variants
            for variant in ("", *variants)
            for cohort in settings
            for seed in config.seeds
        ]
    name = config.name or ("accuracy" if config.scale == "small" else f"accuracy-{config.scale}")
    path = RESULTS / f"{name}.csv"
    known = read_rows(path)
    own_settings = {trial: settings_of(trial, settings) for trial in trials}
    wanted = {trial: fingerprint(trial.method, own) for trial, own in own_settings.items()}
    missing = [t for t in trials if not (config.extend and t in known and known[t].settings == wanted[t])]
    run({t: own_settings[t] for t in missing}, config)
    known |= {t: read_run(t.folder(config.output, wanted[t]), wanted[t]) for t in missing}
    make_folder(RESULTS)
    write_rows(known, path)

    scores = collect({trial: known[trial] for trial in trials})
    lines = []
    for cohort, own in settings.items():
        rows = {key[1:]: value for key, value in scores.items() if key[0] == cohort}
        table = ablation_table(rows) if config.ablation else methods_table(rows, config.methods, config.labeled)
        lines += [f"### `{cohort}`", "", *table, "", f"Settings: `{json.dumps(own)}`", ""]
    lines.append(f"Seeds {' '.join(map(str, config.seeds))}. {date.today()}, {processor()}.")
    with whole_file(RESULTS / f"{name}{'-ablation' if config.ablation else ''}.md") as part:
        part.write_text("\n".join(lines) + "\n")
    if not config.ablation:
        draw_curves(scores, config, RESULTS / f"{name}.png")
        for cohort in settings:
            for method in [m for m in config.methods if m in DRAWN]:
                trial = Trial(cohort, method, middle, config.seeds[0])
                drawn = trial.folder(config.output, wanted[trial]) / "overlays.png"
                if drawn.exists():  # else the run was another machine's
                    shutil.copyfile(drawn, RESULTS / f"{name}-{cohort}-{method}.png")
    print("\n".join(lines))


def _methods_and_labels(config: AccuracyConfig) -> list[tuple[str, int]]:
    pairs = [(method, labeled) for labeled in config.labeled for method in config.methods]
    return [*pairs, ("supervised", ALL_LABELS)]


def settings_of(trial: Trial, settings: dict[str, dict[str, object]]) -> dict[str, object]:
    """What a trial trains with: its cohort's settings, by cohort in `settings`, and what its variant changes."""
    changed = VARIANTS[trial.method][trial.variant] if trial.variant else {}
    return {**settings[trial.cohort], **changed}


def fingerprint(method: str, settings: dict[str, object]) -> str:
    """Eight hexadecimal digits that change with the settings, the method's defaults and how a demo cohort is made."""
    from sslfast.data.demo.cohorts import COHORTS

    cohort = COHORTS.get(str(settings["data"]))
    said = [settings, asdict(find_method(method).Options()), asdict(cohort.parameters) if cohort else None]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def run(trials: Mapping[Trial, dict[str, object]], config: AccuracyConfig) -> None:
    """Trains what has no result yet, with its settings, `config.jobs` at once.

    Raises:
        UserError: a run failed; its output is in the file that the message names.
    """
    import torch
    from tqdm import tqdm

    folders = {trial: trial.folder(config.output, fingerprint(trial.method, own)) for trial, own in trials.items()}
    missing = [trial for trial in trials if not (folders[trial] / "test_best" / "metrics.json").exists()]
    threads = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    workers = ProcessPoolExecutor(config.jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    with workers as pool, tqdm(total=len(missing), desc="study", unit="run") as progress:
        runs = [pool.submit(train, trial, trials[trial], folders[trial]) for trial in missing]
        try:
            for done in as_completed(runs):
                done.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train(trial: Trial, settings: dict[str, object], folder: Path) -> None:
    """One run, in this process; what it prints goes into the folder's output.txt. A UserError says that it failed."""
    from sslfast import train as trainer

    make_folder(folder)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--config", str(folder / "settings.yaml"), "--resume", "--output", str(folder), "--method", trial.method]
    flags += ["--labeled", str(trial.labeled), "--seed", str(trial.seed)]
    with open(folder / "output.txt", "w") as output, redirect_stdout(output), redirect_stderr(output):
        status = trainer.main(flags)
    if status != 0:
        raise UserError(f"a run failed; see {folder / 'output.txt'}")


def case_dice(folder: Path) -> dict[str, float]:
    """Dice of each case in a folder of test results: the mean over the classes that it or the prediction holds."""
    found: dict[str, list[float]] = {}
    for row in json.loads((folder / "metrics.json").read_text())["rows"]:
        found.setdefault(row["case"], []).append(row["dice"])
    return {case: float(np.nanmean(values)) for case, values in found.items()}


def read_run(folder: Path, settings: str) -> Result:
    """What a finished run's folder says."""
    with open(folder / "log.csv", newline="") as file:
        validation = [float(row["validation_dice"]) for row in csv.DictReader(file) if row.get("validation_dice")]
    return Result(settings, validation[-1], case_dice(folder / "test"), case_dice(folder / "test_best"))


def read_rows(path: Path) -> dict[Trial, Result]:
    """The runs that a CSV holds; none where there is no file."""
    found: dict[Trial, Result] = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                method: str = row["method"]
                trial = Trial(row["cohort"], method, int(row["labeled"]), int(row["seed"]), row["variant"])
                result = found.setdefault(trial, Result(row["settings"], float(row["validation_last"]), {}, {}))
                result.last[row["case"]], result.best[row["case"]] = float(row["dice_last"]), float(row["dice_best"])
    return found


def write_rows(results: dict[Trial, Result], path: Path) -> None:
    """A row for each run and test case, sorted."""
    with whole_file(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Trial._fields, "settings", "validation_last", "case", "dice_last", "dice_best"])
        for trial, result in sorted(results.items()):
            for case in sorted(result.last):
                dice = (f"{of[case]:.5f}" for of in (result.last, result.best))
                writer.writerow([*trial, result.settings, f"{result.validation:.5f}", case, *dice])


def collect(results: dict[Trial, Result]) -> dict[tuple[str, str, int], Scores]:
    """Scores by (cohort, variant or method, labels)."""
    found: dict[tuple[str, str, int], list[Scores]] = {}
    for trial, result in results.items():
        cases = sorted(result.last)
        last, best = (np.array([of[case] for case in cases]) for of in (result.last, result.best))
        key = trial.cohort, trial.variant or trial.method, trial.labeled
        found.setdefault(key, []).append(Scores(last, best))
    return {key: Scores(*map(np.stack, zip(*runs, strict=True))) for key, runs in found.items()}


def interval(dice: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the mean of [seeds, cases]: both are resampled."""
    random = np.random.default_rng(0)
    seeds, cases = dice.shape
    chosen = dice[
        random.integers(seeds, size=(draws, seeds, 1)),
        random.integers(cases, size=(draws, 1, cases)),
    ]
    low, high = np.percentile(chosen.mean((1, 2)), (2.5, 97.5))
    return float(low), float(high)


def p_value(dice: np.ndarray, other: np.ndarray) -> float:
    """Two-sided, paired over the cases; 1 where nothing differs."""
    from scipy.stats import wilcoxon

    difference = dice.mean(0) - other.mean(0)
    return float(wilcoxon(difference).pvalue) if difference.any() else 1.0


def with_interval(dice: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % interval, as a cell of a table."""
    low, high = interval(dice)
    return f"{dice.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def methods_table(rows: dict[tuple[str, int], Scores], methods: Sequence[str], labeled: Sequence[int]) -> list[str]:
    """Dice for each number of labels; with the middle one, the gain, the share of the gap to all labels, and the tests."""
    middle = labeled[len(labeled) // 2]
    columns = [*(f"{n} labels" for n in labeled), f"{middle} labels, validation-best", f"gain over supervised-{middle}"]
    columns += ["share of the gap", "p against supervised", "p against as-released"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    everything = rows["supervised", ALL_LABELS]
    for method in methods:
        own = rows[method, middle]
        cells = [with_interval(rows[method, n].last) for n in labeled] + [f"{own.best.mean():.3f}"]
        if method != "supervised" and "supervised" in methods:
            few = rows["supervised", middle].last
            gain = own.last - few
            share = gain.mean() / (everything.last.mean() - few.mean())
            cells += [with_interval(gain, "+"), f"{share:.0%}", f"{p_value(own.last, few):.3f}"]
        else:
            cells += ["–"] * 3
        compared = method != "as-released" and "as-released" in methods
        cells.append(f"{p_value(own.last, rows['as-released', middle].last):.3f}" if compared else "–")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    lines.append(
        f"| `supervised`, {ALL_LABELS} labels | {with_interval(everything.last)} |" + " |" * (len(columns) - 1)
    )
    return lines


def ablation_table(rows: dict[tuple[str, int], Scores]) -> list[str]:
    """Dice of each method's variants on the tuning cases, best first, with their difference to the method itself."""
    lines = ["| setting | Dice of the tuning cases | difference | p |", "|---|---|---|---|"]
    for method, variants in VARIANTS.items():
        ours = {name: scores.last for (name, _), scores in rows.items() if name == method or name in variants}
        for name, dice in sorted(ours.items(), key=lambda x: (x[0] != method, -x[1].mean())):
            if name == method:
                cells = [f"`{name}`", with_interval(dice), "–", "–"]
            else:
                gain = with_interval(dice - ours[method], "+")
                cells = [name, with_interval(dice), gain, f"{p_value(dice, ours[method]):.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw_curves(scores: dict[tuple[str, str, int], Scores], config: AccuracyConfig, path: Path) -> None:
    """Dice against the number of labels, a panel a cohort, a line a method; dashed: supervised on all."""
    from matplotlib.figure import Figure

    cohorts = list(dict.fromkeys(cohort for cohort, _, _ in scores))
    figure = Figure(figsize=(4.6 * len(cohorts) + 1.4, 3.6), layout="constrained")
    for i, cohort in enumerate(cohorts):
        axes = figure.add_subplot(1, len(cohorts), i + 1)
        for k, method in enumerate(config.methods):
            dice = [scores[cohort, method, n].last for n in config.labeled]
            strong = method in DRAWN
            axes.errorbar(
                [n * (1 + 0.01 * (k - len(config.methods) / 2)) for n in config.labeled],
                [d.mean() for d in dice],
                [d.mean(1).std(ddof=1) if len(d) > 1 else 0.0 for d in dice],
                label=method,
                color="black" if method == "supervised" else f"C{k}",
                linewidth=2 if strong else 1,
                marker="o",
                markersize=3,
            )
        axes.axhline(scores[cohort, "supervised", ALL_LABELS].last.mean(), color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.labeled, map(str, config.labeled))
        axes.set(
            title=cohort, xlabel=f"labelled volumes of {ALL_LABELS}", ylabel="Dice, mean and spread over the seeds"
        )
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(AccuracyConfig, study, argv)


if __name__ == "__main__":
    sys.exit(main())
