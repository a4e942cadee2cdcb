"""The tables and the curves of the study: means, 95 % intervals, shares of the gap, Wilcoxon's test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.accuracy.runs import Result, Trial
from benchmarks.report import markdown
from sslfast.atomic_io import whole_file

ALL_LABELS = 40
HIGHLIGHTED: tuple[str, ...] = ("supervised", "as-released", "ssl-contrastive")


def middle(labeled: Sequence[int]) -> int:
    """The number of labels with which methods and settings are compared."""
    return labeled[len(labeled) // 2]


class Scores(NamedTuple):
    """Dice of the same trial with several seeds."""

    last: np.ndarray  # [seeds, test cases], of the last step
    best: np.ndarray  # [seeds], of the validation-best checkpoint, the mean over the test cases


def collect(results: Mapping[Trial, Result]) -> dict[tuple[str, str, int], Scores]:
    """Scores by (cohort, variant or method, labels)."""
    runs: dict[tuple[str, str, int], list[Result]] = {}
    for trial, result in results.items():
        runs.setdefault((trial.cohort, trial.variant or trial.method, trial.labeled), []).append(result)
    return {key: Scores(np.stack([r.last for r in of]), np.array([r.best for r in of])) for key, of in runs.items()}


def interval(dice: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the mean of Dice [seeds, cases]; both are resampled."""
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
    """Dice for each number of labels; for the middle one also the gain, the share of the gap to all labels and p."""
    chosen = middle(labeled)
    columns = [*(f"{n} labels" for n in labeled), f"{chosen} labels, validation-best", f"gain over supervised-{chosen}"]
    columns += ["share of the gap", "p against supervised", "p against as-released"]
    lines: list[list[str]] = []
    everything = rows["supervised", ALL_LABELS]
    for method in methods:
        scores = rows[method, chosen]
        cells = [with_interval(rows[method, n].last) for n in labeled] + [f"{scores.best.mean():.3f}"]
        if method != "supervised" and "supervised" in methods:
            few = rows["supervised", chosen].last
            gain = scores.last - few
            fraction = gain.mean() / (everything.last.mean() - few.mean())
            cells += [with_interval(gain, "+"), f"{fraction:.0%}", f"{p_value(scores.last, few):.3f}"]
        else:
            cells += ["–"] * 3
        compared = method != "as-released" and "as-released" in methods
        cells.append(f"{p_value(scores.last, rows['as-released', chosen].last):.3f}" if compared else "–")
        lines.append([f"`{method}`", *cells])
    lines.append([f"`supervised`, {ALL_LABELS} labels", with_interval(everything.last), *[""] * (len(columns) - 1)])
    return markdown(["method", *columns], lines)


def ablation_table(rows: dict[tuple[str, int], Scores], variants: Mapping[str, Iterable[str]]) -> list[str]:
    """Dice of each method's variants on the tuning cases, best first, with their difference to the method itself."""
    lines: list[list[str]] = []
    for method, names in variants.items():
        dice = {name: scores.last for (name, _), scores in rows.items() if name in (method, *names)}
        lines.append([f"`{method}`", with_interval(dice[method]), "–", "–"])
        for name in sorted(dice.keys() - {method}, key=lambda name: -dice[name].mean()):
            gain = with_interval(dice[name] - dice[method], "+")
            lines.append([name, with_interval(dice[name]), gain, f"{p_value(dice[name], dice[method]):.3f}"])
    return markdown(["setting", "Dice of the tuning cases", "difference", "p"], lines)


def draw_curves(
    scores: dict[tuple[str, str, int], Scores], methods: Sequence[str], labeled: Sequence[int], path: Path
) -> None:
    """Dice against the number of labels, a panel a cohort, a line a method; dashed: supervised on all."""
    from matplotlib.figure import Figure

    cohorts = list(dict.fromkeys(cohort for cohort, _, _ in scores))
    figure = Figure(figsize=(4.6 * len(cohorts) + 1.4, 3.6), layout="constrained")
    for i, cohort in enumerate(cohorts):
        axes = figure.add_subplot(1, len(cohorts), i + 1)
        for k, method in enumerate(methods):
            dice = [scores[cohort, method, n].last for n in labeled]
            strong = method in HIGHLIGHTED
            axes.errorbar(
                [n * (1 + 0.01 * (k - len(methods) / 2)) for n in labeled],
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
        axes.set_xticks(labeled, map(str, labeled))
        axes.set(
            title=cohort, xlabel=f"labelled volumes of {ALL_LABELS}", ylabel="Dice, mean and spread over the seeds"
        )
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
