"""Held-out Dice of every method against the number of labels, on the demo cohorts; and what the settings do."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from benchmarks.accuracy.runs import VARIANTS, Trial, fingerprint, read_rows, read_run, run, settings_of, write_rows
from benchmarks.accuracy.tables import (
    ALL_LABELS,
    HIGHLIGHTED,
    ablation_table,
    collect,
    draw_curves,
    methods_table,
    middle,
)
from benchmarks.report import RESULTS, write_page
from sslfast.atomic_io import whole_file
from sslfast.cli import run_command
from sslfast.errors import UserError
from sslfast.methods import METHODS
from sslfast.options import Augment

BENCHMARKS = Path(__file__).parent.parent
SMALL = {"width": 8, "steps": 400, "patch": [24, 24, 24], "learning_rate": 0.01, "validate_every": 200}
GRID = {"demo": 6, "demo-brain": 4}  # mm, with SMALL
FULL = {"width": 16, "depth": 5, "steps": 6000, "patch": [64, 64, 64], "spacing": 2}  # a GPU's work
DRAWN = "demo-brain"  # the cohort whose overlays are kept


@dataclass(frozen=True)
class AccuracyConfig:
    """Train the methods with the same few labels, several seeds each, and compare their Dice on the test cases.

        python -m benchmarks --suite accuracy                 every method, 2, 4 and 8 labels of 40, both cohorts
        python -m benchmarks --suite accuracy --ablation      one setting changed at a time, 4 labels, tuning cases
        python -m benchmarks --suite accuracy --scale full    larger networks, finer grid, 6000 steps: for a GPU

    A run whose results are in the output folder is not repeated, so a stopped study continues where it was; with
    --extend on another machine too. Every number is of the last step unless it says otherwise. Intervals are 95 %, from
    resampled seeds and cases; p is of Wilcoxon's signed-rank test on the test cases' Dice, each the mean over the
    seeds.
    """

    settings: tuple[Path, ...] = (BENCHMARKS / "demo.yaml", BENCHMARKS / "demo-brain.yaml")
    """Training settings as for `python -m sslfast.train --config`, a file for each cohort."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare."""
    labeled: tuple[int, ...] = (2, 4, 8)
    """Numbers of labelled volumes; `supervised` is also trained on all of them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each method for each seed."""
    ablation: bool = False
    """Compare settings instead of methods, with the middle one of --labeled: the defaults of ssl-contrastive with one
    change each, and u2pl's memory. On the tuning cases (demo-tuning, demo-brain-tuning), so that test cases choose no
    setting."""
    variants: tuple[str, ...] = ()
    """Only these changes of the ablation, such as "no views" or float32; none: all."""
    scale: Literal["small", "as-is", "full"] = "small"
    """small: networks and grid for two cores. as-is: those of the settings. full: those of a real run, for a GPU."""
    steps: int | None = None
    """Steps of a run instead of the study's."""
    augment: Augment | None = None
    """Augmentation instead of the study's, which is none. The same for all methods, but affine skips the unlabelled
    volumes where a method shows views of them."""
    jobs: int = 2
    """Runs at once, each with its share of the processor's cores."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy")
    """Folder for the runs."""
    name: str | None = None
    """Name of the table and the CSV in benchmarks/results/, or a path without suffix. The ablation's table is
    NAME-ablation, its runs are in the same CSV. None: accuracy, or accuracy-SCALE for another scale."""
    extend: bool = False
    """Do not repeat runs that the CSV has with the same settings: for more labels, methods or seeds than it has."""
    tables_only: bool = False
    """Train nothing: make the tables again from the runs in the CSV, whatever their settings."""


def study(config: AccuracyConfig) -> None:
    """Trains what is missing; writes the table, the CSV, the curves and the first seed's overlays."""
    name = config.name or ("accuracy" if config.scale == "small" else f"accuracy-{config.scale}")
    path = RESULTS / f"{name}.csv"
    cohorts = cohort_settings(config)
    trials = ablation_trials(config, cohorts) if config.ablation else methods_trials(config, cohorts)
    known = read_rows(path)
    if config.tables_only:
        if config.ablation:  # options that were removed since too
            trials = [trial for trial in known if trial.cohort in cohorts and trial.seed in config.seeds]
        if not trials or not known.keys() >= set(trials):
            raise UserError(f"{path} lacks runs of this table; leave out --tables-only to train them")
    else:
        settings_by_trial = {trial: settings_of(trial, cohorts) for trial in trials}
        wanted = {trial: fingerprint(trial.method, settings) for trial, settings in settings_by_trial.items()}
        missing = [t for t in trials if not (config.extend and t in known and known[t].settings == wanted[t])]
        output = config.output / config.scale
        run({trial: settings_by_trial[trial] for trial in missing}, output, config.jobs)
        folders = {trial: trial.folder(output, wanted[trial]) for trial in trials}
        known |= {trial: read_run(folders[trial], wanted[trial]) for trial in missing}
        write_rows(known, path)
        known = read_rows(path)  # as rounded there, so that the tables can be made again from the CSV
        if not (config.ablation or config.name):
            keep_overlays(folders, config, name)

    results = {trial: known[trial] for trial in trials}
    scores = collect(results)
    lines = []
    for cohort, settings in cohorts.items():
        rows = {key[1:]: value for key, value in scores.items() if key[0] == cohort}
        if config.ablation:
            table = ablation_table(
                rows, {t.method: {v.variant for v in trials if v.method == t.method} for t in trials}
            )
        else:
            table = methods_table(rows, config.methods, config.labeled)
        lines += [f"### `{cohort}`", "", *table, "", f"Settings: `{json.dumps(settings)}`", ""]
    made = "; ".join(sorted({result.made for result in results.values()}))
    lines.append(f"Seeds {' '.join(map(str, config.seeds))}. {made}.")
    print(write_page(f"{name}{'-ablation' if config.ablation else ''}", lines))
    if not config.ablation and len(config.labeled) > 1:
        draw_curves(scores, config.methods, config.labeled, RESULTS / f"{name}.png")


