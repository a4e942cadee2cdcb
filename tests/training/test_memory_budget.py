"""The memory budget: what a step takes, what is given up first, and budgets that are too small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from helpers.training import train
from helpers.volumes import write_cases
from sslfast.errors import UserError
from sslfast.options import NetworkOptions
from sslfast.training.config import TrainConfig
from sslfast.training.memory_budget import fit_to_budget, step_bytes

SMALL = NetworkOptions(width=4, depth=3)


def config(budget: float | None, **changes: object) -> TrainConfig:
    return replace(
        TrainConfig("demo", Path("run"), patch=(48, 32, 32), networks=SMALL, memory_budget=budget), **changes
    )


def gigabytes(settings: TrainConfig) -> float:
    a_voxel, fixed = step_bytes(settings.networks, 2, None)
    x, y, z = settings.patch
    return (a_voxel * (settings.labeled_batch + settings.unlabeled_batch) * x * y * z + fixed) / 2**30


def test_checkpointing_and_bfloat16_take_less() -> None:
    plain, _ = step_bytes(SMALL, 2, None)
    assert plain > 4 * 4 * 2 * 5  # the full grid's few activations in float32 alone
    assert step_bytes(replace(SMALL, checkpointing=True), 2, None)[0] < 0.8 * plain
    assert step_bytes(SMALL, 2, torch.bfloat16)[0] < 0.7 * plain


def test_a_budget_gives_up_least_first() -> None:
    whole = gigabytes(config(None))
    assert fit_to_budget(config(None), 2, None) == (config(None), "")
    assert fit_to_budget(config(1.1 * whole), 2, None) == (config(1.1 * whole), "")
    lean = gigabytes(config(None, networks=replace(SMALL, checkpointing=True)))
    chosen, words = fit_to_budget(config((whole + lean) / 2), 2, None)
    assert chosen.networks.checkpointing
    assert (chosen.patch, chosen.labeled_batch, chosen.unlabeled_batch) == ((48, 32, 32), 2, 2)
    assert "--checkpointing" in words
    chosen, _ = fit_to_budget(config(0.6 * lean), 2, None)
    assert (chosen.patch, chosen.labeled_batch, chosen.unlabeled_batch) == ((48, 32, 32), 1, 1)
    chosen, _ = fit_to_budget(config(0.45 * lean), 2, None)
    assert chosen.patch[0] < 48
    assert all(size % factor == 0 for size, factor in zip(chosen.patch, SMALL.factors))
    assert gigabytes(chosen) <= 0.45 * lean


def test_compiled_networks_are_not_checkpointed() -> None:
    whole = gigabytes(config(None))
    chosen, _ = fit_to_budget(config(0.95 * whole, compile=True), 2, None)
    assert not chosen.networks.checkpointing
    assert chosen.labeled_batch == 1
    with pytest.raises(UserError, match=r"--compile with --checkpointing.*remove one"):
        config(None, compile=True, networks=replace(SMALL, checkpointing=True)).check()


def test_a_budget_too_small_says_what_would_do() -> None:
    with pytest.raises(UserError, match=r"the smallest step, --patch 8 8 8 .* Use --memory-budget 0\.1"):
        fit_to_budget(config(1e-6), 2, None)


def test_the_choice_is_written_and_resumed(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", cases=4, labelled=2)
    options = replace(NetworkOptions(width=4, depth=2), checkpointing=True)
    least = replace(config(None), networks=options, patch=(8, 8, 8), labeled_batch=1, unlabeled_batch=1)
    flags = ["--memory-budget", f"{1.01 * gigabytes(least):.9f}", "--steps", "2"]
    assert train(data, tmp_path / "run", *flags) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["checkpointing"]
    assert (written["labeled_batch"], written["unlabeled_batch"]) == (1, 1)
    assert train(data, tmp_path / "run", *flags, "--resume") == 0
