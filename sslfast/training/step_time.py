"""The time of a training step, measured on small patches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sslfast.networks import build_networks
from sslfast.precision import autocast_dtype
from sslfast.training.config import TrainConfig
from sslfast.training.survey import build_method

MEASURED = 2**16  # voxels of a measured patch, at most


def step_seconds(config: TrainConfig, num_classes: int, channels: int, device: torch.device) -> float:
    """Seconds of a training step, extrapolated from two smaller patches."""
    state = torch.random.get_rng_state()
    networks = build_networks(config.networks, num_classes, channels)
    network: Any
    for network in networks:
        network.to(device, memory_format=torch.channels_last_3d)
    trained = build_method(config, num_classes)
    trained.prepare(*networks)
    trained.to(device)
    dtype = autocast_dtype(config.precision, device)

    def measured(patch: Sequence[int]) -> float:
        images = torch.randn(config.labeled_batch + config.unlabeled_batch, channels, *patch, device=device)
        labels = torch.randint(0, num_classes, (config.labeled_batch, *patch), device=device)
        times = []
        for step in range(2):
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                result = trained.step(*networks, images.contiguous(memory_format=torch.channels_last_3d), labels, step)
            result.loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    factors = np.array(config.networks.factors)
    largest = np.array(config.patch)
    while np.prod(largest) > MEASURED and (largest > 2 * factors).any():
        axis = int(np.where(largest > 2 * factors, largest, 0).argmax())
        largest[axis] -= factors[axis]
    smallest = np.maximum(largest // (2 * factors), 2) * factors
    times = [measured([int(n) for n in patch]) for patch in (smallest, largest)]
    torch.random.set_rng_state(state)
    sizes = [float(np.prod(patch)) for patch in (smallest, largest)]
    wanted = float(math.prod(config.patch))
    if sizes[1] <= sizes[0] or times[1] <= times[0]:
        return times[1] * wanted / sizes[1]
    return times[1] + (times[1] - times[0]) / (sizes[1] - sizes[0]) * (wanted - sizes[1])
