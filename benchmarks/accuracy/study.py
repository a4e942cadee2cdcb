"""Held-out Dice of every method against the number of labels, on real and synthetic cohorts; what the settings do."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.accuracy.cohorts import COHORTS, COMMON, REAL, STRESS, SYNTHETIC, locate
from benchmarks.accuracy.runs import VARIANTS, Trial, fingerprint, read_rows, read_run, run, settings_of, write_rows
from benchmarks.accuracy.tables import (
    BASELINE,
    DEFAULT,
    HIGHLIGHTED,
    ablation_table,
    collect,
    draw_curves,
    methods_table,
)
from benchmarks.report import RESULTS, write_page
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command
from sslfast.errors import UserError
from sslfast.options import Augment

FULL = {"width": 16, "steps": 6000}
METHODS = (BASELINE, DEFAULT, "as-released", "cps", "mean-teacher", "mcf", "dual-networks", "paper")


@dataclass(frozen=True)
class AccuracyConfig:
    """Train the methods with the same few labels, several seeds each, and compare their Dice on the test cases.

        python -m benchmarks --suite accuracy --real DIR      every method on every cohort: some twenty hours
        python -m benchmarks --suite accuracy --stress        where unlabelled volumes cannot help: two hours
        python -m benchmarks --suite accuracy --ablation      one setting changed at a time, on tuning cases

    A run whose results are in the output folder is not repeated, so a stopped study continues where it was; with
    --extend on another machine too. Every number is of the last step unless it says otherwise. Intervals are 95 %, from
    resampled seeds and cases; p is of Wilcoxon's signed-rank test on the test cases' Dice, each the mean over the
    seeds. All methods have the same augmentation.
    """

    real: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The folder that holds the real cohorts, hippocampus/ and la_1.25mm/ (docs/datasets.md says how to get them).
    None: only the synthetic cohorts."""
    cohorts: tuple[str, ...] = ()
    """Cohorts of the study; none: all, without the real ones if there is no --real."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare; paper and "no gate" are ssl-contrastive with one change."""
    labeled: tuple[int, ...] = ()
    """Only these numbers of labelled volumes; none: those of each cohort. `supervised` is also trained on all."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """One run of the default and of the baseline for each seed."""
    few_seeds: int = 3
    """The other methods have the first of these seeds."""
    stress: bool = False
    """The stress set: fourteen structures, few steps, and unlabelled volumes that differ from the labelled ones. The
    baseline, the default, and the default without its gate."""
    ablation: bool = False
    """Compare settings instead of methods: the defaults of ssl-contrastive with one change each, on tuning cases, so
    that test cases choose no setting."""
    variants: tuple[str, ...] = ()
    """Only these changes of the ablation, such as "no views"; none: all."""
    scale: Literal["small", "full"] = "small"
    """small: networks for two cores. full: networks of the published width, 6000 steps, for a GPU."""
    steps: int | None = None
    """Steps of a run instead of the study's."""
    augment: Augment | None = None
    """Augmentation instead of the study's, no-flip. Affine skips the unlabelled volumes where a method shows views of
    them."""
    jobs: int = 2
    """Runs at once, each with its share of the processor's cores."""
    minutes: float | None = None
    """Stop after this time. The CSV keeps each finished run; --extend continues, on another machine too."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy")
    """Folder for the runs."""
    name: str | None = None
    """Name of the table and the CSV in benchmarks/results/, or a path without suffix. None: accuracy, with -stress,
    -ablation and -full where they apply."""
    extend: bool = False
    """Do not repeat runs that the CSV has with the same settings."""
    tables_only: bool = False
    """Train nothing: make the tables again from the runs in the CSV, whatever their settings."""


def study(config: AccuracyConfig) -> None:
    """Trains what is missing; writes the table, the CSV, the curves and the first seed's overlays."""
    kinds = {"-stress": config.stress, "-ablation": config.ablation, "-full": config.scale == "full"}
    name = config.name or "accuracy" + "".join(kind for kind, applies in kinds.items() if applies)
    path = RESULTS / f"{name}.csv"
    cohorts = cohort_settings(config)
    trials = ablation_trials(config, cohorts) if config.ablation else methods_trials(config, cohorts)
    known = read_rows(path)
    if config.tables_only:
        if not trials or not known.keys() >= set(trials):
            raise UserError(f"{path} lacks runs of this table; leave out --tables-only to train them")
    else:
        settings_by_trial = {trial: settings_of(trial, cohorts) for trial in trials}
        wanted = {trial: fingerprint(trial.method, settings) for trial, settings in settings_by_trial.items()}
        missing = [t for t in trials if not (config.extend and t in known and known[t].settings == wanted[t])]
        output = config.output / config.scale
        data = {str(cohorts[t.cohort]["data"]) for t in missing}
        located = {one: locate(one, config.real) for one in sorted(data)}
        folders = {trial: trial.folder(output, wanted[trial]) for trial in trials}
        left = dict.fromkeys(missing)
        seconds = None if config.minutes is None else 60 * config.minutes
        for trial in run({t: settings_by_trial[t] for t in missing}, output, config.jobs, located, seconds):
            known[trial] = read_run(folders[trial], wanted[trial])
            write_rows(known, path)
            del left[trial]
        if left:
            raise UserError(f"{len(left)} of {len(trials)} runs are left after --minutes; continue with --extend")
        known = read_rows(path)  # as rounded there, so that the tables can be made again from the CSV
        keep_overlays(folders, config, cohorts, name)

    results = {trial: known[trial] for trial in trials}
    scores = collect(results)
    lines = []
    for cohort, settings in cohorts.items():
        if config.ablation:
            variants = {m: {t.variant for t in trials if t.method == m} - {""} for m in {t.method for t in trials}}
            table = ablation_table(scores[cohort], variants)
        else:
            table = methods_table(scores[cohort], labels_of(config, cohort), COHORTS[cohort].training)
        lines += [f"### `{cohort}`", "", *table, "", f"Settings: `{json.dumps(settings)}`", ""]
    made = "; ".join(sorted({result.made for result in results.values()}))
    lines.append(
        f"{len(results)} runs, each with its share of the processor's cores. Minutes are of training alone, with the "
        f"fastest seed; a dash where the log is gone. {made}."
    )
    print(write_page(name, lines))
    if not (config.ablation or config.stress):
        draw_curves(scores, {cohort: COHORTS[cohort].training for cohort in cohorts}, RESULTS / f"{name}.png")


