"""How well a run knows which of its segmentations fail: scores without references against Dice, on real cohorts."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from scipy import stats
from tqdm import tqdm

from benchmarks.accuracy.cohorts import locate
from benchmarks.accuracy.runs import Trial, fingerprint, run, settings_of
from benchmarks.accuracy.study import AccuracyConfig, cohort_settings
from benchmarks.accuracy.tables import BASELINE, DEFAULT
from benchmarks.report import RESULTS, markdown, provenance, write_page
from sslfast.atomic_io import whole_file
from sslfast.calibration import FEWEST, LEVEL, SCORE, Estimator
from sslfast.cli import run_command
from sslfast.data.folder import Case, open_dataset
from sslfast.data.nifti import on_grid_of, read_channels, read_label
from sslfast.metrics import dice
from sslfast.quality import SCORES, mean_of
from sslfast.segmenter import load

ORDERS = (*SCORES, "mean rank")
RESAMPLES = 1000
NOTE = f"""\
Rank correlation (Spearman) of each score with the mean Dice of a case, and the area under the risk-coverage curve: the
mean of 1 - Dice over the cases that a score trusts most, averaged over all numbers of cases. Least possible: ordered by
Dice itself; by chance: the mean of 1 - Dice. `mean rank` orders by the mean of the three ranks. Means over the seeds;
in brackets the lowest and the highest.

The estimate of Dice is the line that a run fits to its validation cases, by the {SCORE}; its interval should hold
{LEVEL:.0%}. The control is the mean Dice of the validation cases, the same for each case.

The last table is over all runs: the area, the error of an estimate by each score, and by how much those of the {SCORE}
are larger, with 95% intervals from {RESAMPLES} resamples of the cases and seeds; three seeds understate their part."""


@dataclass(frozen=True)
class QualityConfig:
    """Train the default and the baseline on real cohorts, and see whether their scores find the failures.

        python -m benchmarks --suite quality --real DIR

    Runs that are in the output folder, such as those of the accuracy study, are not trained again. A run whose scores
    are in the CSV is not needed any more.
    """

    real: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder that holds hippocampus/ and la_1.25mm/ (docs/datasets.md says how to get them)."""
    cohorts: tuple[str, ...] = ("la", "hippocampus")
    """Cohorts of the study."""
    labeled: tuple[int, ...] = (2, 8)
    """Numbers of labelled training cases."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each method for each seed."""
    steps: int | None = None
    """Steps of a run instead of the study's."""
    jobs: int = 2
    """Runs at once, each with its share of the processor's cores."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy")
    """Folder for the runs."""
    name: str = "quality"
    """Name of the page and the CSV in benchmarks/results/, or a path without suffix."""


class Scored(NamedTuple):
    """A case that a run has segmented."""

    cohort: str
    method: str
    labeled: int
    seed: int
    settings: str  # their `fingerprint`
    part: str  # validation or test
    case: str
    dice: float  # mean over the classes that the case has
    agreement: float  # means over the classes
    entropy: float
    mutual_information: float


def quality(config: QualityConfig) -> None:
    """Trains what is missing, scores it, and writes the CSV and the page."""
    path = RESULTS / f"{config.name}.csv"
    cohorts = cohort_settings(AccuracyConfig(real=config.real, cohorts=config.cohorts, steps=config.steps))
    trials = {
        trial: settings_of(trial, cohorts)
        for cohort in cohorts
        for labeled in config.labeled
        for method in (BASELINE, DEFAULT)
        for seed in config.seeds
        for trial in [Trial(cohort, method, labeled, seed)]
    }
    wanted = {trial: fingerprint(trial.method, settings) for trial, settings in trials.items()}
    rows = [row for row in read(path) if wanted.get(Trial(*row[:4])) == row.settings]
    known = {Trial(*row[:4]) for row in rows}
    output = config.output / "small"
    data = {str(settings["data"]): locate(str(settings["data"]), config.real) for settings in trials.values()}
    for trial in run({t: s for t, s in trials.items() if t not in known}, output, config.jobs, data):
        folder = trial.folder(output, wanted[trial])
        rows += score(trial, wanted[trial], folder, Path(data[str(trials[trial]["data"])]))
        write(rows, path)
    print(write_page(config.name, page(rows)))
    draw(rows, path.with_suffix(".png"))


def score(trial: Trial, settings: str, folder: Path, data: Path) -> list[Scored]:
    """The validation and test cases of a run's cohort."""
    segmenter, dataset = load(folder), open_dataset(data)
    rows = []

    def add(part: str, cases: Iterable[Case]) -> None:
        for case in tqdm(cases, desc=f"{trial.cohort}, {trial.method}, {part}", unit="case", leave=False):
            assert case.label is not None
            image = read_channels(case.images)
            result = segmenter.segment([*case.images])
            reference = on_grid_of(image.channels[0], read_label(case.label), case.image, case.label).array
            true = mean_of([dice(result.labels == value, reference == value) for value in [*segmenter.classes][1:]])
            scores = [mean_of([measured[name] for measured in result.quality.values()]) for name in SCORES]
            rows.append(Scored(*trial[:4], settings, part, case.name, true, *scores))

    add("validation", dataset.validation)
    add("test", dataset.test)
    return rows


