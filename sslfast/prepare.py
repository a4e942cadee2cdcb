"""`python -m sslfast.prepare`: checks a dataset file by file and decodes it into the cache, where training finds it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from sslfast.atomic_io import cache_folder, remove_parts
from sslfast.cli import Positional, arg, flatten, run_command
from sslfast.errors import UserError, plural
from sslfast.options import Device, LabelOptions, Preprocessing
from sslfast.ranges import COUNT, Range


@dataclass(frozen=True)
class PrepareConfig:
    """Check a dataset file by file and decode it into the cache. Every fault is listed with its remedy.

    Plain folders, Medical Segmentation Decathlon tasks and raw datasets of nnU-Net are read as they are:
        python -m sslfast.prepare --data DIR --spacing 1.5

    A public dataset is first converted to plain folders in --output:
        python -m sslfast.prepare la --source DOWNLOADED --output DIR

    These public datasets can be converted:
        la         LA 2018 (h5 or NRRD)
        pancreas   NIH Pancreas-CT (h5, DICOM or NIfTI)
        brats      BraTS 2019, whole tumour

    With a published split, --labeled N of the trainer takes the labelled cases of the papers.

    A demo cohort (--data demo) is downloaded and written into the cache.
    """

    dataset: Annotated[Literal["folder", "la", "pancreas", "brats"], Positional] = "folder"
    """Content of --data: a folder that the trainer reads, or a public dataset as published. Give it first."""
    data: Annotated[str, arg(aliases=("--source",), metavar="DIR|demo|demo-brain")] = ""
    """Folder of the dataset, or a demo cohort: demo or demo-brain."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to which a public dataset is written, as images/, labels/ and dataset.json."""
    split: str | None = None
    """A published split: ua-mt (la), mc-net or bcp (pancreas), ssl4mis (brats).
    None: train.list, val.list and test.list beside the data.
    Without lists: the first of these splits whose cases are all there, else every case is for training."""
    labeled: Annotated[int | None, Range(1, COUNT)] = None
    """The labelled cases that training uses. None: all."""
    validation: Annotated[int, Range(0, COUNT)] = 0
    """The labelled cases that training holds out."""
    device: Device = "auto"
    """The device that training uses; the plan for a CPU has a coarser grid."""
    plan: bool = True
    """Choose spacing and intensity of a folder as `train` does, where they are left open. --no-plan: the defaults that
    are listed here."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: LabelOptions = field(default_factory=LabelOptions)
    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """A plan or the config.yaml of a run, of which data, spacing, intensity and classes are taken."""


def prepare(config: PrepareConfig) -> None:
    """Prints one line per case and a summary.

    Raises:
        UserError: the dataset has faults; the message lists them all.
    """
    from sslfast.data.demo.cohorts import data_folder  # here, so that --help does not wait for torch
    from sslfast.data.folder import as_trained, open_dataset
    from sslfast.data.inspection import inspect
    from sslfast.data.public.conversion import convert

    if not config.data:
        raise UserError("--data is missing; give the folder of the dataset, or demo")
    remove_parts(cache_folder(), nested=True, shared=True)
    folder = data_folder(config.data)
    if config.dataset == "folder":
        if config.split:
            raise UserError(f"--split {config.split} is for public datasets; a folder has its split in dataset.json")
    else:
        if config.output is None:
            raise UserError(f"--output is missing; give the folder to which {config.dataset} is written")
        source = convert(config.dataset, folder, config.output, config.split)
        folder = config.output
        print(f"{folder}: {len(source.cases)} cases, split: {source.split}")
        for name, note in source.notes.items():
            print(f"  {name}: {note}")
        print(f"train with: python -m sslfast.train --data {folder} --output runs/{config.dataset} {source.flags}\n")
    dataset = open_dataset(folder)
    if config.labeled:
        dataset = as_trained(dataset, config.labeled, config.validation)
    inspection = inspect(dataset, config.preprocessing, config.labels)
    print("\n".join(inspection.lines))
    if len(inspection.axes) > 1:
        axes = ", ".join(f"{n} {code}" for code, n in inspection.axes.most_common())
        print(f"\nAxes differ ({axes}). Each volume is reoriented by its affine; a wrong affine cannot be detected.")
    labelled = sum(case.label is not None for case in dataset.training)
    print(
        f"\n{len(dataset.training)} training cases, {labelled} of them labelled; {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test. Decoded into {cache_folder() / 'volumes'}."
    )
    if inspection.classes:
        print(f"classes: {inspection.classes.describe()}")
    if len(inspection.channels) > 1:
        print(f"channels: {', '.join(inspection.channels)}")
    for warning in inspection.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if inspection.faults:
        count = plural(len(inspection.faults), "fault")
        raise UserError(f"{count} in {dataset.root}:\n" + "\n".join(f"- {fault}" for fault in inspection.faults))


def own_values(values: dict[str, Any], arguments: Sequence[str]) -> tuple[type[PrepareConfig], dict[str, Any]]:
    """The lines of a run's config file that are flags of this command too."""
    names = {*flatten(PrepareConfig())} - {"dataset", "output", "split"}
    return PrepareConfig, {name: value for name, value in values.items() if name in names}


def complete(config: PrepareConfig, given: set[str]) -> dict[str, Any]:
    """Spacing and intensity by the plan of `train`; what stands in its way is listed by the check."""
    if not config.plan or config.dataset != "folder" or not config.data:
        return {}
    from sslfast.training.config import TrainConfig
    from sslfast.training.plan import plan_preprocessing
    from sslfast.training.survey import look

    same = ("data", "labeled", "validation", "device", "preprocessing", "labels")
    settings = TrainConfig(output=Path(), **{name: getattr(config, name) for name in same})
    try:
        plan = plan_preprocessing(settings, given, look(settings))[0]
    except UserError:
        return {}
    print(plan)
    return plan.values


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(PrepareConfig, prepare, argv, refine=own_values, complete=complete)


if __name__ == "__main__":
    sys.exit(main())
