"""Normalisation with what follows it in a network: residual, ReLU, skip connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslfast.ops.norm_act import norm_act
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.options import Norm

MOMENTUM = 0.1  # of the running statistics


class NormAct(nn.Module):
    """relu(norm(x) + residual) + skip, by the op `norm_act`; the parameters and statistics are those of
    `torch.nn.BatchNorm3d` or `torch.nn.InstanceNorm3d(affine=True)`.

    Args:
        channels: C.
        norm: "batch", "instance", or "sync-batch", whose statistics are those of all processes of `reducer`.
        relu: False leaves the ReLU out.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    track_running_stats: bool
    """As in torch's layers; False: batches in training leave the running statistics alone."""
    reducer: Reducer = SINGLE_PROCESS
    """For sync-batch: process group whose batches are normalised as one."""

    def __init__(self, channels: int, norm: Norm = "batch", relu: bool = True) -> None:
        super().__init__()
        self.norm = norm
        self.relu = relu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.track_running_stats = True
        runs = norm != "instance"
        self.register_buffer("running_mean", torch.zeros(channels) if runs else None)
        self.register_buffer("running_var", torch.ones(channels) if runs else None)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """[N, C, *spatial] in the dtype of x; residual and skip are as x and may have another dtype.

        Raises:
            ValueError: one number a channel is to be normalised by itself, which would make 0 of it.
        """
        statistics = None
        if self.running_mean is not None and self.running_var is not None and not self.training:
            statistics = torch.stack((self.running_mean, self.running_var)).double().unsqueeze(0)
        elif self.norm != "sync-batch" and 0 < x[:, 0].numel() == (len(x) if self.norm == "instance" else 1):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: one number a channel, which its own mean would make 0; "
                "use larger patches or fewer stages"
            )
        values, used, size = norm_act(
            x,
            self.weight,
            self.bias,
            statistics=statistics,
            per_volume=self.norm == "instance",
            relu=self.relu,
            residual=None if residual is None else residual.to(x.dtype),
            skip=None if skip is None else skip.to(x.dtype),
            reducer=self.reducer if self.norm == "sync-batch" else SINGLE_PROCESS,
        )
        tracks = self.training and self.track_running_stats and not (isinstance(size, int) and not size)
        if tracks and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                mean, variance = used[0].to(self.running_mean.dtype)
                unbiased = size / ((size - 1).clamp(min=1) if isinstance(size, Tensor) else max(size - 1, 1))
                self.running_mean.lerp_(mean, MOMENTUM)
                self.running_var.lerp_(variance * unbiased, MOMENTUM)
        return values

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{len(self.weight)}, {self.norm}{'' if self.relu else ', no ReLU'}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of BatchNorm3d, in earlier checkpoints
        super()._load_from_state_dict(state_dict, prefix, *args)


def normalise_over_processes(network: nn.Module, reducer: Reducer) -> None:
    """Sets the process group of the layers of norm "sync-batch"."""
    for module in network.modules():
        if isinstance(module, NormAct) and module.norm == "sync-batch":
            module.reducer = reducer