def cohort_settings(config: AccuracyConfig) -> dict[str, dict[str, object]]:
    """The training settings by cohort; an ablation's are those of its tuning cases."""
    cohorts = {}
    for path in config.settings:
        settings = yaml.safe_load(path.read_text())
        if config.scale == "small":
            settings |= {**SMALL, "spacing": GRID.get(settings["data"], settings.get("spacing"))}
        elif config.scale == "full":
            settings |= FULL
        settings |= {name: value for name in ("steps", "augment") if (value := getattr(config, name)) is not None}
        if config.ablation:
            settings["data"] += "-tuning"
        cohorts[settings["data"]] = settings
    return cohorts


def methods_trials(config: AccuracyConfig, cohorts: Mapping[str, object]) -> list[Trial]:
    """Every method with every number of labels, and `supervised` with all."""
    pairs = [(method, labeled) for labeled in config.labeled for method in config.methods]
    pairs.append(("supervised", ALL_LABELS))
    return [Trial(cohort, *pair, seed) for cohort in cohorts for pair in pairs for seed in config.seeds]


def ablation_trials(config: AccuracyConfig, cohorts: Mapping[str, object]) -> list[Trial]:
    """The chosen variants and, for comparison, their methods as they are."""
    chosen = {m: [v for v in of if not config.variants or v in config.variants] for m, of in VARIANTS.items()}
    return [
        Trial(cohort, method, middle(config.labeled), seed, variant)
        for method, variants in chosen.items()
        if variants
        for variant in ("", *variants)
        for cohort in cohorts
        for seed in config.seeds
    ]


def keep_overlays(folders: Mapping[Trial, Path], config: AccuracyConfig, name: str) -> None:
    """Copies the first seed's overlays beside the table, with 256 colours: a third of the size."""
    from PIL import Image

    for method in HIGHLIGHTED:
        folder = folders.get(Trial(DRAWN, method, middle(config.labeled), config.seeds[0]))
        if folder and (folder / "overlays.png").exists():  # else another machine trained it
            picture = Image.open(folder / "overlays.png").convert("RGB")
            with whole_file(RESULTS / f"{name}-{DRAWN}-{method}.png") as part:
                picture.quantize(256, Image.Quantize.FASTOCTREE).save(part, "PNG", optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(AccuracyConfig, study, argv)


if __name__ == "__main__":
    sys.exit(main())
