"""`python -m sslfast.export`: the networks of a run as files that run without sslfast."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from sslfast.cli import Positional, arg, run_command

if TYPE_CHECKING:
    from sslfast.exported import Chosen


@dataclass(frozen=True)
class ExportConfig:
    """Write the networks as TorchScript or ONNX, with a description of what to do before and after them, or as a
    MONAI bundle, which does it.

    For example:
        python -m sslfast.export runs/mine --format onnx --output exported/

    The folder then holds the model, which gives class probabilities of patches; metadata.json with classes, patch,
    spacing and intensities; and README.md, which says how to segment a whole volume. The file is compared with the
    networks before the command ends.

    The MONAI bundle of both networks segments as predict --precision fp32 does; its docs/README.md has the command.
    """

    checkpoint: Annotated[Path, Positional, arg(metavar="RUN|FILE")]
    """Folder of a run (for its last checkpoint), or a checkpoint file."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Folder for the files; created if it does not exist."""
    format: Literal["torchscript", "onnx", "bundle"] = "torchscript"
    """torchscript: model.ts, for PyTorch in Python and C++. onnx: model.onnx; needs pip install 'sslfast[onnx]'.
    bundle: a MONAI bundle."""
    networks: Literal["both", "a", "b"] = "both"
    """both: the mean of their probabilities, as predict. a or b: one network, half of the time and size."""


def export(config: ExportConfig) -> None:
    """Writes the files and prints the model's path, or the folder of the bundle."""
    from sslfast.training.checkpoint import load_model

    model = load_model(config.checkpoint)
    chosen: Chosen = config.networks
    if config.format == "bundle":
        from sslfast.bundle import export_bundle  # here, so that others do not wait for all of MONAI

        print(export_bundle(model, config.output, chosen))
    else:
        from sslfast.exported import export_model

        print(export_model(model, config.output, config.format, chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(ExportConfig, export, argv)


if __name__ == "__main__":
    sys.exit(main())