def page(rows: Sequence[Scored]) -> list[str]:
    """The lines of the page: for each cohort and method, how the scores order the test cases, and the estimates."""
    order, with_estimates = [], []
    for kind in sorted({row[:3] for row in rows}):
        here = [row for row in rows if row[:3] == kind]
        named = [kind[0], str(kind[2]), f"`{kind[1]}`"]
        seeds = sorted({row.seed for row in here})
        tests = [[row for row in here if row.seed == seed and row.part == "test"] for seed in seeds]
        validations = [[row for row in here if row.seed == seed and row.part == "validation"] for seed in seeds]
        ordered = {name: [orders(test)[name] for test in tests] for name in orders(tests[0])}
        for name, of_seeds in ordered.items():
            correlations, areas = zip(*of_seeds, strict=True)
            order.append([*named, name, _over_seeds(correlations, 2), _over_seeds(areas, 4)])
        errors = [estimated(*parts) for parts in zip(validations, tests, strict=True) if len(parts[0]) >= FEWEST]
        if errors:
            cells = [_over_seeds(values, 3) for values in zip(*errors, strict=True)]
            with_estimates.append([*named, str(len(validations[0])), *cells])
    heads = ["cohort", "labels", "method"]
    first = markdown([*heads, "ordered by", "rank correlation", "area under the risk-coverage curve"], order)
    errors_of = ["mean error of the estimate", "of the control", "in the interval", "its width"]
    second = markdown([*heads, "validation cases", *errors_of], with_estimates)
    columns = ["area", f"that of the {SCORE} - area", "mean error of the estimate", f"that of the {SCORE} - error"]
    third = markdown(["ordered by", *columns], compared(rows))
    return [*first, "", *second, "", *third, "", *NOTE.splitlines(), "", f"{provenance()}."]


def compared(rows: Sequence[Scored]) -> list[list[str]]:
    """For each order its area, and for each score the error of the estimate, beside the agreement's, over all runs."""
    runs: dict[Trial, dict[str, list[Scored]]] = {}
    for row in sorted(rows):
        runs.setdefault(Trial(*row[:4]), {"validation": [], "test": []})[row.part].append(row)
    names = {trial.cohort: [row.case for row in parts["test"]] for trial, parts in runs.items()}
    assert all(names[trial.cohort] == [row.case for row in parts["test"]] for trial, parts in runs.items())
    seeds = sorted({trial.seed for trial in runs})
    per_case = []  # of each run: Dice, and by order the trust and the error of the estimate
    for parts in runs.values():
        validation, test = parts["validation"], parts["test"]
        true = true_dice(test)
        estimated_by = SCORES if len(validation) >= FEWEST else ()
        errors = {score: np.abs(estimates(validation, test, score)[:, 0] - true) for score in estimated_by}
        per_case.append((true, [(by, errors.get(name, true * np.nan)) for name, by in trusts(test).items()]))

    def over_runs(choose: Callable[[int], np.ndarray]) -> np.ndarray:
        """The means [orders, 2] of area and error over the cases and seeds that are chosen of so many."""
        cases = {cohort: choose(len(of_cohort)) for cohort, of_cohort in names.items()}
        times = np.bincount(choose(len(seeds)), minlength=len(seeds))
        of_runs = [
            [(area(by[chosen], true[chosen]), mean_of(error[chosen])) for by, error in orders]
            for trial, (true, orders) in zip(runs, per_case, strict=True)
            for chosen in [cases[trial.cohort]]
        ]
        return np.average(of_runs, axis=0, weights=[times[seeds.index(trial.seed)] for trial in runs])

    random, on_all = np.random.default_rng(0), over_runs(np.arange)
    resampled = np.array([over_runs(lambda count: random.integers(count, size=count)) for _ in range(RESAMPLES)])
    default = ORDERS.index(SCORE)
    low, high = np.percentile(resampled[:, default, None] - resampled, [2.5, 97.5], axis=0)
    difference = on_all[default] - on_all
    lines = []
    for i, name in enumerate(ORDERS):
        cells = []
        for j in range(2):
            interval = f"{difference[i, j]:+.4f} [{low[i, j]:+.4f}, {high[i, j]:+.4f}]" if i != default else ""
            cells += ["", ""] if np.isnan(on_all[i, j]) else [f"{on_all[i, j]:.4f}", interval]
        lines.append([name, *cells])
    return lines


