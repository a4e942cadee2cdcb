"""`python -m sslfast.rank`: which unlabelled scans to label next."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslfast.cli import Positional, arg, run_command
from sslfast.errors import UserError
from sslfast.options import Device, Precision
from sslfast.ranges import Range


@dataclass(frozen=True)
class RankConfig:
    """Rank the unlabelled scans of a run by what their labels would teach the networks.

    For example:
        python -m sslfast.rank runs/mine --count 4

    Scans on which the two networks agree least come first, class after class, with some chance, so that not all are
    hard for the same reason. The first --count are printed, and all are in rank.csv, in the folder of the
    segmentations, which the command makes first: correct them instead of drawing new labels. If the command is stopped,
    the same command continues where it was. Then label, and train anew.
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of a run."""
    images: Annotated[tuple[Path, ...], arg(metavar="DIR|FILE")] = ()
    """The scans to choose from, as for `predict`. None: the unlabelled scans of the run."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for the segmentations and rank.csv. None: unlabelled/ in the folder of the run."""
    count: Annotated[int, Range(1, 10**6)] = 10
    """Number of scans to print."""
    beta: Annotated[float | None, Range(0, 10**6)] = None
    """How much the agreement counts against chance; 0: a random order.
    None: the number of labelled scans of the run."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seed of the random draw."""
    overwrite: bool = False
    """Replace segmentations in --output of another checkpoint."""
    device: Device = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Precision = "auto"
    """Precision of the networks. auto: bf16 if the hardware multiplies it natively, else fp32."""


def rank(config: RankConfig) -> None:
    """Segments what has no segmentation yet, writes rank.csv and prints its beginning.

    Raises:
        UserError: there is no run, or nothing to rank; a file would be replaced; or some scans could not be segmented:
            the others are ranked.
    """
    from sslfast.calibration import Calibration
    from sslfast.data.inputs import find_images
    from sslfast.inference import choose_device
    from sslfast.ranking import check_table, rank_scans, write_ranking
    from sslfast.segmentations import check_output, segment_missing
    from sslfast.training.checkpoint import checkpoint_file, load_model
    from sslfast.training.run_folder import cases_at_start, cases_of_run

    at_start = cases_at_start(config.run)
    beta = config.beta
    if beta is None:
        if at_start is None:
            raise UserError(
                f"{config.run} does not say how many scans were labelled; give the folder of a run, or --beta"
            )
        beta = len(at_start["labelled"])
    path = checkpoint_file(config.run)
    model = load_model(path)
    calibration = Calibration.read(path)
    images: Mapping[str, Sequence[Path]]
    labels: set[Path] = set()
    if config.images:
        images = find_images(config.images, model.channels)
    else:
        dataset, split = cases_of_run(config.run)
        labels = {case.label.parent for case in dataset.training if case.label}
        seen = {name for part in ("labelled", "validation") for name in (at_start or {}).get(part, ())}
        images = {case.name: case.images for case in split.unlabelled if case.name not in seen}
    if not images:
        raise UserError(f"{config.run} has no unlabelled scan; give --images DIR, other scans")
    output = config.output or config.run / "unlabelled"
    check_output(output, images, (*config.images, *labels))
    check_table(output)
    rows, _, failed = segment_missing(
        model.to(choose_device(config.device)),
        path,
        images,
        output,
        config.precision,
        calibration=calibration,
        overwrite=config.overwrite,
    )
    names = [*model.classes.values()][1:]
    ranked = rank_scans(rows, names, beta, config.seed, calibration.always_there() if calibration else ())
    print(write_ranking(ranked, images, output))
    for number, (case, name, agreement) in enumerate(ranked[: config.count], 1):
        found = f"the networks agree to {agreement:.2f} on" if agreement == agreement else "neither network finds"
        print(f"{number:>4}  {case}: {found} {name}")
    if failed:
        raise failed


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(RankConfig, rank, argv)


if __name__ == "__main__":
    sys.exit(main())
