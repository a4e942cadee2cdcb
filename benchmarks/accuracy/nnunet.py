"""nnU-Net v2 on the hippocampus cohort: what a user would run instead, with the same labels and the same wall time."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.accuracy.cohorts import locate
from benchmarks.accuracy.runs import Result, Trial, case_dice, read_rows, write_rows
from benchmarks.accuracy.tables import collect, with_interval
from benchmarks.report import RESULTS, markdown, provenance, write_page
from sslfast.atomic_io import make_folder
from sslfast.cli import run_command
from sslfast.data.folder import Dataset, open_dataset, split_training
from sslfast.errors import UserError
from sslfast.evaluation import evaluate_folder

COHORT = "hippocampus"
NUMBER, NAME = 1, f"Dataset001_{COHORT}"  # of nnU-Net's dataset
CONFIGURATION = "3d_fullres"
ITERATIONS, VALIDATIONS = 10, 1  # batches of an epoch; nnU-Net's 250 and 50 are too many for minutes
WARM_UP = 2  # epochs before a run; all but the first are timed
NOTE = f"""\
nnU-Net v2 with its own planner, augmentation and predictor, configuration {CONFIGURATION}, trained on the labelled
cases alone (fold `all`). The learning rate falls towards zero within the time of a training. By default nnU-Net does
250,000 iterations: this is what it learns in that time on a CPU, not what it can reach. Dice of the last step, as in
the study; in brackets the 95 % interval. Minutes are of the fastest seed."""


@dataclass(frozen=True)
class NnunetConfig:
    """Train nnU-Net v2 on the first labelled cases of the hippocampus cohort and measure its Dice on the test cases.

    nnU-Net has an environment of its own, which needs no sslfast; start the script in the checkout. It runs on the CPU.

        python3 -m venv VENV
        VENV/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
        VENV/bin/pip install nnunetv2 tyro
        VENV/bin/python -m benchmarks.accuracy.nnunet --real DIR

    A seed that the CSV has with the same minutes and threads is not repeated.
    """

    real: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder that holds hippocampus/ (docs/datasets.md says how to get it)."""
    labeled: int = 8
    """Number of labelled training cases, the first in dataset.json, as in the study."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run for each seed."""
    minutes: float = 6.7
    """Wall time of a training, without planning and test. The default is that of the study's default run on one core,
    with validation and test."""
    threads: int = 1
    """Threads of a run."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/accuracy/nnunet")
    """Folder for nnU-Net's files, the segmentations and the log."""
    name: str = "accuracy-nnunet"
    """Name of the page and the CSV in benchmarks/results/, or a path without suffix."""


