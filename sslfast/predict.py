"""`python -m sslfast.predict`: segments new volumes, each in its own geometry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sslfast.cli import arg, run_command
from sslfast.errors import UserError
from sslfast.options import LAST, Device, Precision, Windows
from sslfast.renamed import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)


@dataclass(frozen=True)
class PredictConfig:
    """Segment volumes with a trained pair of networks.

    For example:
        python -m sslfast.predict --checkpoint runs/demo --images new/ --output segmentations/

    The published test protocol for the left atrium: --strides 18 18 4 --blend constant

    Each segmentation is a NIfTI label map with the file name, shape, affine and orientation of its volume.
    """

    checkpoint: Annotated[Path, arg(metavar="RUN|FILE")]
    """Folder of a run (for its last checkpoint), or a checkpoint file."""
    images: Annotated[Path, arg(metavar="DIR|FILE")]
    """A folder of NIfTI volumes, or one file."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Folder for the segmentations; created if it does not exist."""
    device: Device = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Precision = "auto"
    """Precision of the networks. auto: bf16 if the hardware multiplies it natively, else fp32."""
    windows: Windows = field(default_factory=Windows)


def predict(config: PredictConfig) -> None:
    """Segments every volume. Those that cannot be read are named at the end; the others are still segmented."""
    from sslfast.data.nifti import case_name, nifti_files
    from sslfast.inference import choose_device, predict_cases
    from sslfast.ops.buffers import keep_freed_memory
    from sslfast.training.checkpoint import load_model

    windows = config.windows
    if not 0 <= windows.overlap < 1:
        raise UserError(f"--overlap {windows.overlap}: it must be at least 0 and below 1")
    if windows.strides and min(windows.strides) < 1:
        raise UserError(f"--strides {' '.join(map(str, windows.strides))}: each must be 1 or more")
    if windows.at_once is not None and windows.at_once < 1:
        raise UserError(f"--at-once {windows.at_once}: it must be 1 or more")
    if config.images.is_dir():
        images = nifti_files(config.images)
        if not images:
            raise UserError(f"--images {config.images} holds no NIfTI file (*.nii.gz or *.nii)")
    else:
        images = {case_name(config.images): config.images}
    path = config.checkpoint / LAST if config.checkpoint.is_dir() else config.checkpoint
    if config.output.resolve() in {image.parent.resolve() for image in images.values()}:
        raise UserError(f"--output {config.output} is the folder of the volumes; the segmentations would replace them")
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(path).to(device)
    predict_cases(model, images, config.output, config.precision, windows)
    print(f"{len(images)} segmentations in {config.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(PredictConfig, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
