"""Settings of a run chosen by its data and the machine, each with the reason in a sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslfast.atomic_io import whole_file
from sslfast.data.mirror import other_sides
from sslfast.data.volumes import shown
from sslfast.methods import find_method
from sslfast.options import MIRROR, Triple
from sslfast.precision import autocast_dtype
from sslfast.training.config import TrainConfig
from sslfast.training.memory_budget import fit_to_budget, step_bytes
from sslfast.training.step_time import step_seconds
from sslfast.training.survey import Situation, look

ANISOTROPIC = 3.0  # ratio of spacings above which slices are thick, as in nnU-Net
POOLED_APART = 2.0  # ratio of spacings below which axes are halved together, as in nnU-Net
BOTTOM = 3  # voxels that an axis keeps at the last stage, at least
SEEN = 0.5  # share of a volume that a patch should show, at least
STRUCTURE = 64  # voxels of the smallest structure that a coarser grid must leave
FEW = 100  # labelled voxels, of which no percentile is taken
MEMORY = 0.8  # share of a device's memory that a step may take
BASELINE = 0.5  # time of the baseline, of that of the default method
FEW_STEPS = 600
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Scale:
    """What a device can do in a reasonable time."""

    voxels: int  # of a patch, at most
    width: int
    depth: int  # at most
    steps: int
    learning_rate: float
    dropout: float


SCALES = {"cpu": Scale(2**16, 8, 4, 1500, 0.003, 0.1), "cuda": Scale(2**21, 16, 5, 6000, 0.001, 0.5)}


@dataclass
class Plan:
    """Values by the names of flags, the reason for each, and what the run will take."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    estimates: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, reason: str) -> None:
        """Sets a flag."""
        self.values[name], self.reasons[name] = value, reason

    def __str__(self) -> str:
        width = max(map(len, self.values), default=0)
        lines = []
        for name, value in self.values.items():
            words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append(f"  --{name.replace('_', '-'):<{width}} {words:<22} {self.reasons[name]}")
        return "\n".join(["plan, for the flags that are left open", *lines, *(f"  {line}" for line in self.estimates)])

    def write(self, path: Path, given: Mapping[str, Any]) -> None:
        """Writes a config file with the reasons as comments; `given` are the flags that were not left open."""
        lines = [f"# {line}" for line in self.estimates]
        for name, value in {**given, **self.values}.items():
            plain = [*value] if isinstance(value, tuple) else value
            lines += [f"# {self.reasons[name]}"] if name in self.reasons else []
            lines.append(f"{name}: {json.dumps(plain, ensure_ascii=False)}")
        with whole_file(path) as part:
            part.write_text("\n".join(" ".join(line.split()) for line in lines) + "\n", encoding="utf-8")


def plan_preprocessing(config: TrainConfig, given: set[str], situation: Situation) -> tuple[Plan, tuple[float, ...]]:
    """A plan of intensity and spacing, as far as `given` does not name them, and the spacing of the grid, mm."""
    plan = Plan()
    _plan_intensity(plan, config, situation, given)
    return plan, _plan_spacing(plan, situation, config, given)


def make_plan(config: TrainConfig, given: set[str]) -> Plan:
    """Chooses the settings that `given` does not name.

    Args:
        config: the settings, with defaults for those that are left open.
        given: names of the flags that are not left open.

    Raises:
        UserError: see `look`; or what is given fits no plan.
    """
    situation = look(config)
    scale, classes, on = SCALES[situation.device.type], situation.classes, _named(situation.device)
    plan, spacing = plan_preprocessing(config, given, situation)
    for name in ("width", "dropout", "learning_rate"):
        if name not in given:
            plan.add(name, getattr(scale, name), f"usual on a {on}")
    size = np.median(situation.survey.extents, axis=0) / np.array(spacing)
    _plan_stages(plan, size, spacing, config, scale, given)
    if not {"mirror", "augment"} & given:
        _plan_mirror(plan, config, [*classes.names.values()])
    if "steps" not in given:
        plan.add("steps", scale.steps, f"usual on a {on}; --hours fits them to a time")
    finished = settled(config, plan)
    finished.check()
    sampling = f"{100 * config.foreground:.0f} % of the labelled patches are centred on a structure, each class alike"
    plan.estimates.append(f"classes: {classes.describe()}; {sampling}")
    if len(situation.channels) > 1:
        plan.estimates.append(f"channels: {', '.join(situation.channels)}")
    if not (situation.unlabelled and find_method(config.method).uses_unlabelled):
        finished = replace(finished, unlabeled_batch=0)  # as the trainer draws them
    _estimate(plan, finished, situation, given)
    return plan


