"""`python -m sslfast.prepare`: checks a dataset file by file and decodes it once, so that training starts at once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

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
    import numpy as np
    from nibabel.orientations import aff2axcodes
    from tqdm import tqdm

    from sslfast.atomic_io import cache_folder
    from sslfast.data.demo.cohorts import data_folder
    from sslfast.data.folder import open_dataset
    from sslfast.data.nifti import read_image, read_label
    from sslfast.data.public.conversion import convert
    from sslfast.data.volumes import decode

    if not config.data:
        raise UserError("name the dataset's folder: --data DIR (or demo)")
    folder = data_folder(config.data)
    if config.dataset == "folder":
        if config.split:
            raise UserError(f"--split {config.split} is for a public dataset; a folder's split is in its dataset.json")
    else:
        if config.output is None:
            raise UserError(f"--output DIR: where {config.dataset} is to be written is missing")
        found = convert(config.dataset, folder, config.output, config.split)
        folder = config.output
        print(f"{config.output}: {len(found.cases)} cases, split: {found.split}")
        for name, note in found.notes.items():
            print(f"  {name}: {note}")
        print(
            f"train with: python -m sslfast.train --data {config.output} --output runs/{config.dataset} {found.flags}\n"
        )
    dataset = open_dataset(folder)
    parts = {"training": dataset.training, "validation": dataset.validation, "test": dataset.test}
    num_classes = len(dataset.classes) if dataset.classes else 32
    faults: list[str] = []
    seen: dict[int, str] = {}
    axes: Counter[str] = Counter()
    lines = [f"{'case':<24} {'part':<11} {'shape':<17} {'axes':<4} {'spacing, mm':<17} labels"]
    for part, cases in parts.items():
        for case in tqdm(cases, desc=f"check {part}", unit="case", leave=False, disable=not cases):
            try:
                decode(case, config.preprocessing, num_classes=num_classes, ignore_label=config.ignore_label)
                image = read_image(case.image)
                labels = "unlabelled"
                if case.label:
                    label = read_label(case.label, num_classes=num_classes, ignore_label=config.ignore_label)
                    labels = " ".join(map(str, np.unique(label.array)))
            except UserError as error:
                faults.append(str(error))
                continue
            twin = seen.setdefault(hash(image.array.tobytes()), case.name)
            if twin != case.name:
                faults.append(
                    f"{case.image} is the same scan as case {twin!r}. Remove one, or it is in two parts of the split."
                )
            shape = "×".join(map(str, image.array.shape))
            towards = "".join(aff2axcodes(image.affine))
            axes[towards] += 1
            spacing = " ".join(f"{s:.3g}" for s in image.spacing)
            lines.append(f"{case.name:<24} {part:<11} {shape:<17} {towards:<4} {spacing:<17} {labels}")
    print("\n".join(lines))
    if len(axes) > 1:
        found_axes = ", ".join(f"{n} {code}" for code, n in axes.most_common())
        print(
            f"\nAxes differ ({found_axes}); each scan is turned by its own affine. A scan whose affine is wrong stays wrong."
        )
    labelled = sum(case.label is not None for case in dataset.training)
    print(
        f"\n{len(dataset.training)} training cases, {labelled} of them labelled; {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test. Decoded into {cache_folder() / 'volumes'}."
    )
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{count} in {dataset.root}:\n" + "\n".join(f"- {fault}" for fault in faults))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
