"""`python -m sslfast.evaluate`: how good segmentations are, as a table, CSV and JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslfast.cli import arg, run_command
from sslfast.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare segmentations with their references.

    python -m sslfast.evaluate --predictions runs/demo/test --labels labels/

    Per case and class: Dice, Jaccard, and surface distances in voxels and mm. The table shows medpy's definitions, which
    the published tables of this field use: hd95 is the 95th percentile of the pooled two-way distances, asd goes from the
    prediction to the reference only. metrics.csv and metrics.json also hold MONAI's hd95 and the symmetric distance. A
    class that was missed has Dice 0 and no distance; it is counted, never dropped.
    """

    predictions: Annotated[Path, arg(metavar="DIR")]
    """Folder of segmentations."""
    labels: Annotated[Path, arg(metavar="DIR")]
    """Folder of reference label maps with the same names; each must have its prediction."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for metrics.csv and metrics.json. None: the predictions' folder."""
    ignore_label: int = -1
    """Number that the references use for voxels that nobody annotated."""


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