def cohort_settings(config: AccuracyConfig) -> dict[str, dict[str, object]]:
    """The training settings by cohort; an ablation's are those of its tuning cases.

    Raises:
        UserError: no such cohort.
    """
    available = STRESS if config.stress else {**(REAL if config.real else {}), **SYNTHETIC}
    unknown = [name for name in config.cohorts if name not in COHORTS]
    if unknown:
        raise UserError(f"--cohorts {unknown[0]}: choose from {', '.join(COHORTS)}")
    chosen = {}
    for name in config.cohorts or available:
        settings = COMMON | COHORTS[name].settings | (FULL if config.scale == "full" else {})
        settings |= {one: value for one in ("steps", "augment") if (value := getattr(config, one)) is not None}
        suffix = "-tuning" if config.ablation and name not in STRESS else ""
        chosen[name] = {"data": COHORTS[name].data + suffix, **settings}
    return chosen


def labels_of(config: AccuracyConfig, cohort: str) -> tuple[int, ...]:
    """The numbers of labelled volumes with which a cohort is trained."""
    return config.labeled or COHORTS[cohort].labeled


def methods_trials(config: AccuracyConfig, cohorts: Mapping[str, object]) -> list[Trial]:
    """Every method with every number of labels, and the baseline with all; the default and the baseline come first."""
    trials = []
    methods = (BASELINE, DEFAULT, "no gate") if config.stress else config.methods
    for cohort in cohorts:
        for method in sorted(methods, key=lambda method: method not in (BASELINE, DEFAULT)):
            seeds = config.seeds if method in (BASELINE, DEFAULT) else config.seeds[: config.few_seeds]
            counts = labels_of(config, cohort)
            if method == BASELINE and not config.stress:
                counts = tuple(dict.fromkeys((*counts, COHORTS[cohort].training)))
            name, variant = (DEFAULT, method) if method in VARIANTS[DEFAULT] else (method, "")
            trials += [Trial(cohort, name, count, seed, variant) for count in counts for seed in seeds]
    return trials


def ablation_trials(config: AccuracyConfig, cohorts: Mapping[str, object]) -> list[Trial]:
    """The chosen variants and, for comparison, their methods as they are."""
    chosen = {m: [v for v in of if not config.variants or v in config.variants] for m, of in VARIANTS.items()}
    return [
        Trial(cohort, method, labels_of(config, cohort)[-1], seed, variant)
        for method, variants in chosen.items()
        if variants
        for variant in ("", *variants)
        for cohort in cohorts
        for seed in config.seeds[: config.few_seeds]
    ]


def keep_overlays(
    folders: Mapping[Trial, Path], config: AccuracyConfig, cohorts: Mapping[str, object], name: str
) -> None:
    """Copies the first seed's overlays of synthetic cohorts beside the table, with 256 colours: a third of the size.

    Pictures of patients are not ours to distribute.
    """
    from PIL import Image

    for cohort in (c for c in cohorts if c in SYNTHETIC and not config.ablation):
        for method in HIGHLIGHTED:
            folder = folders.get(Trial(cohort, method, labels_of(config, cohort)[-1], config.seeds[0]))
            if folder and (folder / "overlays.png").exists():  # else another machine trained it
                picture = Image.open(folder / "overlays.png").convert("RGB")
                with whole_file(RESULTS / f"{name}-{cohort}-{method}.png") as part:
                    picture.quantize(256, Image.Quantize.FASTOCTREE).save(part, "PNG", optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(AccuracyConfig, study, argv)


if __name__ == "__main__":
    sys.exit(main())
