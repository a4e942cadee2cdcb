"""`python -m sslfast.train`: trains the two networks, tests them and draws what came out."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sslfast.cli import flatten, read_config, run_command, write_config
from sslfast.errors import UserError
from sslfast.files import make_folder
from sslfast.options import (
    BEST,
    LAST,
    Augment,
    Device,
    MethodName,
    MethodOptions,
    NetworkOptions,
    Precision,
    Preprocessing,
)

if TYPE_CHECKING:
    import torch

    from sslfast.data.folder import Dataset
    from sslfast.data.patches import Batch
    from sslfast.data.volumes import DecodedCase
    from sslfast.evaluate import Evaluation
    from sslfast.ops.ranks import Ranks
    from sslfast.streams import SideBySide

CONFIG = "config.yaml"
RESUME_MAY_CHANGE = {"output", "device", "workers", "save_every", "baseline"}


@dataclass(frozen=True)
class TrainConfig:
    """Train two different 3D networks on a few labelled and many unlabelled volumes.

    A first run, minutes on a CPU, on a cohort made from one heart CT that is fetched once:
        python -m sslfast.train --data demo --output runs/demo --labeled 4 --baseline --steps 400 --spacing 5
            --patch 32 32 32 --depth 4 --norm instance --dropout 0.1 --augment none --learning-rate 0.002

    On several GPUs, with these settings for each of them (and --nnodes for several machines):
        torchrun --nproc-per-node=4 --max-restarts=3 -m sslfast.train --data DIR --output runs/mine

    On your own scans, DIR/images/*.nii.gz and DIR/labels/*.nii.gz, where a scan without a label is unlabelled:
        python -m sslfast.train --data DIR --output runs/mine --patch 96 96 96

    The run's folder holds its full configuration (config.yaml), the last and the validation-best checkpoint, the curves
    (log.csv, curves.png, tensorboard/), and with test cases their segmentations, metrics and overlays.
    """

    data: Annotated[str, tyro.conf.arg(aliases=("--root-path",), metavar="DIR|demo|demo-brain")]
    """A dataset folder, or a cohort made on the spot: demo (heart CT) or demo-brain (MR-like, 3 structures); with -tuning behind it,
    other test cases, to choose settings by."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of this run; made if need be."""
    method: MethodName | str = "ssl-contrastive"
    """What a training step computes; module:Class for one of your own. supervised: labelled volumes only. as-released: the published code's behaviour.
    dual-networks (arXiv 2505.17690), mcf (CVPR 2023), cps (CVPR 2021), mean-teacher (NeurIPS 2017), ua-mt (MICCAI 2019),
    u2pl (CVPR 2022) and bcp (CVPR 2023) are published relatives."""
    steps: Annotated[int, tyro.conf.arg(aliases=("--max-iterations",))] = 6000
    """Training steps."""
    labeled: Annotated[int | None, tyro.conf.arg(aliases=("--labeled-num",))] = None
    """Use the labels of the first so many labelled cases; the other cases count as unlabelled. None: all."""
    validation: int = 0
    """Labelled cases to keep apart for validation, where the dataset names none."""
    seed: int = 1337
    """Of the weights, the patches, the dropout and the voxel samples."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    precision: Precision = "auto"
    """Of the networks; the losses are computed in float32. auto: bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """torch.compile the networks: minutes at the first step, then less time a step where convolutions do not take all of it."""
    streams: bool = False
    """On one GPU: each network on a CUDA stream of its own, so that their passes may overlap."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder, to the same weights as if the run had never stopped."""
    baseline: bool = False
    """Also train `supervised` on the same labels (in OUTPUT/supervised) and print both results."""
    patch: tuple[int, int, int] = (112, 112, 80)
    """Voxels of a training patch and of the sliding window; a multiple of 2^(depth-1) along each axis."""
    labeled_batch: Annotated[int, tyro.conf.arg(aliases=("--labeled-bs",))] = 2
    """Labelled patches in a step, of each process."""
    unlabeled_batch: int = 2
    """Unlabelled patches in a step, of each process."""
    memory_budget: float | None = None
    """GB that a training step of a process may take, weights included. Where these settings take more: --checkpointing, then
    smaller batches, then smaller patches; what was chosen is printed and written to config.yaml."""
    foreground: float = 0.5
    """Share of the labelled patches that are centred on a foreground voxel."""
    augment: Augment = "all"
    """flip: mirrored along each axis, where left and right may change places (for a heart they may not). intensity:
    contrast, scale, shift and noise. affine: some rotated and zoomed, as far as --views; of
    ssl-contrastive with views the labelled ones alone. all: these three."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=("--base-lr",))] = 1e-3
    """At the first step; it falls to 0 as (1 - step / steps)^0.9."""
    weight_decay: float = 1e-4
    """Of the optimizer."""
    ignore_label: int = -1
    """Number that label maps use for voxels that nobody annotated."""
    validate_every: int = 200
    """Steps between validations; the best one's checkpoint is kept. A run without validation cases has none."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between rows of log.csv and points of the TensorBoard curves."""
    workers: int = 0
    """Processes that assemble patches; 0: the training process itself."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    networks: NetworkOptions = field(default_factory=NetworkOptions)
    options: MethodOptions = field(default_factory=MethodOptions)
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A YAML file of `flag: value` lines, such as the config.yaml of an earlier run; flags on the command line win."""


def train(config: TrainConfig) -> None:
    """Runs what the flags say, from the data to the pictures, and prints what came out."""
    from sslfast.distributed import processes, was_restarted
    from sslfast.inference import choose_device

    _check(config)
    with processes(choose_device(config.device)) as (ranks, device):
        if was_restarted(ranks, device):
            config = replace(config, resume=True)
        results = {config.method: _run(config, ranks, device)}
        if config.baseline and config.method != "supervised":
            supervised = replace(config, method="supervised", output=config.output / "supervised")
            results["supervised"] = _run(supervised, ranks, device)
        if ranks.rank == 0:
            _print_results(results)


@dataclass(frozen=True)
class RunResult:
    """Where a run's pictures are, and its results on the test cases, if the dataset has any, by the checkpoint tested."""

    pictures: list[Path]
    evaluations: dict[str, Evaluation]
    labelled: int
    unlabelled: int


def _run(config: TrainConfig, ranks: Ranks, device: torch.device) -> RunResult:
    import torch

    from sslfast.checkpoint import load_checkpoint
    from sslfast.data.demo import data_folder
    from sslfast.data.folder import open_dataset, split_training
    from sslfast.data.volumes import count_classes
    from sslfast.distributed import first_process_first
    from sslfast.inference import autocast_dtype
    from sslfast.memory import fit
    from sslfast.methods import find_method
    from sslfast.pictures import draw_curves, draw_overlays

    if config.streams and (device.type != "cuda" or ranks.size > 1):
        raise UserError("--streams is for one process with a GPU; leave it out")
    with first_process_first(ranks):
        dataset = open_dataset(data_folder(config.data))
    split = split_training(dataset, config.labeled, config.validation)
    classes = dataset.classes or dict(
        enumerate(["background", *(f"class {c}" for c in range(1, count_classes(split.labelled, config.ignore_label)))])
    )
    try:
        find_method(config.method)(len(classes), config.steps, config.seed, config.options)
    except ValueError as error:  # before the output folder is made
        raise UserError(f"--method {config.method} cannot be so: {error}") from error
    volumes = len(split.labelled) + len(split.unlabelled)
    if ranks.size > volumes:
        raise UserError(f"{ranks.size} processes train on {volumes} volumes; start no more than {volumes}")
    config, changed = fit(config, len(classes), autocast_dtype(config.precision, device))
    if changed and ranks.rank == 0:
        print(changed)
    torch.manual_seed(config.seed)
    with first_process_first(ranks):
        if ranks.rank == 0:
            _start_folder(config)
        training = _decode(config, (*split.labelled, *split.unlabelled), len(classes), "decode")
        validation = _decode(config, split.validation, len(classes), "decode validation")
        if ranks.rank == 0:
            write_config(config, config.output / CONFIG)

    trainer = Trainer(config, classes, training, len(split.labelled), validation, device, ranks)
    trainer.run()
    if ranks.rank > 0:
        return RunResult([], {}, len(split.labelled), len(split.unlabelled))
    pictures = [draw_curves(config.output / "log.csv", config.output / "curves.png", config.method)]
    evaluations = {}
    if dataset.test:
        evaluations["last step"] = _test(config, dataset, classes, LAST, config.output / "test", device)
        pictures.append(
            draw_overlays(
                dataset.test, config.output / "test", config.output / "overlays.png", evaluations["last step"]
            )
        )
        if validation and load_checkpoint(config.output / BEST)["step"] == config.steps:  # the same weights
            shutil.copytree(config.output / "test", config.output / "test_best", dirs_exist_ok=True)
            evaluations["validation-best"] = evaluations["last step"]
        elif validation:
            evaluations["validation-best"] = _test(config, dataset, classes, BEST, config.output / "test_best", device)
    return RunResult(pictures, evaluations, len(split.labelled), len(split.unlabelled))


def _test(
    config: TrainConfig, dataset: Dataset, classes: dict[int, str], checkpoint: str, folder: Path, device: torch.device
) -> Evaluation:
    """Segments the test cases into the folder and writes their metrics beside them."""
    from sslfast.checkpoint import load_model
    from sslfast.evaluate import evaluate_folder
    from sslfast.predict import predict_cases

    model = load_model(config.output / checkpoint).to(device)
    predict_cases(model, {case.name: case.image for case in dataset.test}, folder, config.precision)
    labels = {case.name: case.label for case in dataset.test if case.label}
    evaluation = evaluate_folder(folder, labels, classes=classes, ignore_label=config.ignore_label)
    evaluation.write(folder)
    return evaluation


class Trainer:
    """The training loop: one batch, one method step, one optimizer step; checkpoints, validation and curves between."""

    def __init__(
        self,
        config: TrainConfig,
        classes: dict[int, str],
        cases: list[DecodedCase],
        labelled: int,
        validation: list[DecodedCase],
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """The first `labelled` of `cases` are labelled; `ranks`: the processes that train together."""
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from sslfast.checkpoint import Model
        from sslfast.inference import autocast_dtype
        from sslfast.methods import find_method
        from sslfast.networks import build_networks
        from sslfast.ops.ranks import ALONE
        from sslfast.streams import SideBySide

        self.config = config
        self.ranks = ranks or ALONE
        self.cases = cases
        self.labelled = labelled
        self.validation = validation
        self.device = device
        self.autocast_dtype = autocast_dtype(config.precision, device)
        networks = build_networks(config.networks, len(classes))
        self.model = Model(config.networks, config.preprocessing, classes, config.patch, *networks).to(device)
        network: Any  # torch's stubs lack the argument
        for network in networks:
            network.to(memory_format=torch.channels_last_3d)  # a quarter less time a step on CPUs with AVX-512
            if config.compile:
                network.compile()
        self.method = find_method(config.method)(len(classes), config.steps, config.seed, config.options)
        self.method.count_as_one(self.ranks)
        self.method.prepare(*networks)
        self.method.to(device)
        parameters = [p for part in (*networks, self.method) for p in part.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(
                parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
        else:
            self.optimizer = torch.optim.SGD(
                parameters, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
            )
        self.networks: tuple[torch.nn.Module, torch.nn.Module] = networks
        if self.ranks.size > 1:
            self.networks = DistributedDataParallel(networks[0]), DistributedDataParallel(networks[1])
        self.side_by_side: SideBySide | None = None
        if config.streams:
            self.side_by_side = SideBySide(*networks)
            self.networks = self.side_by_side.networks
        self.first_step = 0
        self.best_dice = -math.inf
        if config.resume and (config.output / LAST).exists():
            self._load(config.output / LAST)

    def run(self) -> None:
        """Trains from the first step to the last.

        Raises:
            UserError: the loss is NaN or infinite; the message names the step and the volumes.
        """
        from tqdm import tqdm

        from sslfast.log import TrainingLog

        config = self.config
        progress = tqdm(
            total=config.steps,
            initial=self.first_step,
            desc=config.method,
            unit="step",
            smoothing=0.05,
            mininterval=0.5,
            disable=self.ranks.rank > 0,
        )
        logged = TrainingLog(config.output, self.first_step) if self.ranks.rank == 0 else contextlib.nullcontext()
        with progress, logged as log:
            for step, batch in enumerate(self._loader(), self.first_step):
                row = self._step(step, batch, log_row=step % config.log_every == 0 or step == config.steps - 1)
                progress.update()
                done = step + 1
                if row:
                    progress.set_postfix_str(_summary(row))
                if self.validation and (done % config.validate_every == 0 or done == config.steps):
                    dice = self._validate()
                    row = {**(row or {}), "validation_dice": dice}
                    if dice > self.best_dice:
                        self.best_dice = dice
                        self._save(config.output / BEST, done)
                if row and log:
                    log.write(step, row)
                if done % config.save_every == 0 or done == config.steps:
                    self._save(config.output / LAST, done)

    def _loader(self) -> Any:
        from sslfast.data.patches import PatchDataset, TwoStreamSampler, patch_loader

        config = self.config
        unlabelled = config.unlabeled_batch if self.method.uses_unlabelled and len(self.cases) > self.labelled else 0
        sampler = TwoStreamSampler(
            self.labelled,
            len(self.cases) - self.labelled,
            config.labeled_batch,
            unlabelled,
            config.seed,
            self.first_step,
            config.steps,
            self.ranks.rank,
            self.ranks.size,
        )
        dataset = PatchDataset(
            self.cases,
            config.patch,
            augment=config.augment,
            foreground=config.foreground,
            turn_unlabelled=not self.method.turns_unlabelled,
        )
        return patch_loader(dataset, sampler, config.workers, pin_memory=self.device.type == "cuda")

    def _step(self, step: int, batch: Batch, log_row: bool) -> dict[str, float] | None:
        import torch

        config = self.config
        started = time.perf_counter()
        torch.manual_seed(
            _seed_of_step(config.seed, step, self.ranks.rank)
        )  # a resumed run drops out the same channels
        rate = config.learning_rate * (1 - step / config.steps) ** 0.9
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.network_a.train()
        self.model.network_b.train()
        self.method.train()
        images = batch.images.to(self.device, memory_format=torch.channels_last_3d)
        labels = batch.labels.to(self.device)
        if self.side_by_side:
            self.side_by_side.begin(images)
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            result = self.method.step(*self.networks, images, labels, step)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        if log_row or self.device.type == "cpu":  # elsewhere, reading the loss would make the host wait
            self._stop_if_not_finite(float(result.loss.detach()), step, batch)
        self.optimizer.step()
        if not log_row:
            return None
        row = {"learning_rate": rate, "loss_a": float(result.loss_a.detach()), "loss_b": float(result.loss_b.detach())}
        for name, value in result.terms.items():
            row.update(_columns(name, value))
        row["seconds"] = time.perf_counter() - started
        return row

    def _stop_if_not_finite(self, loss: float, step: int, batch: Batch) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step}, on the volumes {', '.join(dict.fromkeys(batch.names))}. "
                f"The last checkpoint is untouched. Look at these volumes' intensities, lower --learning-rate, or use --precision fp32."
            )

    def _validate(self) -> float:
        """Mean foreground Dice over the validation cases, on the networks' grid; each process takes some of them."""
        import torch

        from sslfast.inference import predict_probabilities
        from sslfast.metrics import dice

        self.model.network_a.eval()
        self.model.network_b.eval()
        scores = []
        for case in self.validation[self.ranks.rank :: self.ranks.size]:
            assert case.label is not None
            predicted = predict_probabilities(self.model, case.image, precision=self.config.precision).argmax(0).numpy()
            annotated = case.label >= 0
            for c in range(1, len(self.model.classes)):
                reference = case.label == c
                if reference.any():
                    scores.append(dice((predicted == c) & annotated, reference))
        total = self.ranks.sum(torch.tensor([sum(scores), len(scores)], dtype=torch.float64, device=self.device))
        return float(total[0] / total[1].clamp_min(1))

    def _save(self, path: Path, step: int) -> None:
        from sslfast.checkpoint import save_checkpoint

        if self.ranks.rank > 0:
            return
        content = {
            "step": step,
            "best_dice": self.best_dice,
            "model": self.model.state(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(path, content)

    def _load(self, path: Path) -> None:
        from sslfast.checkpoint import load_checkpoint

        content = load_checkpoint(path)
        self.model.network_a.load_state_dict(content["model"]["network_a"])
        self.model.network_b.load_state_dict(content["model"]["network_b"])
        self.method.load_state_dict(content["method"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.first_step = content["step"]
        self.best_dice = content["best_dice"]


PER_CLASS = {"reliable", "anchors"}  # terms [C]; other terms of two numbers are those of network a and b


def _columns(name: str, value: torch.Tensor) -> dict[str, float]:
    """A term as columns of the log: [] as it is, [2] by network, [C] by class."""
    if value.ndim == 0:
        return {name: float(value)}
    ends = range(len(value)) if name in PER_CLASS or len(value) != 2 else "ab"
    return {f"{name}_{end}": float(x) for end, x in zip(ends, value.tolist(), strict=True)}


def _summary(row: dict[str, float]) -> str:
    parts = [f"a {row['loss_a']:.3f}", f"b {row['loss_b']:.3f}"]
    if "winner" in row:
        parts.append(f"winner {'ab'[int(row['winner'])]}")
    if "kept_fraction" in row:
        parts.append(f"kept {row['kept_fraction']:.0%}")
    return ", ".join(parts)


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    facts = f"{seed} {step}" + (f" {rank}" if rank else "")
    return int.from_bytes(hashlib.sha256(facts.encode()).digest()[:8], "little") >> 1


def _decode(config: TrainConfig, cases: Sequence[Any], num_classes: int, what: str) -> list[DecodedCase]:
    from tqdm import tqdm

    from sslfast.data.volumes import decode

    return [
        decode(case, config.preprocessing, num_classes=num_classes, ignore_label=config.ignore_label)
        for case in tqdm(cases, desc=what, unit="case", leave=False, disable=not cases)
    ]


def _check(config: TrainConfig) -> None:
    """Everything about the flags that can be known before the data is read."""
    from sslfast.data.demo import COHORTS
    from sslfast.methods import find_method

    find_method(config.method)
    factor = config.networks.factor
    if any(size < factor or size % factor for size in config.patch):
        fitting = " ".join(str(max(factor, round(size / factor) * factor)) for size in config.patch)
        raise UserError(
            f"--patch {' '.join(map(str, config.patch))}: with --depth {config.networks.depth} each axis must be a "
            f"multiple of {factor}; --patch {fitting} would do"
        )
    for flag, value in (
        ("--steps", config.steps),
        ("--labeled-batch", config.labeled_batch),
        ("--validate-every", config.validate_every),
        ("--save-every", config.save_every),
        ("--log-every", config.log_every),
    ):
        if value < 1:
            raise UserError(f"{flag} {value}: it must be 1 or more")
    for flag, value in (
        ("--unlabeled-batch", config.unlabeled_batch),
        ("--workers", config.workers),
        ("--seed", config.seed),
    ):
        if value < 0:
            raise UserError(f"{flag} {value}: it must be 0 or more")
    if config.memory_budget is not None and not config.memory_budget > 0:
        raise UserError(f"--memory-budget {config.memory_budget}: it must be above 0 GB")
    if config.preprocessing.spacing is not None and not config.preprocessing.spacing > 0:
        raise UserError(f"--spacing {config.preprocessing.spacing}: it must be above 0 mm")
    if config.data not in COHORTS and not Path(config.data).is_dir():
        raise UserError(f"--data {config.data} is not a folder; give a dataset folder or {' or '.join(COHORTS)}")


def _start_folder(config: TrainConfig) -> None:
    """Makes the run's folder, and refuses to mix two runs in one."""
    make_folder(config.output)
    written = config.output / CONFIG
    if not written.exists():
        return
    if not config.resume:
        raise UserError(
            f"{config.output} holds a run already; add --resume to go on with it, or choose another --output"
        )
    before, now = read_config(written), flatten(config)
    changed = [name for name in now if name not in RESUME_MAY_CHANGE and before.get(name, now[name]) != now[name]]
    if changed:
        flags = ", ".join(f"--{n.replace('_', '-')} (was {before[n]}, is {now[n]})" for n in changed)
        raise UserError(
            f"{config.output} was started with other settings: {flags}. Resume with the same, or start anew."
        )


def _print_results(results: dict[str, RunResult]) -> None:
    for method, result in results.items():
        for checkpoint, evaluation in result.evaluations.items():
            print(f"\n{method}, test cases, {checkpoint}\n{evaluation.to_table()}")
    if all(result.evaluations for result in results.values()):
        print("\nheld-out Dice (mean over the test cases)")
        for method, result in results.items():
            unlabelled = f" + {result.unlabelled} unlabelled" if method != "supervised" else ""
            dice = ", ".join(f"{e.mean_dice:.3f} ({checkpoint})" for checkpoint, e in result.evaluations.items())
            print(f"  {method:<16} {f'{result.labelled} labels{unlabelled}':<28} {dice}")
    print("\npictures")
    for result in results.values():
        for path in result.pictures:
            print(f"  {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(TrainConfig, train, argv)


if __name__ == "__main__":
    sys.exit(main())
