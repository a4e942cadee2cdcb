"""`python -m sslfast.evaluate`: metrics of segmentations, as a table, CSV and JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sslfast.cli import arg, run_command
from sslfast.errors import UserError
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

    The distances follow medpy, as most published tables do.

    For every case and class, metrics.csv and metrics.json also hold MONAI's hd95 and the symmetric distance.
    """

    predictions: Annotated[Path, arg(metavar="DIR")]
    """Folder of segmentations."""
    labels: Annotated[Path, arg(metavar="DIR")]
    """Folder of reference label maps with the same file names. Each of them needs a segmentation."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for metrics.csv and metrics.json. None: the folder of the segmentations."""
    ignore_label: int = -1
    """Value in the reference label maps for voxels that are not annotated."""


def evaluate(config: EvaluateConfig) -> None:
    """Prints the table and writes the files."""
    from sslfast.data.nifti import nifti_files
    from sslfast.evaluation import evaluate_folder

    labels = nifti_files(config.labels)
    if not labels:
        raise UserError(f"--labels {config.labels} holds no NIfTI file (*.nii.gz or *.nii)")
    evaluation = evaluate_folder(config.predictions, labels, ignore_label=config.ignore_label)
    folder = config.output or config.predictions
    evaluation.write(folder)
    print(evaluation.to_table())
    print(f"\n{folder / 'metrics.csv'}\n{folder / 'metrics.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(EvaluateConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
