"""The runs of the study: their settings, their training, and the CSV that keeps their Dice."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import yaml

from benchmarks.accuracy.stress import describe
from benchmarks.report import provenance
from sslfast.atomic_io import make_folder, whole_file
from sslfast.data.demo.cohorts import COHORTS
from sslfast.errors import UserError
from sslfast.losses import PRESETS
from sslfast.methods import find_method
from sslfast.training.config import CONFIG

PROVENANCE = "provenance.txt"  # in a run's folder: what it was made of and with
SECONDS = "seconds.txt"  # in the folder of a finished run: its `training_seconds`
VARIANTS: dict[str, dict[str, dict[str, object]]] = {  # of a method: what changes
    "ssl-contrastive": {
        "paper": {"preset": "paper"},
        "no gate": {"gate": [0.0, 0.0]},
        "no class weights": {"class_balance": "off"},
        "no views": {"views": "none"},
        "contrast": {"contrast_weight": 0.1},
        "no Dice with the teacher": {"pseudo_dice_weight": 0.0},
        "no pseudo-labels, no cosine": {"pseudo_weight": 0.0},
        "percentile 80": {"percentile": [80, 80]},
        "percentile 80 to 100": {"percentile": [80, 100]},
        "as in the paper, with views": {"preset": "paper", "views": "random"},
        "pseudo-labels, cosine x 0.3": {"pseudo_weight": 0.3},
        "all three x 0.3": {"pseudo_weight": 0.3, "pseudo_dice_weight": 0.3},
        "float32": {"precision": "fp32"},  # its default is bfloat16 where the processor multiplies it fast
    },
    "u2pl": {"negatives of the step alone": {"memory": 0}},
}


class Trial(NamedTuple):
    """What identifies a run."""

    cohort: str
    method: str
    labeled: int
    seed: int
    variant: str = ""

    def folder(self, output: Path, settings: str) -> Path:
        """The run's folder, with the settings of that `fingerprint`."""
        variant = "-" + self.variant.replace(" ", "_") if self.variant else ""
        return output / self.cohort / f"{self.method}{variant}-{self.labeled}-{self.seed}-{settings}"


class Result(NamedTuple):
    """Dice of one run, the mean over the classes, and what the run was made with."""

    settings: str  # their `fingerprint`
    made: str  # `provenance`
    best: float  # of the validation-best checkpoint, the mean over the test cases
    last: np.ndarray  # of the last step, by test case in the order of their names
    seconds: float  # wall time of the training


def settings_of(trial: Trial, settings: dict[str, dict[str, object]]) -> dict[str, object]:
    """What a trial trains with: its cohort's settings, by cohort in `settings`, and what its variant changes."""
    changed = VARIANTS[trial.method][trial.variant] if trial.variant else {}
    return {**settings[trial.cohort], **changed}