def nnunet(config: NnunetConfig) -> None:
    """Trains the seeds that the CSV lacks; writes the CSV after each of them, and the page."""
    path = RESULTS / f"{config.name}.csv"
    known = read_rows(path)
    said = [config.minutes, config.threads, CONFIGURATION, ITERATIONS, VALIDATIONS]
    settings = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]
    trials = [Trial(COHORT, "nnunet", config.labeled, seed) for seed in config.seeds]
    missing = [trial for trial in trials if trial not in known or known[trial].settings != settings]
    if missing:
        if find_spec("nnunetv2") is None:
            raise UserError(
                "nnunetv2 is not installed: pip install nnunetv2, in an environment of its own, as --help says. "
                "sslfast does not depend on it"
            )
        dataset = open_dataset(Path(locate(COHORT, config.real)))
        home = make_folder(config.output / f"{config.labeled}-labeled").resolve()
        images = write_raw(dataset, config.labeled, home / "raw") / "imagesTs"
        print(f"{len(missing)} runs; their log: {home / 'log.txt'}", flush=True)
        with open(home / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
            prepare(home, config.threads)
            for trial in missing:
                known[trial] = run(trial, config, dataset, images, settings)
                write_rows(known, path)
    print(write_page(config.name, page(read_rows(path))))


def write_raw(dataset: Dataset, labeled: int, raw: Path) -> Path:
    """Writes an nnU-Net dataset of the first labelled cases and the test images; returns its folder.

    Raises:
        UserError: there are fewer labelled cases, or a folder cannot be written.
    """
    folder = raw / NAME
    cases = split_training(dataset, labeled).labelled
    files = {f"imagesTr/{case.name}_0000.nii.gz": case.image for case in cases}
    files |= {f"labelsTr/{case.name}.nii.gz": case.label for case in cases if case.label}
    files |= {f"imagesTs/{case.name}_0000.nii.gz": case.image for case in dataset.test}
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in files.items():
        make_folder((folder / name).parent)
        shutil.copyfile(source, folder / name)
    classes = {name: number for number, name in dataset.classes.names.items()} if dataset.classes else {}
    description = {"channel_names": {"0": "MRI"}, "labels": classes, "numTraining": len(cases)}
    (folder / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    return folder


def prepare(home: Path, threads: int) -> None:
    """Plans and preprocesses the raw dataset in `home`, where nnU-Net keeps its files from then on."""
    os.environ |= {f"nnUNet_{kind}": str(home / kind) for kind in ("raw", "preprocessed", "results")}
    os.environ |= {"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": str(threads), "nnUNet_n_proc_DA": str(threads)}
    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as nnunet_api

    torch.set_num_threads(threads)
    nnunet_api.extract_fingerprints([NUMBER], num_processes=threads, check_dataset_integrity=True)
    nnunet_api.plan_experiments([NUMBER])
    nnunet_api.preprocess([NUMBER], configurations=[CONFIGURATION], num_processes=[threads])
    os.environ.update(nnUNet_n_proc_DA="0")  # augment in the training process: no more threads, and seeded


def epochs_within(minutes: float, ends: Sequence[float]) -> int:
    """How many epochs fit the minutes, at least one, by the times in s at which the epochs of a warm-up ended."""
    return max(1, int(60 * minutes * (len(ends) - 1) / (ends[-1] - ends[0])))


def train(seed: int, epochs: int) -> Any:
    """Trains nnU-Net's default trainer, whose learning rate falls over the epochs, and returns it."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net draws from this generator)
    torch.manual_seed(seed)
    trainer = get_trainer_from_args(NAME, CONFIGURATION, "all", device=torch.device("cpu"))
    trainer.num_epochs = epochs
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = ITERATIONS, VALIDATIONS
    trainer.run_training()
    return trainer


def run(trial: Trial, config: NnunetConfig, dataset: Dataset, images: Path, settings: str) -> Result:
    """Trains and tests one seed, for as many epochs as fit the time by the pace of a warm-up."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    warm_up = train(trial.seed, WARM_UP)
    epochs = epochs_within(config.minutes, warm_up.logger.get_value("epoch_end_timestamps", None))
    started = time.monotonic()
    trainer = train(trial.seed, epochs)
    trained = time.monotonic() - started
    test = make_folder(images.parents[2] / f"seed-{trial.seed}")
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",))
    predictor.predict_from_files_sequential(str(images), str(test))
    seconds = time.monotonic() - started
    labels = {case.name: case.label for case in dataset.test if case.label}
    evaluation = evaluate_folder(test, labels, classes=dataset.classes)
    evaluation.raise_failed()
    evaluation.write(test)
    dice = case_dice(test)
    patch = "×".join(map(str, trainer.configuration_manager.patch_size))
    made = f"{provenance()}, nnunetv2 {version('nnunetv2')}, {epochs * ITERATIONS} iterations "
    made += f"({trainer.batch_size} patches of {patch}) in {trained:.0f} s"
    last = np.array([dice[case] for case in sorted(dice)])
    return Result(settings, made, float("nan"), last, seconds)  # no validation-best checkpoint: no validation cases


def page(results: Mapping[Trial, Result]) -> list[str]:
    """The lines of the page: a row for each number of labels, and what each run was made with."""
    rows = []
    for (_, labeled), scores in sorted(collect(results)[COHORT].items()):
        by_seed = ", ".join(f"{seed}: {dice:.3f}" for seed, dice in zip(scores.seeds, scores.last.mean(1), strict=True))
        rows.append([str(labeled), with_interval(scores.last), by_seed, f"{scores.seconds / 60:.1f}"])
    table = markdown(["labels", "Dice", "by seed", "min a run, training and test"], rows)
    made = [f"- {trial.labeled} labels, seed {trial.seed}: {result.made}" for trial, result in sorted(results.items())]
    return [f"### `{COHORT}`, nnU-Net v2", "", *table, "", *NOTE.splitlines(), "", *made]


def main(argv: Sequence[str] | None = None) -> int:
    """The script; returns the exit status."""
    return run_command(NnunetConfig, nnunet, argv)


if __name__ == "__main__":
    sys.exit(main())
