"""The settings of a training run: the flags of `sslfast train` and the content of config.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sslfast.cli import Suppress, arg
from sslfast.errors import UserError
from sslfast.methods import METHODS
from sslfast.options import (
    LAST,
    MIRROR,
    PATCH,
    PATCH_SIZES,
    Augment,
    Device,
    LabelOptions,
    MethodOptions,
    MirrorAxis,
    NetworkOptions,
    Precision,
    Preprocessing,
)
from sslfast.ranges import COUNT, Range, check_ranges

CONFIG = "config.yaml"
METHOD_HELP = "Training method, or module:Class for one of your own.\n" + "\n".join(
    f"{name}: {entry.summary}" for name, entry in METHODS.items()
)
LARGEST_PATCH = 2**30  # voxels
DECIDED = {"spacing", "intensity", "patch", "depth", "width", "steps"}
"""Flags that leave nothing to a plan once all are given."""
PLANNED = DECIDED | {"window", "pooling", "dropout", "learning_rate", "mirror", "augment", "memory_budget"}
"""Flags that the data and the machine decide if they are left open."""


@dataclass(frozen=True)
class TrainConfig:
    """Train two different 3D networks on a few labelled and many unlabelled volumes.

    A first run, minutes on a CPU, with a cohort made from one heart CT that is downloaded once:
        python -m sslfast.train --data demo --output runs/demo --labeled 4 --baseline --hours 0.1

    On your own data, DIR/images/*.nii.gz and DIR/labels/*.nii.gz; a volume without a label map is unlabelled:
        python -m sslfast.train --data DIR --output runs/mine

    The data and the machine decide what the flags leave open: spacing, intensity, patch, depth, pooling, width, steps.
    The choices and their reasons are printed first; `python -m sslfast.plan` writes them to a file, for changes.

    On 4 GPUs, with --labeled-batch and --unlabeled-batch patches on each; add --nnodes for several machines:
        torchrun --nproc-per-node=4 --max-restarts=3 -m sslfast.train --data DIR --output runs/mine

    The output folder holds:
        config.yaml           every setting; --config repeats the run
        cases.json            which volumes it is trained on
        checkpoint_last.pt    and, with validation cases, checkpoint_best.pt
        curves.png            the training curves, also in log.csv and tensorboard/
        test/, overlays.png   segmentations, metrics and pictures of the test cases, if there are any

    To list the options of a method as well: --method NAME --help
    """

    data: Annotated[str, arg(aliases=("--root-path",), metavar="DIR|demo|demo-brain")]
    """A dataset folder, or a demo cohort: demo (heart CT) or demo-brain (MR-like, 3 structures).
    demo-tuning and demo-brain-tuning have other test cases, for choosing settings."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Folder of this run; created if it does not exist."""
    method: Annotated[str, arg(metavar="NAME|module:Class", help=METHOD_HELP)] = "ssl-contrastive"
    steps: Annotated[int, arg(aliases=("--max-iterations",)), Range(1, COUNT)] = 6000
    """Number of training steps."""
    labeled: Annotated[int | None, arg(aliases=("--labeled-num",)), Range(1, COUNT)] = None
    """Use only the first N labelled cases; the others count as unlabelled. None: all."""
    validation: Annotated[int, Range(0, COUNT)] = 0
    """Labelled cases to hold out for validation if the dataset names none."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1337
    """Seed of the weights, patches, dropout and voxel samples."""
    device: Device = "auto"
    """auto: the GPU if there is one, else the CPU."""
    precision: Precision = "auto"
    """Precision of the networks; the losses are computed in float32.
    auto: bf16 if the hardware multiplies it natively, else fp32."""
    compile: bool = False
    """Compile the networks with torch.compile: the first step takes minutes, later steps may be faster."""
    streams: bool = False
    """On one GPU: run each network on its own CUDA stream (no gain on an H200, where the host was the limit)."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint. The result is bit-identical to an uninterrupted
    run. Ctrl-C and SIGTERM write that checkpoint before they end a run."""
    plan: bool = True
    """Choose spacing, patch, depth and what else is left open by the data and the machine, and print why.
    --no-plan: the defaults that are listed here."""
    hours: Annotated[float | None, Range(above=0, most=10**6)] = None
    """Time that the run may take on this machine: the plan then chooses --steps. None: no limit."""
    init_from: Annotated[Path | None, arg(metavar="RUN|FILE")] = None
    """Begin with the weights of a run, or of a file that torch.save(network.state_dict(), FILE) wrote.
    Each network takes those whose name and shape fit; the rest stay random, and how much fitted is printed.
    None: all are random. A run that is resumed goes on with its own."""
    baseline: bool = False
    """Also train `supervised` on the same labels (in OUTPUT/supervised) and print both results."""
    patch: Annotated[tuple[int, int, int], PATCH_SIZES] = PATCH
    """Voxels of a training patch and of the sliding window. Each axis must be a multiple of 2^(depth-1), or of 2 for
    each stage that halves it with --pooling."""
    labeled_batch: Annotated[int, arg(aliases=("--labeled-bs",)), Range(1, 4096)] = 2
    """Labelled patches per step and process."""
    unlabeled_batch: Annotated[int, Range(0, 4096)] = 2
    """Unlabelled patches per step and process."""
    memory_budget: Annotated[float | None, Range(above=0, most=10**6)] = None
    """Memory in GB that a training step of one process may take, weights included.
    If it takes more, the run turns on --checkpointing, then shrinks batches, then patches.
    The changed settings are printed and written to config.yaml."""
    foreground: Annotated[float, Range(0, 1)] = 0.5
    """Fraction of the labelled patches that are centred on a foreground voxel. Its class is drawn first, so small
    structures are seen as often as large ones."""
    augment: Augment = "no-flip"
    """flip: mirror along the axes of --mirror.
    intensity: change contrast, scale and offset, add noise.
    affine: rotate and zoom some volumes; unlabelled ones only if the method does not do so itself (--views).
    all: these three. no-flip: intensity and affine."""
    mirror: tuple[MirrorAxis, ...] = MIRROR
    """Axes of --augment flip and all. Left to right, classes whose names differ by left and right are exchanged.
    If one of them has no counterpart, nothing is mirrored from left to right."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer; sgd has momentum 0.9."""
    learning_rate: Annotated[float, arg(aliases=("--base-lr",)), Range(above=0, most=1e300)] = 1e-3
    """Initial learning rate; it falls to 0 as (1 - step / steps)^0.9."""
    weight_decay: Annotated[float, Range(0, 100)] = 1e-4
    """Weight decay of the optimizer."""
    validate_every: Annotated[int, Range(1, COUNT)] = 200
    """Steps between validations; the checkpoint with the best Dice is kept."""
    save_every: Annotated[int, Range(1, COUNT)] = 200
    """Steps between checkpoints."""
    save_minutes: Annotated[float, Range(above=0, most=10**6)] = 10.0
    """Minutes between checkpoints: one is written as soon as either has passed."""
    log_every: Annotated[int, Range(1, COUNT)] = 10
    """Steps between rows of log.csv and points of the TensorBoard curves."""
    workers: Annotated[int, Range(0, 256)] = 0
    """Processes that load patches. 0: the training process loads them itself."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: LabelOptions = field(default_factory=LabelOptions)
    networks: NetworkOptions = field(default_factory=NetworkOptions)
    options: Suppress[MethodOptions | None] = None
    """Options of the method; None: its defaults."""
    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """A YAML file of `flag: value` lines, such as the config.yaml of an earlier run.
    Flags on the command line take precedence."""

    @property
    def resumes(self) -> bool:
        """True if the run goes on from a checkpoint, which holds its weights."""
        return self.resume and (self.output / LAST).exists()

    def check(self) -> None:
        """Checks everything that can be checked before the data is read.

        Raises:
            UserError: names the flag, its value and the remedy.
        """
        check_ranges(self)
        self.networks.check()
        if self.init_from is not None and not (self.resume or self.init_from.exists()):
            raise UserError(f"--init-from {self.init_from}: there is no such folder or file; correct the path")
        factors = self.networks.factors
        axes = [*zip(self.patch, factors, strict=True)]
        if any(size % factor for size, factor in axes):
            fitting = " ".join(str(max(factor, round(size / factor) * factor)) for size, factor in axes)
            by = f"--depth {self.networks.depth}" + (" and this --pooling" if self.networks.pooling else "")
            several = f"multiples of {' '.join(map(str, factors))}"
            wanted = (
                f"each axis must be a multiple of {factors[0]}"
                if len({*factors}) == 1
                else f"its axes must be {several}"
            )
            raise UserError(f"--patch {' '.join(map(str, self.patch))}: with {by} {wanted}, such as --patch {fitting}")
        if math.prod(self.patch) > LARGEST_PATCH:
            raise UserError(
                f"--patch {' '.join(map(str, self.patch))}: it has {math.prod(self.patch):.2g} voxels; networks take "
                f"at most {LARGEST_PATCH:.2g}, and few machines as many"
            )
        if self.patch == factors:
            raise UserError(
                f"--patch {' '.join(map(str, self.patch))} with --depth {self.networks.depth}: normalisation would "
                "make 0 of the one voxel that is left at the last stage; use a larger patch or a smaller --depth"
            )
        if self.compile and self.networks.checkpointing:
            raise UserError(
                "--compile with --checkpointing: torch.compile chooses by itself what it recomputes; remove one of them"
            )