def settled(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The settings with those of a plan."""
    names = {part: {*vars(getattr(config, part))} for part in ("preprocessing", "networks")}
    nested = {
        part: replace(getattr(config, part), **{n: _tuple(v) for n, v in plan.values.items() if n in of})
        for part, of in names.items()
    }
    others = {n: _tuple(v) for n, v in plan.values.items() if not any(n in of for of in names.values())}
    return replace(config, **nested, **others)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plan_intensity(plan: Plan, config: TrainConfig, situation: Situation, given: set[str]) -> None:
    survey, channels = situation.survey, situation.channels
    air = np.median(survey.lows, axis=0) if len(survey.lows) else np.zeros(len(channels))
    named = [name.upper() == "CT" or name.upper().startswith("CT ") for name in channels]
    is_ct = [by_name or low < -500 for by_name, low in zip(named, air, strict=True)]
    kinds = config.preprocessing.intensities(len(channels))
    if "intensity" not in given:
        if "window" in given:
            kinds = tuple("ct" if ct or not any(is_ct) else "zscore" for ct in is_ct)
        else:
            kinds = tuple("ct" if ct and len(survey.inside) > FEW else "zscore" for ct in is_ct)
        each = "each channel of each volume" if len(channels) > 1 else "each volume"
        if "ct" in kinds:
            first = kinds.index("ct")
            why = "dataset.json says CT" if named[first] else f"air is at {air[first]:.0f}, as in CT"
            why = "--window is given" if "window" in given else why
            mixed = len({*kinds}) > 1
            which = " and ".join(name for name, kind in zip(channels, kinds, strict=True) if kind == "ct")
            clip = f"clip {which} to --window" if mixed else "clip to --window"
            plan.add("intensity", [*kinds] if mixed else "ct", f"{why}: {clip}, then normalise {each}")
        else:
            why = "a CT, but hardly labelled" if any(is_ct) else "no CT"
            plan.add("intensity", "zscore", f"{why}: normalise {each} by itself")
    inside = survey.inside[:, [kind == "ct" for kind in kinds]]
    if "window" not in given and inside.size:
        low, high = (float(f"{v:.3g}") for v in np.percentile(inside, (0.5, 99.5)))
        if low < high:
            plan.add("window", [low, high], "the percentiles 0.5 and 99.5 of the labelled structures")


def _plan_spacing(plan: Plan, situation: Situation, config: TrainConfig, given: set[str]) -> tuple[float, ...]:
    """The spacing of the grid, mm: the median, of thick slices a thinner one; coarser if a patch would see little."""
    survey = situation.survey
    median = np.median(survey.spacings, axis=0)
    if "spacing" in given:
        return config.preprocessing.spacing or tuple(median)
    target, words = median.copy(), "the median"
    coarse = int(median.argmax())
    if median[coarse] > ANISOTROPIC * median.min():
        target[coarse] = max(np.percentile(survey.spacings[:, coarse], 10), np.delete(median, coarse).max())
        words = "the median, of the thick slices the 10th percentile"
    extent = np.median(survey.extents, axis=0)
    most = SCALES[situation.device.type].voxels / SEEN
    finest = float(target.min())
    edges = np.geomspace(finest, 100 * finest, 2000)
    fits = [edge for edge in edges if np.prod(extent / np.maximum(target, edge)) <= most]
    kept = [edge for edge in edges if STRUCTURE * np.prod(np.maximum(target, edge)) <= survey.smallest]
    wanted, limit = (fits[0] if fits else edges[-1]), (kept[-1] if kept else finest)
    edge = float(min(wanted, limit))
    if edge > 1.02 * finest:
        target = np.maximum(target, edge)
        why = f"a patch that fits a {_named(situation.device)} shows "
        why += "enough of a volume" if wanted <= limit else f"more, and the smallest structure keeps {STRUCTURE} voxels"
        words = f"coarser than the data ({shown(median)}): {why}"
    chosen = tuple(float(f"{length:.3g}") for length in target)
    alike = np.abs(survey.spacings / median - 1).max() < 0.01
    if alike and np.abs(np.array(chosen) / median - 1).max() < 0.01:
        plan.add("spacing", None, f"all volumes have {shown(median)} mm already")
        return tuple(median)
    plan.add("spacing", [*chosen], f"{words}; of {survey.count} volumes {_ranges(survey.spacings)} mm")
    return chosen


def _plan_stages(
    plan: Plan, size: np.ndarray, spacing: Sequence[float], config: TrainConfig, scale: Scale, given: set[str]
) -> None:
    """Patch, depth and pooling, as far as they are left open, from the median size of a volume in voxels."""
    networks = config.networks
    if {"patch", "depth"} <= given and (networks.pooling or "pooling" in given):
        return
    if networks.pooling and "depth" not in given:
        plan.add("depth", len(networks.pooling) + 1, "one more than --pooling has words")
        networks = replace(networks, depth=len(networks.pooling) + 1)
    if "patch" in given:
        patch = np.array(config.patch, float)
    else:  # the shape of a volume, shrunk to the voxels that the device takes
        patch = size.copy()
        while np.prod(patch) > scale.voxels:
            patch[patch.argmax()] *= 0.98
    strides = networks.strides if {"depth", "pooling"} <= given or networks.pooling else None
    if strides is None:
        depth = networks.depth if "depth" in given else scale.depth
        together = "segresnet" in (networks.network_a, networks.network_b)
        least = depth - 1 if "depth" in given else 2 if "dynunet" in (networks.network_a, networks.network_b) else 1
        strides = _strides(patch, spacing, depth, least=least, even="patch" in given, together=together)
        words = ["".join(map(str, stride)) for stride in strides]
        if "depth" not in given:
            bottom = f"{BOTTOM} voxels or more are left at the last"
            plan.add("depth", len(strides) + 1, f"stages, of which {bottom}")
        if {*words} != {"222"}:
            why = "an axis is halved only where its voxels are no longer than the others', and it has enough of them"
            plan.add("pooling", words, why)
    if "patch" not in given:
        factors = np.prod(strides, axis=0)
        fewest = np.where(factors > 1, 2, 1)  # voxels that are left at the last stage
        most = np.maximum(np.ceil(np.round(patch / factors, 2)).astype(int), fewest)
        counts = np.meshgrid(*(np.arange(*ends) for ends in zip(fewest, most + 1, strict=True)), indexing="ij")
        every = factors * np.stack(counts, -1).reshape(-1, 3)
        every = every[(every.prod(1) <= scale.voxels) | (every == fewest * factors).all(1)]
        worst = (every / patch).min(1).clip(max=1).round(2)  # the share of the wanted patch along its worst axis
        shown_voxels = np.minimum(every, size).prod(1)
        sizes = every[np.lexsort((every @ size, shown_voxels, worst))[-1]]
        share = min(1.0, float(np.prod(np.minimum(sizes, size)) / np.prod(size)))
        reason = f"shows {100 * share:.0f} % of a median volume of {' '.join(f'{n:.0f}' for n in size)} voxels"
        plan.add("patch", [int(n) for n in sizes], reason)


def _strides(
    size: np.ndarray,
    spacing: Sequence[float],
    depth: int,
    *,
    least: int = 1,
    even: bool = False,
    together: bool = False,
) -> tuple[Triple, ...]:
    """Strides of the stages: an axis is halved while its voxels are not much longer than the others', and stay enough.

    Args:
        least: there must be so many.
        even: only axes of an even size are halved.
        together: each stage halves all axes.
    """
    left, lengths = size.astype(float).copy(), np.array(spacing, float)
    strides: list[Triple] = []
    for _ in range(depth - 1):
        enough = (left / 2 >= BOTTOM) & (left % 2 == 0 if even else True)
        finest = lengths[enough].min() if enough.any() else math.inf
        halved = enough & (lengths < POOLED_APART * finest)
        if len(strides) >= least and not (enough.all() if together else halved.any()):
            break
        if together or not halved.any():
            halved = (left == left.max()) | together
        x, y, z = (2 if axis else 1 for axis in halved)
        strides.append((x, y, z))
        left, lengths = left / strides[-1], lengths * strides[-1]
    return tuple(strides)


def _plan_mirror(plan: Plan, config: TrainConfig, names: Sequence[str]) -> None:
    if other_sides(names) is None:
        plan.add("mirror", [*MIRROR[1:]], "left and right would stay: a class has a side and no counterpart")
    plan.add("augment", config.augment, "contrast, noise, rotation, zoom; add mirroring by all, where it is safe")


def _estimate(plan: Plan, config: TrainConfig, situation: Situation, given: set[str]) -> None:
    """Adds what the run takes, and fits the steps to `--hours`."""
    device, channels = situation.device, len(situation.channels)
    num_classes, dtype = len(situation.classes.names), autocast_dtype(config.precision, device)
    voxels = (config.labeled_batch + config.unlabeled_batch) * math.prod(config.patch)
    a_voxel, fixed = step_bytes(config.networks, num_classes, dtype, channels)
    taken, free = (a_voxel * voxels + fixed) / 2**30, MEMORY * _memory(device) / 2**30
    if taken > free and config.memory_budget is None:
        why = f"a step takes {taken:.1f} GB, more than this machine should give; smaller batches and patches fit"
        plan.add("memory_budget", float(f"{free:.2g}"), why)
    memory = f"memory of a step: about {taken:.2g} GB"
    if os.environ.get("WORLD_SIZE", "1") != "1":  # each process would time its steps beside the others
        plan.estimates.append(memory)
        return
    config = fit_to_budget(settled(config, plan), num_classes, dtype, channels)[0]
    seconds = step_seconds(config, num_classes, channels, device)
    remedy = "a smaller --patch or --width makes them faster"
    if config.hours is not None and "steps" not in given:
        steps = max(1, int(3600 * config.hours / (seconds * (1 + BASELINE * config.baseline))))
        few = f", which are few: {remedy}" if steps < FEW_STEPS else ""
        plan.add("steps", steps, f"what {config.hours:g} hours allow on this machine{few}")
        config = replace(config, steps=steps)
    whole = seconds * config.steps
    plan.estimates.append(
        f"{memory}; time: about {seconds:.2g} s, "
        f"{_duration(whole)} for {config.steps} steps" + (", and the baseline's" if config.baseline else "")
    )
    if whole > DAY:
        on = "" if device.type == "cuda" else ", or use a GPU"
        plan.estimates.append(f"THIS RUN TAKES {_duration(whole)}. Shorten it with --hours{on}.")
    if whole > 3600:
        hour = int(3600 / seconds)
        few = f"; steps are few then, and {remedy}" if hour < FEW_STEPS else ""
        plan.estimates.append(f"to fit an hour: --hours 1 ({hour} steps){few}")


def _memory(device: torch.device) -> float:
    """Bytes of memory of a device, for each process of this machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # ValueError: "max"
        whole = min(whole, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _named(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"


def _ranges(spacings: np.ndarray) -> str:
    """The smallest and the largest spacing along each axis."""
    pairs = zip(spacings.min(0), spacings.max(0), strict=True)
    return " × ".join(f"{low:.3g}" if high < 1.01 * low else f"{low:.3g} to {high:.3g}" for low, high in pairs)


def _duration(seconds: float) -> str:
    for unit, length in (("days", DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.0f} seconds"