def draw(rows: Sequence[Scored], path: Path) -> None:
    """Dice of each test case against agreement, a panel a cohort and number of labels, a colour a seed."""
    from matplotlib.figure import Figure

    kinds = sorted({(row.cohort, row.labeled) for row in rows})
    figure = Figure(figsize=(3.4 * len(kinds), 3.3), layout="constrained")
    for i, (cohort, labeled) in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), i + 1)
        here = [row for row in rows if row[:3] == (cohort, DEFAULT, labeled) and row.part == "test"]
        for seed in sorted({row.seed for row in here}):
            points = [(row.agreement, row.dice) for row in here if row.seed == seed]
            axes.plot(*zip(*points, strict=True), ".", label=f"seed {seed}", markersize=5, alpha=0.7)
        axes.set(title=f"{cohort}, {labeled} labels", xlabel="agreement of the networks", ylabel="Dice")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")


def orders(test: Sequence[Scored]) -> dict[str, tuple[float, float]]:
    """Rank correlation with Dice and area under the risk-coverage curve, by what orders the cases."""
    true = true_dice(test)
    found = {
        name: (float(stats.spearmanr(trust, true).statistic), area(trust, true)) for name, trust in trusts(test).items()
    }
    return {**found, "Dice itself: least possible": (1.0, area(true, true)), "chance": (0.0, float(1 - true.mean()))}


def true_dice(rows: Sequence[Scored]) -> np.ndarray:
    """Dice of each case."""
    return np.array([row.dice for row in rows])


def trusts(rows: Sequence[Scored]) -> dict[str, np.ndarray]:
    """How far each score trusts each case: the higher, the more; least where no class was found."""
    found = {name: np.nan_to_num(trust(rows, name), nan=-np.inf) for name in SCORES}
    return {**found, ORDERS[-1]: np.mean([stats.rankdata(values) for values in found.values()], 0)}


def trust(rows: Sequence[Scored], score: str) -> np.ndarray:
    """The score of each case, with the sign that makes it rise with Dice."""
    return np.array([getattr(row, score) for row in rows]) * (1 if score == "agreement" else -1)


def area(trust: np.ndarray, true: np.ndarray) -> float:
    """Area under the risk-coverage curve, the risk being 1 - Dice; cases of the highest trust come first."""
    risk = 1 - true[np.argsort(-trust, kind="stable")]
    return float((risk.cumsum() / np.arange(1, len(risk) + 1)).mean())


def estimated(validation: Sequence[Scored], test: Sequence[Scored]) -> tuple[float, float, float, float]:
    """Mean absolute error of the estimate and of the control, share in the interval, and the interval's mean width."""
    by_case = estimates(validation, test, SCORE)
    known = ~np.isnan(by_case[:, 0])
    (dice_, low, high), true = by_case[known].T, true_dice(test)[known]
    control = np.abs(true_dice(validation).mean() - true).mean()
    inside = ((low <= true) & (true <= high)).mean()
    return float(np.abs(dice_ - true).mean()), float(control), float(inside), float((high - low).mean())


def estimates(validation: Sequence[Scored], test: Sequence[Scored], score: str) -> np.ndarray:
    """`Estimate` [T, 3] of each test case, by a score; nan where no class was found."""
    known = [row for row in validation if not np.isnan(getattr(row, score))]
    estimator = Estimator.fit(trust(known, score), true_dice(known))
    return np.array([estimator(float(value)) for value in trust(test, score)])


def _over_seeds(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def read(path: Path) -> list[Scored]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    kinds: Mapping[str, type] = {"labeled": int, "seed": int, **dict.fromkeys(("dice", *SCORES), float)}
    with open(path, newline="") as file:
        rows = [*csv.DictReader(file)]
    return [Scored(**{name: kinds.get(name, str)(text) for name, text in row.items()}) for row in rows]


def write(rows: Sequence[Scored], path: Path) -> None:
    """A row a case, in the order of the runs."""
    with whole_file(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Scored._fields)
        writer.writerows(
            [f"{value:.5f}" if isinstance(value, float) else value for value in row] for row in sorted(rows)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The suite; returns the exit status."""
    return run_command(QualityConfig, quality, argv)


if __name__ == "__main__":
    sys.exit(main())
