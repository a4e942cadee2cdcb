"""The tables and the curves of the study: means, 95 % intervals, shares of the gap, Wilcoxon's test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accuracy.runs import Result, Trial
from benchmarks.report import markdown
from sslfast.atomic_io import whole_file

SMALLEST_GAP = 0.005  # Dice; of a smaller gap no share is given
BASELINE, DEFAULT = "supervised", "ssl-contrastive"
HIGHLIGHTED: tuple[str, ...] = (BASELINE, "as-released", DEFAULT)


class Scores(NamedTuple):
    """Dice of the same trial with several seeds."""

    seeds: tuple[int, ...]
    last: np.ndarray  # [seeds, test cases], of the last step
    best: np.ndarray  # [seeds], of the validation-best checkpoint, the mean over the test cases
    seconds: float  # least wall time of a run; NaN: none is known

    def of(self, seeds: Iterable[int]) -> np.ndarray:
        """`last` of these seeds."""
        return self.last[[self.seeds.index(seed) for seed in seeds]]


Key = tuple[str, int]
"""Variant or method, and number of labels."""


def collect(results: Mapping[Trial, Result]) -> dict[str, dict[Key, Scores]]:
    """Scores by cohort and key."""
    runs: dict[str, dict[Key, list[tuple[int, Result]]]] = {}
    for trial, result in results.items():
        key = trial.variant or trial.method, trial.labeled
        runs.setdefault(trial.cohort, {}).setdefault(key, []).append((trial.seed, result))
    return {cohort: {key: _scores(sorted(of)) for key, of in by_key.items()} for cohort, by_key in runs.items()}


def _scores(runs: Sequence[tuple[int, Result]]) -> Scores:
    results = [result for _, result in runs]
    return Scores(
        tuple(seed for seed, _ in runs),
        np.stack([result.last for result in results]),
        np.array([result.best for result in results]),
        float(np.fmin.reduce([result.seconds for result in results])),
    )


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


def paired(scores: Scores, other: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Dice [seeds, cases] of both, of the seeds that both have."""
    common = [seed for seed in scores.seeds if seed in other.seeds]
    return scores.of(common), other.of(common)


def with_interval(dice: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % interval, as a cell of a table."""
    low, high = interval(dice)
    return f"{dice.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def methods_table(rows: Mapping[Key, Scores], labeled: Sequence[int], training: int) -> list[str]:
    """Dice of every method by number of labels: gain over the baseline, share of the gap to all labels, p, wall time.

    Gains and p are those of the seeds that both have. The difficult third of the cases are those whose Dice is lowest,
    the mean of method and baseline. Wall times are those of the fastest seed, of training alone.
    """
    heads = ["labels", "method", "seeds", "Dice", "gain over supervised", "worst seed's gain", "difficult third's gain"]
    heads += ["share of the gap", "p against ssl-contrastive", "validation-best", "min a run"]
    everything = rows.get((BASELINE, training))
    lines = []
    for count in (*labeled, training):
        few, default = rows.get((BASELINE, count)), rows.get((DEFAULT, count))
        here = {method: scores for (method, n), scores in rows.items() if n == count}
        for method, scores in sorted(here.items(), key=lambda item: -item[1].last.mean()):
            gain, worst, difficult, share, p = "–", "–", "–", "–", "–"
            if few is not None and method != BASELINE:
                own, baseline = paired(scores, few)
                gain, worst = with_interval(own - baseline, "+"), f"{(own - baseline).mean(1).min():+.3f}"
                third = np.argsort((own + baseline).mean(0))[: max(1, own.shape[1] // 3)]
                difficult = f"{(own - baseline)[:, third].mean():+.3f}"
                if everything is not None and count != training:
                    ceiling, low = (dice.mean() for dice in paired(everything, few))
                    if ceiling - low > SMALLEST_GAP:
                        share = f"{(own - baseline).mean() / (ceiling - low):.0%}"
            if default is not None and method != DEFAULT:
                p = f"{p_value(*paired(scores, default)):.1g}"
            cells = [with_interval(scores.last), gain, worst, difficult, share, p, f"{scores.best.mean():.3f}"]
            minutes = "–" if np.isnan(scores.seconds) else f"{scores.seconds / 60:.1f}"
            lines.append([str(count), f"`{method}`", str(len(scores.seeds)), *cells, minutes])
    return markdown(heads, lines)


def ablation_table(rows: Mapping[Key, Scores], variants: Mapping[str, Iterable[str]]) -> list[str]:
    """Dice of each method's variants on the tuning cases, best first, with their difference to the method itself."""
    lines: list[list[str]] = []
    for method, names in variants.items():
        of = {name: scores for (name, _), scores in rows.items() if name in (method, *names)}
        lines.append([f"`{method}`", with_interval(of[method].last), "–", "–"])
        for name in sorted(of.keys() - {method}, key=lambda name: -of[name].last.mean()):
            own, default = paired(of[name], of[method])
            cells = [with_interval(of[name].last), with_interval(own - default, "+"), f"{p_value(own, default):.3f}"]
            lines.append([name, *cells])
    return markdown(["setting", "Dice of the tuning cases", "difference", "p"], lines)


def draw_curves(scores: Mapping[str, Mapping[Key, Scores]], training: Mapping[str, int], path: Path) -> None:
    """Dice against the number of labels, a panel a cohort, a line a method; dashed: supervised on all."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(method for rows in scores.values() for method, _ in rows))
    figure = Figure(figsize=(4.2 * len(scores) + 1.4, 3.6), layout="constrained")
    lines: dict[str, Any] = {}
    for i, (cohort, rows) in enumerate(scores.items()):
        axes = figure.add_subplot(1, len(scores), i + 1)
        counts = sorted({n for _, n in rows if n != training[cohort]})
        for k, method in enumerate(methods):
            points = {n: rows[method, n].last for n in counts if (method, n) in rows}
            if not points:
                continue
            lines[method] = axes.errorbar(
                [n * (1 + 0.01 * (k - len(methods) / 2)) for n in points],
                [dice.mean() for dice in points.values()],
                [dice.mean(1).std(ddof=1) if len(dice) > 1 else 0.0 for dice in points.values()],
                color="black" if method == BASELINE else f"C{k}",
                linewidth=2 if method in HIGHLIGHTED else 1,
                marker="o",
                markersize=3,
            )
        if (BASELINE, training[cohort]) in rows:
            axes.axhline(rows[BASELINE, training[cohort]].last.mean(), color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set(title=cohort, xlabel=f"labelled volumes of {training[cohort]}", ylabel="Dice, mean and spread")
        axes.grid(alpha=0.3)
    figure.legend([*lines.values()], [*lines], loc="outside right center", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