def fingerprint(method: str, settings: dict[str, object]) -> str:
    """Eight hexadecimal digits that change with the settings, the methods' defaults and how a demo cohort is made.

    They do not change with the code: delete runs that it would change.
    """
    name = str(settings["data"])
    cohort = asdict(COHORTS[name].parameters) if name in COHORTS else None
    if name.startswith("stress-"):
        cohort = describe(name.removeprefix("stress-"))
    presets = {preset: asdict(options) for preset, options in PRESETS.items()}
    said = [settings, asdict(find_method(method).Options()), presets, cohort]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def run(
    trials: Mapping[Trial, dict[str, object]],
    output: Path,
    jobs: int,
    data: Mapping[str, str],
    seconds: float | None = None,
) -> Iterator[Trial]:
    """Trains what has no result yet, with its settings, `jobs` at once; yields each trial when it has one.

    Args:
        data: where the volumes of a cohort are, by the name that the settings have for them.
        seconds: time after which the rest is stopped; None: there is no limit.

    Raises:
        UserError: a run failed; its output is in the file that the message names.
    """
    import torch
    from tqdm import tqdm

    folders = {trial: trial.folder(output, fingerprint(trial.method, settings)) for trial, settings in trials.items()}
    missing = [trial for trial in trials if not (folders[trial] / SECONDS).exists()]
    yield from (trial for trial in trials if trial not in missing)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    context = get_context("forkserver")
    context.set_forkserver_preload(["sslfast.training.run"])  # no worker imports it again
    workers = ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,))
    with workers as pool, tqdm(total=len(missing), desc="study", unit="run") as progress:
        settings = {trial: {**trials[trial], "data": data[str(trials[trial]["data"])]} for trial in missing}
        runs = {pool.submit(train, trial, settings[trial], folders[trial]): trial for trial in missing}
        try:
            for done in as_completed(runs, seconds):
                done.result()
                progress.update()
                yield runs[done]
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.kill()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train(trial: Trial, settings: dict[str, object], folder: Path) -> None:
    """One run, in this process; what it prints goes to output.txt in its folder.

    Raises:
        UserError: the run failed.
    """
    from sslfast import train as trainer

    make_folder(folder)
    (folder / PROVENANCE).write_text(provenance())
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--config", str(folder / "settings.yaml"), "--output", str(folder), "--method", trial.method]
    flags += ["--labeled", str(trial.labeled), "--seed", str(trial.seed), "--no-plan"]
    if (folder / CONFIG).exists():
        flags.append("--resume")
    with open(folder / "output.txt", "w") as output, redirect_stdout(output), redirect_stderr(output):
        status = trainer.main(flags)
    if status != 0:
        raise UserError(f"a run failed; see {folder / 'output.txt'}")
    (folder / SECONDS).write_text(f"{training_seconds(folder):.0f}")


def training_seconds(folder: Path) -> float:
    """Wall time of a run's training: its steps times the median of their times, whatever paused or resumed it."""
    with open(folder / "log.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    return (int(rows[-1]["step"]) + 1) * median(float(row["seconds"]) for row in rows if row["seconds"])


def case_dice(folder: Path) -> dict[str, float]:
    """Dice of each case in a folder of test results: the mean over the classes that it or the prediction holds."""
    by_case: dict[str, list[float]] = {}
    for row in json.loads((folder / "metrics.json").read_text())["rows"]:
        by_case.setdefault(row["case"], []).append(row["dice"])
    return {case: float(np.nanmean(values)) for case, values in by_case.items()}


def read_run(folder: Path, settings: str) -> Result:
    """The result of a finished run."""
    last, best = (case_dice(folder / test) for test in ("test", "test_best"))
    made = (folder / PROVENANCE).read_text()
    mean_best = float(np.mean([*best.values()]))
    seconds = float((folder / SECONDS).read_text())
    return Result(settings, made, mean_best, np.array([last[case] for case in sorted(last)]), seconds)


def read_rows(path: Path) -> dict[Trial, Result]:
    """The runs in a CSV; none where there is no file."""
    results: dict[Trial, Result] = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                method: str = row["method"]
                trial = Trial(row["cohort"], method, int(row["labeled"]), int(row["seed"]), row["variant"])
                last = [float(dice) for name, dice in row.items() if name.startswith("case ") and dice]
                best, seconds = float(row["best"]), float(row["seconds"])
                results[trial] = Result(row["settings"], row["made"], best, np.array(last), seconds)
    return results


def write_rows(results: dict[Trial, Result], path: Path) -> None:
    """A row a run, sorted; the Dice of its test cases are its last cells, in the order of the cases' names."""
    cases = max(len(result.last) for result in results.values())
    with whole_file(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = "settings", "made", "seconds", "best"
        writer.writerow([*Trial._fields, *heads, *(f"case {i + 1}" for i in range(cases))])
        for trial, result in sorted(results.items(), key=lambda item: item[0]):
            dice = [f"{value:.5f}" for value in (result.best, *result.last)]
            writer.writerow([*trial, result.settings, result.made, f"{result.seconds:.0f}", *dice])
