"""`python -m sslfast.plan`: chooses the settings of a run by its data and this machine, and says why."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from sslfast.cli import arg, flatten, given_names, run_command
from sslfast.options import Device, LabelOptions, NetworkOptions, Precision, Preprocessing
from sslfast.ranges import COUNT, Range
from sslfast.training.config import PLANNED, TrainConfig


@dataclass(frozen=True)
class PlanConfig:
    """Choose the settings of a run by its data and this machine, each with the reason in a sentence.

    For example, and then train:
        python -m sslfast.plan --data DIR --output plan.yaml
        python -m sslfast.train --config plan.yaml --output runs/mine

    The headers of all volumes and the voxels of some, labelled and unlabelled, decide; two small training steps are
    timed. Flags that you give are kept, and the others chosen to fit them. `train` makes the same plan by itself for
    the flags that are left open, and prints it.
    """

    data: Annotated[str, arg(metavar="DIR|demo|demo-brain")]
    """A dataset folder, or a demo cohort."""
    output: Annotated[Path, arg(metavar="FILE")] = Path("plan.yaml")
    """The config file to write. A line that you change in it is kept by `train`."""
    method: Annotated[str, arg(metavar="NAME|module:Class")] = TrainConfig.method
    """Training method."""
    hours: Annotated[float | None, Range(above=0, most=10**6)] = None
    """Time that the run may take, on this machine. None: no limit."""
    labeled: Annotated[int | None, Range(1, COUNT)] = None
    """Use only the first N labelled cases; the others count as unlabelled. None: all."""
    validation: Annotated[int, Range(0, COUNT)] = 0
    """Labelled cases to hold out for validation if the dataset names none."""
    device: Device = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Precision = "auto"
    """Precision of the networks. auto: bf16 if the hardware multiplies it natively, else fp32."""
    patch: Annotated[tuple[int, int, int] | None, Range(1, 4096)] = None
    """Voxels of a training patch. None: chosen."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: LabelOptions = field(default_factory=LabelOptions)
    networks: NetworkOptions = field(default_factory=NetworkOptions)


def plan(config: PlanConfig, given: set[str]) -> None:
    """Prints the plan and writes it, with the flags that were given."""
    from sslfast.training.plan import make_plan, settled  # here, so that --help does not wait for torch

    own: dict[str, Any] = {one.name: getattr(config, one.name) for one in fields(config) if one.name != "output"}
    if config.patch is None:
        del own["patch"]
        given = given - {"patch"}
    settings = TrainConfig(output=Path(), **own)
    made = make_plan(settings, given)
    values = flatten(settled(settings, made))
    kept = [name for name in values if name in {"data", *PLANNED, *given} - {"output", "hours"}]
    made.write(config.output, {name: values[name] for name in kept})
    print(made)
    print(f"\n{config.output}\nTrain with: python -m sslfast.train --config {config.output} --output RUN")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(PlanConfig, lambda config: plan(config, given_names(arguments, TrainConfig)), argv)


if __name__ == "__main__":
    sys.exit(main())
