"""The memory of a training step, measured on small patches, and the largest step that fits a budget."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslfast.errors import UserError
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions
from sslfast.training.config import TrainConfig

WORKSPACE = 1.3  # factor for the workspace of the convolutions, on top of the tensors
AVERAGES = 2  # moving averages of each gradient that the optimizer keeps


class Peak(TorchDispatchMode):
    """Peak bytes of the tensors that are created in the block and alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def step_bytes(
    options: NetworkOptions, num_classes: int, dtype: torch.dtype | None, channels: int = 1
) -> tuple[float, float]:
    """Peak memory of a training step of both networks: bytes per voxel of a patch, and bytes besides.

    Measured on the CPU in steps with patches of two small sizes. `dtype` is that of autocast.
    """
    networks = build_networks(options, num_classes, channels)
    parameters = sum(p.numel() for network in networks for p in network.parameters())

    def measured(patch: Sequence[int]) -> float:
        for network in networks:
            network.zero_grad(set_to_none=True)
        images = torch.zeros(2, channels, *patch)
        with Peak() as peak:
            for parameter in (p for network in networks for p in network.parameters()):
                peak.live.add(parameter.untyped_storage()._cdata)  # counted below
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                outputs = [network(images) for network in networks]
            loss = sum((z.float().mean() + f.float().mean() for z, f in outputs), torch.zeros(()))
            del outputs
            loss.backward()
        return peak.most

    patches = [[max(times * factor, 4) for factor in options.factors] for times in (2, 3)]
    small, large = map(measured, patches)
    voxels = [2 * math.prod(patch) for patch in patches]
    a_voxel = (large - small) / (voxels[1] - voxels[0])
    fixed = max(small - a_voxel * voxels[0], 0)  # gradients, and weights cast to `dtype`
    return WORKSPACE * a_voxel, fixed + 4 * (1 + AVERAGES) * parameters


def fit_to_budget(
    config: TrainConfig, num_classes: int, dtype: torch.dtype | None, channels: int = 1
) -> tuple[TrainConfig, str]:
    """The settings closest to `config` whose step fits `memory_budget`, and a sentence that says what changed.

    It first turns on checkpointing, unless the networks are compiled or of MONAI, then halves the batches, then shrinks
    the longest axis of the patches.

    Raises:
        UserError: even the smallest step takes more memory.
    """
    if config.memory_budget is None:
        return config, ""
    plain = config.networks
    lean = replace(plain, checkpointing=not (config.compile or plain.foreign))
    cost = {options: step_bytes(options, num_classes, dtype, channels) for options in {plain, lean}}

    def gigabytes(candidate: TrainConfig) -> float:
        a_voxel, fixed = cost[candidate.networks]
        patches = candidate.labeled_batch + candidate.unlabeled_batch
        return (a_voxel * patches * math.prod(candidate.patch) + fixed) / 2**30

    last = config
    for candidate in _smaller_and_smaller(config, lean):
        last = candidate
        if gigabytes(candidate) <= config.memory_budget:
            changed = (
                f"--memory-budget {config.memory_budget:g}: a step with these settings takes "
                f"{gigabytes(config):.1f} GB; with {_described(candidate)} it takes {gigabytes(candidate):.1f} GB"
            )
            return candidate, changed if candidate != config else ""
    raise UserError(
        f"--memory-budget {config.memory_budget:g}: the smallest step, {_described(last)}, takes "
        f"{gigabytes(last):.1f} GB. Use --memory-budget {math.ceil(10 * gigabytes(last)) / 10:g}, or make the networks "
        f"smaller with --width or --depth."
    )


def _smaller_and_smaller(config: TrainConfig, lean: NetworkOptions) -> Iterator[TrainConfig]:
    yield config
    config = replace(config, networks=lean)
    yield config
    while config.labeled_batch > 1 or config.unlabeled_batch > 1:
        batches = max(config.labeled_batch // 2, 1), max(config.unlabeled_batch // 2, min(config.unlabeled_batch, 1))
        config = replace(config, labeled_batch=batches[0], unlabeled_batch=batches[1])
        yield config
    factors = config.networks.factors
    while any(size > 2 * factor for size, factor in zip(config.patch, factors, strict=True)):
        steps = [size if size > 2 * factor else 0 for size, factor in zip(config.patch, factors, strict=True)]
        longest = steps.index(max(steps))
        x, y, z = (size - factors[axis] * (axis == longest) for axis, size in enumerate(config.patch))
        config = replace(config, patch=(x, y, z))
        yield config


def _described(config: TrainConfig) -> str:
    return (
        f"--patch {' '.join(map(str, config.patch))} --labeled-batch {config.labeled_batch} --unlabeled-batch "
        f"{config.unlabeled_batch}{' --checkpointing' if config.networks.checkpointing else ''}"
    )
