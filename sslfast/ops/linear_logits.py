"""Logits of a 1x1x1 classifier that are never stored: the kernels compute them from the features wherever they read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslfast.ops.backend import has_linear_logits
from sslfast.ops.buffers import empty_like
from sslfast.ops.check import to_compute_dtype


@dataclass(frozen=True)
class LinearLogits:
    """z = W f + b at each voxel, W and b of each volume. It stands where an op takes logits [N, C, *spatial].

    As the fused cross-entropies of language models never store the logits of the vocabulary (arXiv 2411.09009), here neither
    they nor their gradient take memory: a voxel's features are read instead, and their gradient is written once.
    """

    features: Tensor  # [N, K, *spatial]
    weights: Tensor  # [N, C, K + 1] float32, the last column b; float64 for float64 features

    @property
    def shape(self) -> torch.Size:
        """[N, C, *spatial]"""
        return torch.Size((self.features.shape[0], self.weights.shape[1], *self.features.shape[2:]))

    @property
    def ndim(self) -> int:
        """Dimensions of the logits."""
        return self.features.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Of the features."""
        return self.features.device

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, volumes: slice) -> LinearLogits:
        """Some of the volumes."""
        return LinearLogits(self.features[volumes], self.weights[volumes])

    def detach(self) -> LinearLogits:
        """The same without gradient."""
        return LinearLogits(self.features.detach(), self.weights.detach())


Logits = Tensor | LinearLogits


def linear_logits(classifier: nn.Conv3d, features: Tensor, dropout: nn.Module | None = None) -> LinearLogits:
    """classifier(dropout(features)), not stored.

    Args:
        classifier: a 1x1x1 convolution K -> C.
        features: [N, K, D, H, W].
        dropout: Dropout3d, which zeroes and scales whole channels of a volume: it acts on the weights instead, with the same
            random numbers.

    Raises:
        ValueError: the convolution is no 1x1x1 one.
    """
    if classifier.kernel_size != (1, 1, 1) or classifier.groups != 1:
        raise ValueError(f"{classifier} is no classifier of single voxels; it must be a 1x1x1 convolution of one group")
    volumes, width = features.shape[:2]
    weight = to_compute_dtype(classifier.weight).flatten(1)  # [C, K]
    kept = weight.new_ones(volumes, width, 1, 1, 1)
    if dropout is not None:
        kept = dropout(kept)
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else to_compute_dtype(classifier.bias)
    rows = weight * kept.view(volumes, 1, width)  # [N, C, K]
    return LinearLogits(features, torch.cat((rows, bias.view(1, -1, 1).expand(volumes, -1, 1)), 2))


def materialize(logits: Logits) -> Tensor:
    """The logits as a tensor, of the features' dtype."""
    if isinstance(logits, Tensor):
        return logits
    weights = logits.weights.to(logits.dtype)
    products = torch.einsum("nck,nk...->nc...", weights[:, :, :-1], logits.features)
    return products + weights[:, :, -1].view(*weights.shape[:2], *(1 for _ in logits.features.shape[2:]))


def for_kernels(logits: Logits) -> Logits:
    """The logits as the kernels of their device read them: stored, unless they compute them from features."""
    return logits if has_linear_logits(logits) else materialize(logits)


def unpack_logits(logits: Logits) -> tuple[Tensor, Tensor | None]:
    """(values, weights): stored logits and None, or features and the classifier's weights, as ops and autograd take them."""
    return (logits.features, logits.weights) if isinstance(logits, LinearLogits) else (logits, None)


def pack_logits(values: Tensor, weights: Tensor | None) -> Logits:
    """The reverse of `split`."""
    return values if weights is None else LinearLogits(values, weights)


def empty_gradient(logits: Logits) -> Logits:
    """Room for the gradient of the values and of the weights."""
    values, weights = unpack_logits(logits)
    contiguous = torch.contiguous_format  # as the kernels write it
    return pack_logits(
        empty_like(values), None if weights is None else torch.empty_like(weights, memory_format=contiguous)
    )
