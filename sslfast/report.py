"""`python -m sslfast.report`: one HTML page about a run or a folder of segmentations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslfast.cli import Positional, arg, run_command
from sslfast.errors import UserError
from sslfast.ranges import Range


@dataclass(frozen=True)
class ReportConfig:
    """Write a page with a table of the cases and three planes of those that need a look most.

    For example:
        python -m sslfast.report runs/mine
        python -m sslfast.report segmentations/ --images new/ --checkpoint runs/mine

    The page is one file that needs no network: open it in a browser. It shows the image, the segmentation, the
    reference where there is one, and where the networks disagree, if `predict --disagreement` wrote that. Flagged
    cases and those of the lowest Dice, estimated Dice or agreement come first. `train` and `predict` write such a page
    at their end.

    The page holds pictures of the scans. Whoever has it has them.
    """

    folder: Annotated[Path, Positional, arg(metavar="RUN|DIR")]
    """Folder of a run, or of segmentations."""
    images: Annotated[tuple[Path, ...], arg(metavar="DIR|FILE")] = ()
    """The volumes of a folder of segmentations, as for `predict`. A run knows its own."""
    labels: Annotated[Path | None, arg(metavar="DIR")] = None
    """Reference label maps of these volumes, if there are any."""
    checkpoint: Annotated[Path | None, arg(metavar="RUN|FILE")] = None
    """What made the segmentations, for the names of the classes and of the channels."""
    output: Annotated[Path | None, arg(metavar="FILE")] = None
    """The page. None: report.html in the folder."""
    cases: Annotated[int, Range(1, 10000)] = 24
    """Number of cases with pictures. A case takes about half a megabyte."""


def report(config: ReportConfig) -> None:
    """Writes the page and prints its path.

    Raises:
        UserError: there is no segmentation, a file cannot be read, or `--output` is another file.
    """
    from sslfast.reports import report_of_run, report_of_segmentations
    from sslfast.training.checkpoint import load_model
    from sslfast.training.config import CONFIG

    output = config.output or config.folder / "report.html"
    if (config.folder / CONFIG).exists():
        if config.images or config.labels or config.checkpoint:
            raise UserError(f"{config.folder} is a run, which knows its volumes; leave out --images and the like")
        print(report_of_run(config.folder, output, config.cases))
        return
    if not config.images:
        raise UserError(f"{config.folder} is no run, for it has no {CONFIG}; add --images DIR, what was segmented")
    print(
        report_of_segmentations(
            config.folder,
            config.images,
            output,
            config.cases,
            labels=config.labels,
            model=None if config.checkpoint is None else load_model(config.checkpoint),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(ReportConfig, report, argv)


if __name__ == "__main__":
    sys.exit(main())
