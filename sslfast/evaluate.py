"""`python -m sslfast.evaluate`: metrics of segmentations, as a table, CSV and JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sslfast.cli import arg, run_command
from sslfast.errors import UserError
from sslfast.ranges import Range
from sslfast.renamed import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare segmentations with reference label maps.

    For example:
        python -m sslfast.evaluate --predictions runs/demo/test --labels labels/

    The table shows Dice, Jaccard and surface distances by class, in voxels and mm:
        hd95     95th percentile of the surface distances in both directions together
        asd      mean surface distance from the prediction to the reference, not back
        missed   number of cases in which the class was missed; they have Dice 0 and no distance
        NSD      surface Dice: share of both surfaces that is within --tolerance of the other

    The distances follow medpy, as most published tables do.

    The classes are those of --classes, of --checkpoint, or of dataset.json with the references or beside their folder.

    Cases whose files cannot be read or do not match are listed at the end, and the exit status is 2. The metrics are
    those of the other cases.

    For every case and class, metrics.csv and metrics.json also hold precision, recall, the error of the volume, MONAI's
    hd95 and the symmetric distance.

    If the segmentations have a quality.csv, what it estimated is printed beside the true Dice.
    """

    predictions: Annotated[Path, arg(metavar="DIR")]
    """Folder of segmentations."""
    labels: Annotated[Path, arg(metavar="DIR")]
    """Folder of reference label maps with the same file names. Each of them needs a segmentation; see --partial."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for metrics.csv and metrics.json. None: the folder of the segmentations."""
    classes: tuple[str, ...] = ()
    """Classes and their values in the label maps, such as liver=5 spleen=1 or lung=10+11, as in training.
    Other values of the references are background. None: those of --checkpoint or dataset.json, or the values in the
    label maps."""
    ignore_label: Annotated[int, Range(-(10**9), 10**9)] = -1
    """Value in the reference label maps for voxels that are not annotated."""
    tolerance: Annotated[float, Range(0, 1000)] = 1.0
    """Tolerance of the surface Dice, mm: a distance that does not matter, such as that between two annotators."""
    partial: bool = False
    """Leave out the references that have no segmentation."""
    jobs: Annotated[int, Range(1, 256)] = 1
    """Cases evaluated at the same time, each in a process of its own. A process holds one case."""
    checkpoint: Annotated[Path | None, arg(metavar="RUN|FILE")] = None
    """Folder of a run, or a checkpoint file, whose classes are compared."""


def evaluate(config: EvaluateConfig) -> None:
    """Prints the table and writes the files."""
    from sslfast.data.folder import volumes_in
    from sslfast.evaluation import evaluate_folder, named_classes
    from sslfast.quality import against_truth, read_rows

    labels = volumes_in(config.labels)
    if not labels:
        raise UserError(f"--labels {config.labels} holds no label map, such as *.nii.gz")
    if config.classes and config.checkpoint:
        raise UserError("--classes and --checkpoint both say which classes there are; give one of them")
    classes, ignore_label = named_classes(config.labels, labels, config.classes, config.ignore_label)
    if config.checkpoint is not None:
        from sslfast.data.classes import Classes
        from sslfast.training.checkpoint import load_model  # here, so that others do not wait for torch

        model = load_model(config.checkpoint)
        classes = Classes(model.classes, model.merged)
    evaluation = evaluate_folder(
        config.predictions,
        labels,
        classes=classes,
        ignore_label=ignore_label,
        merge_both=bool(config.classes),
        partial=config.partial,
        jobs=config.jobs,
        tolerance=config.tolerance,
    )
    folder = config.output or config.predictions
    evaluation.write(folder)
    print(evaluation.to_table())
    if said := against_truth(read_rows(config.predictions), evaluation.case_dice()):
        print(f"\n{said}")
    if evaluation.missing:
        print(f"\nleft out, for there is no segmentation: {', '.join(evaluation.missing)}")
    print(f"\n{folder / 'metrics.csv'}\n{folder / 'metrics.json'}")
    evaluation.raise_failed()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(EvaluateConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
