"""`python -m sslfast.prepare`: checks a dataset file by file and decodes it once, so that training starts at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sslfast.atomic_io import cache_folder
from sslfast.cli import Positional, arg, run_command
from sslfast.errors import UserError
from sslfast.options import Preprocessing


@dataclass(frozen=True)
class PrepareConfig:
    """Check a dataset, file by file, and decode it into the cache; public ones are first written as such a folder.

        python -m sslfast.prepare --data DIR --spacing 1.5
        python -m sslfast.prepare la --source DOWNLOADED --output DIR

    la: LA 2018 (h5 or NRRD). pancreas: NIH Pancreas-CT (h5, DICOM or NIfTI). brats: BraTS 2019, whole tumour. nnunet: an
    nnU-Net v2 raw dataset. A Medical Segmentation Decathlon task and plain folders need no conversion: name them by --data.
    The first cases of the split's training list are the ones that `--labeled` takes, as in the papers.

    Every scan and label map is opened: what cannot be read, does not fit or holds wrong labels is listed at the end, all
    of it, with what to do. `--data demo` fetches the demo's scan and writes its cohort.
    """

    dataset: Annotated[Literal["folder", "la", "pancreas", "brats", "nnunet"], Positional] = "folder"
    """What lies in --data: a folder as the trainer reads it, or a public dataset as it is handed out."""
    data: Annotated[str, arg(aliases=("--source",), metavar="DIR|demo|demo-brain")] = ""
    """The dataset's folder, or a cohort made on the spot: demo or demo-brain."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where a public dataset is written as images/, labels/ and dataset.json."""
    split: str | None = None
    """A published split: ua-mt (la), mc-net or bcp (pancreas), ssl4mis (brats). Default: train.list, val.list and test.list where
    they lie beside the data; else the first of these whose cases are all there; else every case is for training."""
    ignore_label: int = -1
    """Number that label maps use for voxels that nobody annotated."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


def prepare(config: PrepareConfig) -> None:
    """Prints a line a case and what the dataset holds; raises a UserError that lists every fault."""
    from sslfast.data.demo.cohorts import data_folder  # torch and nibabel, which --help does not wait for
    from sslfast.data.folder import open_dataset
    from sslfast.data.inspection import inspect
    from sslfast.data.public.conversion import convert

    if not config.data:
        raise UserError("name the dataset's folder: --data DIR (or demo)")
    folder = data_folder(config.data)
    if config.dataset == "folder":
        if config.split:
            raise UserError(f"--split {config.split} is for a public dataset; a folder's split is in its dataset.json")
    else:
        if config.output is None:
            raise UserError(f"--output DIR is missing: the folder to write {config.dataset} to")
        source = convert(config.dataset, folder, config.output, config.split)
        folder = config.output
        print(f"{folder}: {len(source.cases)} cases, split: {source.split}")
        for name, note in source.notes.items():
            print(f"  {name}: {note}")
        print(f"train with: python -m sslfast.train --data {folder} --output runs/{config.dataset} {source.flags}\n")
    dataset = open_dataset(folder)
    inspection = inspect(dataset, config.preprocessing, config.ignore_label)
    print("\n".join(inspection.lines))
    if len(inspection.axes) > 1:
        axes = ", ".join(f"{n} {code}" for code, n in inspection.axes.most_common())
        print(
            f"\nAxes differ ({axes}); each scan is reoriented by its own affine. A scan whose affine is wrong stays wrong."
        )
    labelled = sum(case.label is not None for case in dataset.training)
    print(
        f"\n{len(dataset.training)} training cases, {labelled} of them labelled; {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test. Decoded into {cache_folder() / 'volumes'}."
    )
    if inspection.faults:
        count = "1 fault" if len(inspection.faults) == 1 else f"{len(inspection.faults)} faults"
        raise UserError(f"{count} in {dataset.root}:\n" + "\n".join(f"- {fault}" for fault in inspection.faults))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
