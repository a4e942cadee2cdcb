"""The training loop: a batch, a step of the method, a step of the optimizer; checkpoints, validation and curves."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from sslfast.data.classes import Classes
from sslfast.data.mirror import safe_axes
from sslfast.data.patches import Batch, PatchDataset, TwoStreamSampler, patch_loader, worker_faults
from sslfast.data.volumes import DecodedCase
from sslfast.errors import Stopped, UserError
from sslfast.inference import predict_probabilities
from sslfast.methods import find_method
from sslfast.metrics import dice
from sslfast.model import Model
from sslfast.networks import build_networks, normalise_over_processes
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.options import BEST, LAST
from sslfast.precision import autocast_dtype
from sslfast.training.checkpoint import fitting, load_checkpoint, save_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.training.distributed import first_process_first
from sslfast.training.health import Health
from sslfast.training.initial_weights import init_networks
from sslfast.training.stopping import Stopping
from sslfast.training.streams import SideBySide
from sslfast.training.training_log import TrainingLog

# Terms of [C]; those of [2] are of networks a and b
PER_CLASS = {"class_dice", "class_voxels", "running_dice", "found", "gate", "reliable", "anchors"}


class Trainer:
    """Trains both networks from the first step, or from the last checkpoint, to the last step.

    Args:
        config: settings; if `options` is None, the defaults of the method are used.
        classes: the classes, in the order of the networks'.
        cases: training cases, the labelled ones first.
        num_labelled: number of labelled cases.
        validation: labelled cases, scored every `validate_every` steps.
        device: device of the networks.
        reducer: the processes that train together.
        channels: names of the images' channels.
        spacing: of the networks' grid, mm.
    """

    def __init__(
        self,
        config: TrainConfig,
        classes: Classes,
        cases: list[DecodedCase],
        num_labelled: int,
        validation: list[DecodedCase],
        device: torch.device,
        reducer: Reducer = SINGLE_PROCESS,
        channels: tuple[str, ...] = ("image",),
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.config = config
        self.reducer = reducer
        self.cases = cases
        self.num_labelled = num_labelled
        self.validation = validation
        self.device = device
        self.autocast_dtype = autocast_dtype(config.precision, device)
        networks = build_networks(config.networks, len(classes.names), len(channels))
        if config.init_from is not None and not config.resumes:
            init_networks(config.init_from, networks)
        model = Model(config.networks, config.preprocessing, classes.names, config.patch, *networks)
        mirrored = safe_axes(config.mirror, [*classes.names.values()]) if config.augment in ("flip", "all") else ()
        model = replace(model, channels=channels, merged=classes.merged, spacing=spacing, mirrored=mirrored)
        self.model = model.to(device)
        network: Any  # torch's stubs lack the argument
        for network in networks:
            network.to(memory_format=torch.channels_last_3d)  # 25 % less time per step on CPUs with AVX-512
            if config.compile:
                network.compile()
        method = find_method(config.method)
        self.method = method(len(classes.names), config.steps, config.seed, config.options or method.Options())
        self.method.spacing = spacing
        self.method.set_process_group(self.reducer)
        self.method.prepare(*networks)
        self.method.to(device)
        for part in (*networks, self.method):
            normalise_over_processes(part, self.reducer)  # only sync-batch does
        parameters = [p for part in (*networks, self.method) for p in part.parameters() if p.requires_grad]
        rate, decay = config.learning_rate, config.weight_decay
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)
            if config.optimizer == "adamw"
            else torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
        )
        self.networks: tuple[torch.nn.Module, torch.nn.Module] = networks
        if self.reducer.size > 1:
            self.networks = DistributedDataParallel(networks[0]), DistributedDataParallel(networks[1])
        self.health = Health(
            dict(enumerate(classes.names.values())),
            config.steps,
            semi_supervised=self.method.uses_unlabelled and num_labelled < len(cases),
            contrast=num_labelled < len(cases) and self.method.uses_contrast,
        )
        self.side_by_side: SideBySide | None = None
        if config.streams:
            self.side_by_side = SideBySide(*networks)
            self.networks = self.side_by_side.networks
        self.first_step = 0
        self.best_dice = -math.inf
        if config.resumes:
            self._load(config.output / LAST)

    def run(self) -> None:
        """Trains to the last step.

        Ctrl-C and SIGTERM end it after a step; with several processes on GPUs, after one that is logged.

        Raises:
            UserError: the loss is NaN or infinite; the message names the step and the volumes.
            Stopped: a signal was received; the checkpoint of the last step done is written.
        """
        config = self.config
        progress = tqdm(
            total=config.steps,
            initial=self.first_step,
            desc=config.method,
            unit="step",
            smoothing=0.05,
            mininterval=0.5,
            disable=self.reducer.rank > 0,
        )
        logged = TrainingLog(config.output, self.first_step) if self.reducer.rank == 0 else contextlib.nullcontext()
        saved = time.monotonic()
        stopping = Stopping(self.reducer, self.device)
        with progress, logged as log, stopping, worker_faults(config.workers):
            for past, values in log.logged() if log else ():  # of the run that is resumed
                self.health.add(past, values)
            for step, batch in enumerate(self._loader(), self.first_step):
                log_row = step % config.log_every == 0 or step == config.steps - 1
                row = self._step(step, batch, log_row)
                progress.update()
                done = step + 1
                if self.validation and (done % config.validate_every == 0 or done == config.steps):
                    mean_dice = self._validate()
                    row = {**(row or {}), "validation_dice": mean_dice}
                    if mean_dice > self.best_dice:
                        self.best_dice = mean_dice
                        self._save(config.output / BEST, done)
                if row and log:
                    log.write(step, row)
                    for warning in self.health.add(step, row):
                        progress.write(f"warning: {warning}", file=sys.stderr)
                    progress.set_postfix_str(self.health.summary())
                if (log_row or self._reads_every_loss or self.reducer.size == 1) and stopping.agreed():
                    with first_process_first(self.reducer):  # torchrun ends the others when a process ends
                        self._save(config.output / LAST, done)
                    raise Stopped(
                        stopping.received, f"{config.output}: stopped after step {done} of {config.steps}, and saved"
                    )
                late = time.monotonic() - saved >= 60 * config.save_minutes
                if late or done % config.save_every == 0 or done == config.steps:
                    self._save(config.output / LAST, done)
                    saved = time.monotonic()

    @property
    def _reads_every_loss(self) -> bool:
        """False on a GPU, where reading the loss stalls the host: it is read in the steps that are logged."""
        return self.device.type == "cpu"

    def _loader(self) -> DataLoader[Any]:
        config = self.config
        num_unlabelled = len(self.cases) - self.num_labelled
        sampler = TwoStreamSampler(
            self.num_labelled,
            num_unlabelled,
            config.labeled_batch,
            config.unlabeled_batch if self.method.uses_unlabelled and num_unlabelled else 0,
            config.seed,
            self.first_step,
            config.steps,
            self.reducer.rank,
            self.reducer.size,
        )
        dataset = PatchDataset(
            self.cases,
            config.patch,
            augment=config.augment,
            foreground=config.foreground,
            affine_unlabelled=not self.method.augments_unlabelled,
            mirror=config.mirror,
            names=[*self.model.classes.values()],
            spacing=self.method.spacing,
        )
        return patch_loader(dataset, sampler, config.workers, pin_memory=self.device.type == "cuda")

    def _step(self, step: int, batch: Batch, log_row: bool) -> dict[str, float] | None:
        config = self.config
        started = time.perf_counter()
        torch.manual_seed(_seed_of_step(config.seed, step, self.reducer.rank))  # resuming repeats the dropout
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
        if log_row or self._reads_every_loss:
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
                f"the loss is {loss} at step {step}, on the volumes {', '.join(dict.fromkeys(batch.names))}. The last "
                f"checkpoint is unchanged. Check the intensities of these volumes, lower --learning-rate, or use "
                f"--precision fp32."
            )

    def _validate(self) -> float:
        """Mean foreground Dice over the validation cases, on the networks' grid. The processes share the cases."""
        self.model.network_a.eval()
        self.model.network_b.eval()
        scores = []
        for case in self.validation[self.reducer.rank :: self.reducer.size]:
            assert case.label is not None
            predicted = predict_probabilities(self.model, case.image, precision=self.config.precision).argmax(0).numpy()
            annotated = case.label >= 0
            for c in range(1, len(self.model.classes)):
                reference = case.label == c
                if reference.any():
                    scores.append(dice((predicted == c) & annotated, reference))
        total = self.reducer.sum(torch.tensor([sum(scores), len(scores)], dtype=torch.float64, device=self.device))
        return float(total[0] / total[1].clamp_min(1))

    def _save(self, path: Path, step: int) -> None:
        if self.reducer.rank > 0:
            return
        states = self.model.network_a.state_dict(), self.model.network_b.state_dict()
        if not all(bool(value.isfinite().all()) for state in states for value in state.values()):
            raise UserError(
                f"the weights are NaN or infinite after step {step} and are not saved. The last checkpoint, if there "
                "is one, is unchanged. Lower --learning-rate, or use --precision fp32."
            )
        content = {
            "step": step,
            "best_dice": self.best_dice,
            "model": self.model.state(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(path, content)

    def _load(self, path: Path) -> None:
        content = load_checkpoint(path)
        with fitting(path):
            self.model.network_a.load_state_dict(content["model"]["network_a"])
            self.model.network_b.load_state_dict(content["model"]["network_b"])
            self.method.load_state_dict(content["method"])
            _check_optimizer(content["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(content["optimizer"])
            self.first_step = range(self.config.steps + 1).index(content["step"])
            self.best_dice = float(content["best_dice"])
            if math.isnan(self.best_dice):
                raise ValueError("best_dice is NaN")


def _check_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where its own `load_state_dict` does not look: fused updates would write outside of memory."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        numbers = [name for name in own if isinstance(own[name], (float, tuple))]
        if not all(type(saved[name]) is type(own[name]) for name in numbers):
            raise ValueError(f"the optimizer's {', '.join(numbers)} are not numbers as they were")
    if not state["state"]:
        raise ValueError("the optimizer has no moments")
    for number, moments in state["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameters[number].shape or not moments[name].isfinite().all():
                raise ValueError(f"{name} {number} of the optimizer is not finite or not of its weight's shape")


def _columns(name: str, value: torch.Tensor) -> dict[str, float]:
    """The log columns of a term: one for a scalar, one per network for [2], one per class for [C] unless it is -1."""
    if value.ndim == 0:
        return {name: float(value)}
    of_networks = len(value) == 2 and name not in PER_CLASS
    columns = zip("ab" if of_networks else range(len(value)), value.tolist(), strict=True)
    return {f"{name}_{end}": float(x) for end, x in columns if of_networks or x != -1}


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    facts = f"{seed} {step}" + (f" {rank}" if rank else "")
    return int.from_bytes(hashlib.sha256(facts.encode()).digest()[:8], "little") >> 1
