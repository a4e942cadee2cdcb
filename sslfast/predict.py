"""`python -m sslfast.predict`: segments new volumes, each in its own geometry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sslfast.cli import arg, run_command
from sslfast.options import Device, Precision, Windows
from sslfast.renamed import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)


@dataclass(frozen=True)
class PredictConfig:
    """Segment volumes with a trained pair of networks.

    For example:
        python -m sslfast.predict --checkpoint runs/demo --images new/ --output segmentations/

    The published test protocol for the left atrium: --strides 18 18 4 --blend constant

    Each segmentation is a NIfTI label map, <case>.nii.gz, with the shape, affine and orientation of its volume.
    Nothing else of the volume's header is copied. If the command is stopped, the same command continues where it was.

    quality.csv has a row a scan: an estimate of its mean Dice, if the run had validation cases, a flag with the reason
    if it is unlike the scans of the run, and of each class the volume, the agreement of both networks, and more.
    report.html shows the scans that need a look most.
    """

    checkpoint: Annotated[Path, arg(metavar="RUN|FILE")]
    """Folder of a run (for its last checkpoint), or a checkpoint file."""
    images: Annotated[tuple[Path, ...], arg(metavar="DIR|FILE")]
    """Folders of volumes (NIfTI, NRRD, MetaImage, subfolders with a DICOM series), files, or single DICOM series.
    Several channels as in training: files case_0000, case_0001 and so on, a folder for each channel, or 4D files."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Folder for the segmentations; created if it does not exist."""
    overwrite: bool = False
    """Replace files in --output that this command did not write, or wrote with another checkpoint or other settings."""
    largest_component: tuple[str, ...] = ()
    """Classes, by name or value, of which only the largest connected component is kept; all: every class."""
    probabilities: tuple[str, ...] = ()
    """Classes, by name or value, whose probability maps are written to probabilities/; all: every class."""
    uncertainty: bool = False
    """Write maps to uncertainty/: the entropy of the mean of both networks, and their mutual information, in nats."""
    disagreement: bool = False
    """Write maps to disagreement/: the share of the windows in which the networks predict different classes."""
    report: bool = True
    """Write report.html; --no-report saves the seconds that each of its scans takes."""
    dicom_seg: bool = False
    """For DICOM series: also write <case>.dcm, a DICOM segmentation. It names the patient, as the standard requires."""
    device: Device = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Precision = "auto"
    """Precision of the networks. auto: bf16 if the hardware multiplies it natively, else fp32."""
    windows: Windows = field(default_factory=Windows)


def predict(config: PredictConfig) -> None:
    """Segments every volume that has no segmentation yet.

    Raises:
        UserError: a flag is wrong, or a file would be replaced; nothing is written. Or some volumes could not be
            segmented; the others have been.
    """
    from sslfast.calibration import Calibration
    from sslfast.data.dicom_seg import check_series
    from sslfast.data.inputs import find_images
    from sslfast.inference import choose_device
    from sslfast.quality import summary
    from sslfast.report_page import PAGE, PICTURED, check_own
    from sslfast.reports import report_of_segmentations
    from sslfast.segmentations import check_output, segment_missing
    from sslfast.segmenter import Extras, check_windows, chosen_values
    from sslfast.training.checkpoint import checkpoint_file, load_model

    path = checkpoint_file(config.checkpoint)
    model = load_model(path)
    check_windows(model, config.windows)
    calibration = Calibration.read(path)
    extras = Extras(
        chosen_values("--largest-component", config.largest_component, model.classes, background=False),
        chosen_values("--probabilities", config.probabilities, model.classes),
        config.uncertainty,
        config.disagreement,
    )
    images = find_images(config.images, model.channels)
    if config.dicom_seg:
        check_series(images)
    check_output(config.output, images, config.images)
    page = config.output / PAGE
    check_own(page)
    rows, made, failed = segment_missing(
        model.to(choose_device(config.device)),
        path,
        images,
        config.output,
        config.precision,
        config.windows,
        extras=extras,
        calibration=calibration,
        dicom_seg=config.dicom_seg,
        overwrite=config.overwrite,
    )
    if config.report and rows and (made or not page.exists()):
        report_of_segmentations(config.output, config.images, page, PICTURED, model=model)
        print(page)
    if rows:
        print(summary([*rows.values()]))
        if calibration and (missing := calibration.without_estimates()):
            print(missing)
    if failed:
        raise failed


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(PredictConfig, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
