"""A whole training run: from the dataset folder to tested checkpoints and plots."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sslfast.calibration import Calibration, geometry
from sslfast.cli import flatten
from sslfast.data.channels import named_channels
from sslfast.data.classes import Classes, check_ignored
from sslfast.data.demo.cohorts import data_folder
from sslfast.data.folder import Case, TrainingSplit, open_dataset, split_training
from sslfast.data.inspection import absent_classes
from sslfast.data.mirror import other_sides
from sslfast.data.nifti import digest_of, read_header
from sslfast.data.volumes import DecodedCase, decode, grid_spacing
from sslfast.errors import Stopped, Terminated, UserError
from sslfast.evaluation import Evaluation, evaluate_folder
from sslfast.inference import choose_device
from sslfast.methods import find_method
from sslfast.networks import build_networks
from sslfast.ops.buffers import keep_freed_memory
from sslfast.ops.reduce import Reducer
from sslfast.options import BEST, LAST
from sslfast.precision import autocast_dtype
from sslfast.quality import MEASURES, measure, read_rows
from sslfast.report_page import PAGE, PICTURED
from sslfast.reports import report_of_run
from sslfast.segmentations import predict_cases
from sslfast.segmenter import Extras
from sslfast.training.checkpoint import load_checkpoint, load_model
from sslfast.training.config import CONFIG, TrainConfig
from sslfast.training.distributed import first_process_first, processes, was_restarted
from sslfast.training.initial_weights import init_networks
from sslfast.training.memory_budget import fit_to_budget
from sslfast.training.plan import Plan
from sslfast.training.plots import draw_curves, draw_overlays
from sslfast.training.run_folder import open_folder, record
from sslfast.training.survey import build_method, find_classes
from sslfast.training.trainer import Trainer


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


def run(config: TrainConfig, plan: Plan | None = None) -> dict[str, RunResult]:
    """Trains, tests and plots the configured method and, with `baseline`, also `supervised`.

    Args:
        plan: what chose the settings; written to the run's folder.

    Returns:
        The result of each method, by name; empty in every process but the first.

    Raises:
        UserError: a setting, the dataset or the output folder is wrong, or the loss became NaN or infinite.
        Stopped: Ctrl-C or SIGTERM ended the training after a step; the message says how to go on.
    """
    config.check()
    with processes(choose_device(config.device)) as (reducer, device):
        if device.type == "cpu" and config.memory_budget is None:
            keep_freed_memory()
        restarted = was_restarted(reducer, device)
        config = replace(config, resume=config.resume or restarted)
        configs = [config]
        if config.baseline and config.method != "supervised":
            output = config.output / "supervised"
            configs.append(replace(config, method="supervised", options=None, output=output))
        results = {}
        for one in configs:
            may_start = not config.resume or restarted or one is not config
            try:
                results[one.method] = run_method(one, reducer, device, may_start, plan)
            except (Stopped, KeyboardInterrupt) as ended:
                if not (one.output / CONFIG).exists():
                    raise
                number = SIGTERM if isinstance(ended, Terminated) else getattr(ended, "signal", SIGINT)
                flags = ["--config", str(config.output / CONFIG), "--output", str(config.output), "--resume"]
                again = shlex.join(["python", "-m", "sslfast.train", *flags])
                message = f"{str(ended) or 'interrupted'}\nGo on with: {again}" if reducer.rank == 0 else ""
                raise Stopped(number, message) from ended
        return results if reducer.rank == 0 else {}


def run_method(
    config: TrainConfig, reducer: Reducer, device: torch.device, may_start: bool, plan: Plan | None = None
) -> RunResult:
    """Trains one method, tests its checkpoints and draws its plots; see `run`.

    Args:
        may_start: False if the output folder must hold a run, which is resumed.
    """
    method = find_method(config.method)
    options = config.options or method.Options()
    config = replace(config, options=options)
    if config.streams and (device.type != "cuda" or reducer.size > 1):
        raise UserError("--streams is for one process with a GPU; leave it out")
    with first_process_first(reducer):
        dataset = open_dataset(data_folder(config.data))
    split = split_training(dataset, config.labeled, config.validation)
    ignore_label = dataset.ignores(config.labels.ignore_label)
    classes = find_classes(config, dataset, split)
    check_ignored(classes, ignore_label)
    channels = named_channels(dataset.channels, split.labelled[0].images)
    build_method(config, len(classes.names))  # checks its options before the output folder is created
    volumes = len(split.labelled) + len(split.unlabelled)
    if reducer.size > volumes:
        raise UserError(f"{reducer.size} processes train on {volumes} volumes; start no more than {volumes}")
    config, changed = fit_to_budget(config, len(classes.names), autocast_dtype(config.precision, device), len(channels))
    if changed and reducer.rank == 0:
        print(changed)
    if config.init_from is not None and not config.resumes:  # checked before the output folder is created
        taken = init_networks(config.init_from, build_networks(config.networks, len(classes.names), len(channels)))
        if reducer.rank == 0:
            print("\n".join(taken))
    torch.manual_seed(config.seed)
    with first_process_first(reducer):
        if reducer.rank == 0:
            open_folder(config, split, may_start)
        read = partial(
            decode,
            preprocessing=config.preprocessing,
            classes=[*classes.names],
            merged=classes.merged,
            ignore_label=ignore_label,
            channels=len(channels),
        )
        training = decode_all(read, (*split.labelled, *split.unlabelled), "decode")
        validation = decode_all(read, split.validation, "decode validation")
        check_foreground(training[: len(split.labelled)], classes)
        if reducer.rank == 0:
            record(config, split)
            if plan:
                values = flatten(config)
                del values["output"]
                plan.write(config.output / "plan.yaml", values)
            print(f"{config.data}: {split}")
    mirrored = config.augment in ("flip", "all") and "left-right" in config.mirror
    if mirrored and other_sides([*classes.names.values()]) is None:
        print(
            "warning: nothing is mirrored from left to right, for a class has a side and no counterpart",
            file=sys.stderr,
        )

    spacing = grid_spacing([case.images for case in (*split.labelled, *split.unlabelled)], config.preprocessing)
    trainer = Trainer(
        config, classes, training, len(split.labelled), validation, device, reducer, channels=channels, spacing=spacing
    )
    if config.resume and reducer.rank == 0:
        after = f"after step {trainer.first_step} of {config.steps}"
        finished = f"finished {after}; nothing is left to train, and the result is"
        done = finished if trainer.first_step == config.steps else f"resumed {after}"
        print(f"{config.output}: {done if trainer.first_step else 'no checkpoint yet; starting at step 0'}")
    trainer.run()
    result = RunResult([], {}, len(split.labelled), len(split.unlabelled), trainer.health.findings)
    if reducer.rank > 0:
        return result
    result.pictures.append(draw_curves(config.output / "log.csv", config.output / "curves.png", config.method))
    calibration = calibrate(config, split, ignore_label, classes, device, [*training, *validation])
    calibration.write(config.output)
    if missing := calibration.without_estimates():
        print(missing)
    test = partial(segment_and_evaluate, config, dataset.test, classes, ignore_label, device, calibration)
    if dataset.test:
        evaluation = test(LAST, config.output / "test")
        result.evaluations["last step"] = evaluation
        overlays = config.output / "overlays.png"
        drawn = [case for case in dataset.test if case.name not in evaluation.failed]
        result.pictures.append(draw_overlays(drawn, config.output / "test", overlays, evaluation))
    if dataset.test and validation:
        folder = config.output / "test_best"
        if load_checkpoint(config.output / BEST)["step"] == config.steps:  # the same weights
            shutil.copytree(config.output / "test", folder, dirs_exist_ok=True)
        else:
            evaluation = test(BEST, folder)
        result.evaluations["validation-best"] = evaluation
    try:
        result.pictures.append(report_of_run(config.output, config.output / PAGE, PICTURED))
    except UserError as error:  # the results are there without it
        print(f"warning: there is no report: {error}", file=sys.stderr)
    return result


def segment_and_evaluate(
    config: TrainConfig,
    cases: Sequence[Case],
    classes: Classes,
    ignore_label: int,
    device: torch.device,
    calibration: Calibration | None,
    checkpoint: str,
    folder: Path,
) -> Evaluation:
    """Segments the cases into `folder` and writes the metrics of those that can be evaluated there."""
    model = load_model(config.output / checkpoint).to(device)
    images = {case.name: case.images for case in cases}
    extras = Extras(disagreement=True)
    predict_cases(model, images, folder, config.precision, extras=extras, calibration=calibration)
    labels = {case.name: case.label for case in cases if case.label}
    evaluation = evaluate_folder(folder, labels, classes=classes, ignore_label=ignore_label)
    evaluation.write(folder)
    return evaluation


def calibrate(
    config: TrainConfig,
    split: TrainingSplit,
    ignore_label: int,
    classes: Classes,
    device: torch.device,
    cases: Sequence[DecodedCase],
) -> Calibration:
    """What the scans of the run are like; the validation cases are segmented for it, into the folder validation/.

    Args:
        cases: training and validation cases on the networks' grid, in the order of the split.
    """
    rows: list[dict[str, Any]] = []
    if split.validation:
        folder = config.output / "validation"
        evaluation = segment_and_evaluate(config, split.validation, classes, ignore_label, device, None, LAST, folder)
        qualities = read_rows(folder)
        for row in evaluation.rows:
            of = classes.names[row["class"]]
            measured = {name: qualities[row["case"]][f"{name} {of}"] for name in MEASURES}
            rows.append({"case": row["case"], "class": of, "dice": row["dice"], **measured})
    names = [*classes.names.values()][1:]
    known = (*split.labelled, *split.unlabelled, *split.validation)
    scans: list[dict[str, Any]] = [{"case": case.name, **geometry(read_header(case.images))} for case in known]
    labels: list[dict[str, Any]] = []
    for case, scan in zip(cases, scans, strict=True):
        label = case.label
        if label is None or (label < 0).any():  # of a map that is annotated in part, volume and edges say little
            continue
        lengths = scan["spacing"] if config.preprocessing.spacing is None else config.preprocessing.spacing
        measures = measure(label, range(1, len(names) + 1), math.prod(lengths) / 1000)
        labels += [{"case": case.name, "class": of, **values} for of, values in zip(names, measures, strict=True)]
    checkpoints = [path for name in (LAST, BEST) if (path := config.output / name).exists()]
    return Calibration(rows, labels, scans, [digest_of(path, "") for path in checkpoints])


def check_foreground(labelled: Sequence[DecodedCase], classes: Classes) -> None:
    """Warns of classes that no labelled case has and of labelled cases without foreground.

    Raises:
        UserError: no labelled case has a foreground voxel.
    """
    ids = [*classes.names]
    values = {}
    for case in labelled:
        assert case.label is not None
        values[case.name] = {ids[c] for c in np.unique(case.label).tolist() if c >= 0}
    if not any(value > 0 for has in values.values() for value in has):
        raise UserError(
            f"none of the {len(labelled)} labelled cases has a foreground voxel; check the label maps, --classes and "
            "--ignore-label with `python -m sslfast.prepare`"
        )
    for warning in absent_classes(values, classes):
        print(f"warning: {warning}", file=sys.stderr)


def decode_all(read: Callable[[Case], DecodedCase], cases: Sequence[Case], what: str) -> list[DecodedCase]:
    """What `read` makes of the cases, with a progress bar called `what`."""
    return [read(case) for case in tqdm(cases, desc=what, unit="case", leave=False, disable=not cases)]
