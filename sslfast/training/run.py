"""A whole training run: from the dataset folder to tested checkpoints and plots."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from sslfast.atomic_io import make_folder
from sslfast.cli import flatten, read_config, write_config
from sslfast.data.demo.cohorts import data_folder
from sslfast.data.folder import Case, Dataset, open_dataset, split_training
from sslfast.data.volumes import DecodedCase, count_classes, decode
from sslfast.errors import UserError
from sslfast.evaluation import Evaluation, evaluate_folder
from sslfast.inference import autocast_dtype, choose_device, predict_cases
from sslfast.methods import find_method
from sslfast.ops.buffers import keep_freed_memory
from sslfast.ops.reduce import Reducer
from sslfast.options import BEST, LAST
from sslfast.training.checkpoint import load_checkpoint, load_model
from sslfast.training.config import CONFIG, TrainConfig
from sslfast.training.distributed import first_process_first, processes, was_restarted
from sslfast.training.memory_budget import fit_to_budget
from sslfast.training.plots import draw_curves, draw_overlays
from sslfast.training.trainer import Trainer

RESUME_MAY_CHANGE = {"output", "device", "workers", "save_every", "baseline"}


@dataclass(frozen=True)
class RunResult:
    """The result of one method."""

    pictures: list[Path]
    evaluations: dict[str, Evaluation]
    """Metrics of the test cases by checkpoint ("last step", "validation-best"); empty without test cases."""
    labelled: int
    unlabelled: int
    findings: list[str]
    """Warnings of the training that still hold at its end."""


def run(config: TrainConfig) -> dict[str, RunResult]:
    """Trains, tests and plots the configured method and, with `baseline`, also `supervised`.

    Returns:
        The result of each method, by name; empty in every process but the first.

    Raises:
        UserError: a setting, the dataset or the output folder is wrong, or the loss became NaN or infinite.
    """
    config.check()
    with processes(choose_device(config.device)) as (reducer, device):
        if device.type == "cpu" and config.memory_budget is None:
            keep_freed_memory()
        if was_restarted(reducer, device):
            config = replace(config, resume=True)
        configs = [config]
        if config.baseline and config.method != "supervised":
            output = config.output / "supervised"
            configs.append(replace(config, method="supervised", options=None, output=output))
        results = {one.method: run_method(one, reducer, device) for one in configs}
        return results if reducer.rank == 0 else {}


def run_method(config: TrainConfig, reducer: Reducer, device: torch.device) -> RunResult:
    """Trains one method, tests its checkpoints and draws its plots; see `run`."""
    method = find_method(config.method)
    options = config.options or method.Options()
    config = replace(config, options=options)
    if config.streams and (device.type != "cuda" or reducer.size > 1):
        raise UserError("--streams is for one process with a GPU; leave it out")
    with first_process_first(reducer):
        dataset = open_dataset(data_folder(config.data))
    split = split_training(dataset, config.labeled, config.validation)
    classes = dataset.classes or dict(
        enumerate(["background", *(f"class {c}" for c in range(1, count_classes(split.labelled, config.ignore_label)))])
    )
    try:
        method(len(classes), config.steps, config.seed, options)
    except ValueError as error:  # checked before the output folder is created
        raise UserError(f"--method {config.method}: {error}") from error
    volumes = len(split.labelled) + len(split.unlabelled)
    if reducer.size > volumes:
        raise UserError(f"{reducer.size} processes train on {volumes} volumes; start no more than {volumes}")
    config, changed = fit_to_budget(config, len(classes), autocast_dtype(config.precision, device))
    if changed and reducer.rank == 0:
        print(changed)
    torch.manual_seed(config.seed)
    with first_process_first(reducer):
        if reducer.rank == 0:
            start_folder(config)
        training = decode_all(config, (*split.labelled, *split.unlabelled), len(classes), "decode")
        validation = decode_all(config, split.validation, len(classes), "decode validation")
        if reducer.rank == 0:
            write_config(config, config.output / CONFIG)

    trainer = Trainer(config, classes, training, len(split.labelled), validation, device, reducer)
    if config.resume and reducer.rank == 0:
        done = f"resumed after step {trainer.first_step} of {config.steps}"
        print(f"{config.output}: {done if trainer.first_step else 'no checkpoint yet; starting at step 0'}")
    trainer.run()
    result = RunResult([], {}, len(split.labelled), len(split.unlabelled), trainer.health.findings)
    if reducer.rank > 0:
        return result
    result.pictures.append(draw_curves(config.output / "log.csv", config.output / "curves.png", config.method))
    if dataset.test:
        evaluation = test(config, dataset, classes, LAST, config.output / "test", device)
        result.evaluations["last step"] = evaluation
        overlays = config.output / "overlays.png"
        drawn = [case for case in dataset.test if case.name not in evaluation.failed]
        result.pictures.append(draw_overlays(drawn, config.output / "test", overlays, evaluation))
    if dataset.test and validation:
        folder = config.output / "test_best"
        if load_checkpoint(config.output / BEST)["step"] == config.steps:  # the same weights
            shutil.copytree(config.output / "test", folder, dirs_exist_ok=True)
        else:
            evaluation = test(config, dataset, classes, BEST, folder, device)
        result.evaluations["validation-best"] = evaluation
    return result


def test(
    config: TrainConfig, dataset: Dataset, classes: dict[int, str], checkpoint: str, folder: Path, device: torch.device
) -> Evaluation:
    """Segments the test cases into `folder` and writes the metrics of those that can be evaluated there."""
    model = load_model(config.output / checkpoint).to(device)
    predict_cases(model, {case.name: case.image for case in dataset.test}, folder, config.precision)
    labels = {case.name: case.label for case in dataset.test if case.label}
    evaluation = evaluate_folder(folder, labels, classes=classes, ignore_label=config.ignore_label)
    evaluation.write(folder)
    return evaluation


def decode_all(config: TrainConfig, cases: Sequence[Case], num_classes: int, what: str) -> list[DecodedCase]:
    """The cases on the networks' grid, with a progress bar called `what`."""
    return [
        decode(case, config.preprocessing, num_classes=num_classes, ignore_label=config.ignore_label)
        for case in tqdm(cases, desc=what, unit="case", leave=False, disable=not cases)
    ]


def start_folder(config: TrainConfig) -> None:
    """Creates the folder of the run. Refuses a folder that holds another run."""
    make_folder(config.output)
    written = config.output / CONFIG
    if not written.exists():
        return
    if not config.resume:
        raise UserError(f"{config.output} already holds a run; add --resume to continue it, or choose another --output")
    before, now = read_config(written), flatten(config)
    changed = [name for name in now if name not in RESUME_MAY_CHANGE and before.get(name, now[name]) != now[name]]
    if changed:
        flags = ", ".join(f"--{n.replace('_', '-')} (was {before[n]}, is {now[n]})" for n in changed)
        raise UserError(
            f"{config.output} was started with other settings: {flags}. Resume with the same, or start a new run."
        )
