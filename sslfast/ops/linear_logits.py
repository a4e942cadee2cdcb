"""Logits of a 1x1x1 classifier that are not stored: kernels compute them from the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslfast.ops.backend import has_linear_logits
from sslfast.ops.buffers import empty_like
from sslfast.ops.check import UnstoredMap, check_device, check_map, check_tensor, compute_dtype


@dataclass(frozen=True)
class LinearLogits(UnstoredMap):
    """Logits z = W f + b at each voxel, with W and b per volume. Ops take it in place of logits [N, C, *spatial].

    As in fused cross-entropies of language models (arXiv 2411.09009), neither the logits nor their gradient are stored.
    Kernels read the features instead, and write the features' gradient once.
    """

    features: Tensor  # [N, K, *spatial]
    weights: Tensor  # [N, C, K + 1] float32, the last column b; float64 for float64 features

    @property
    def shape(self) -> torch.Size:
        """[N, C, *spatial]"""
        return torch.Size((self.features.shape[0], self.weights.shape[1], *self.features.shape[2:]))

    @property
    def dtype(self) -> torch.dtype:
        """The features' dtype."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """The features' device."""
        return self.features.device

    def __getitem__(self, volumes: slice) -> LinearLogits:
        """The logits of some of the volumes."""
        return LinearLogits(self.features[volumes], self.weights[volumes])

    def check(self, name: str) -> None:
        """Raises TypeError or ValueError unless the features are a map and the weights fit it."""
        check_map(f"{name}.features", self.features)
        check_tensor(f"{name}.weights", self.weights, (compute_dtype(self.features),))
        check_device(f"{name}.weights", self.weights, f"{name}.features", self.features)
        volumes, width = self.features.shape[:2]
        if self.weights.ndim != 3 or self.weights.shape[::2] != (volumes, width + 1):
            raise ValueError(
                f"{name}.weights has shape {tuple(self.weights.shape)}; for features {tuple(self.features.shape)} it "
                f"must be [{volumes}, C, {width + 1}]"
            )

    def detach(self) -> LinearLogits:
        """The same without gradient."""
        return LinearLogits(self.features.detach(), self.weights.detach())


Logits = Tensor | LinearLogits


def linear_logits(classifier: nn.Conv3d, features: Tensor, dropout: nn.Module | None = None) -> LinearLogits:
    """classifier(dropout(features)), not stored.

    Args:
        classifier: a 1x1x1 convolution K -> C.
        features: [N, K, D, H, W].
        dropout: Dropout3d. It zeroes and scales whole channels of a volume, and is applied to the weights instead, with
            the same random numbers.

    Raises:
        ValueError: the convolution is not 1x1x1, or has groups, or takes another number of channels.
        TypeError: the features are no floating-point tensor.
    """
    if classifier.kernel_size != (1, 1, 1) or classifier.groups != 1:
        raise ValueError(f"classifier is {classifier}; it must be a 1x1x1 convolution of one group")
    check_map("features", features)
    volumes, width = features.shape[:2]
    if width != classifier.in_channels:
        raise ValueError(f"features has {width} channels (dimension 1); the classifier takes {classifier.in_channels}")
    dtype = compute_dtype(features)
    weight = classifier.weight.to(dtype).flatten(1)  # [C, K]
    kept = weight.new_ones(volumes, width, 1, 1, 1)
    if dropout is not None:
        kept = dropout(kept)
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias.to(dtype)
    rows = weight * kept.view(volumes, 1, width)  # [N, C, K]
    return LinearLogits(features, torch.cat((rows, bias.view(1, -1, 1).expand(volumes, -1, 1)), 2))


def materialize(logits: Logits) -> Tensor:
    """The logits as a tensor; `LinearLogits` are computed in the features' dtype."""
    if isinstance(logits, Tensor):
        return logits
    weights = logits.weights.to(logits.dtype)
    products = torch.einsum("nck,nk...->nc...", weights[:, :, :-1], logits.features)
    return products + weights[:, :, -1].view(*weights.shape[:2], *(1 for _ in logits.features.shape[2:]))


def for_kernels(logits: Logits) -> Logits:
    """The logits as the kernels of their device take them: `LinearLogits` if these can, else a tensor."""
    return logits if has_linear_logits(logits) else materialize(logits)


def unpack_logits(logits: Logits) -> tuple[Tensor, Tensor | None]:
    """(values, weights) for ops and autograd: logits and None, or the features and weights of `LinearLogits`."""
    return (logits.features, logits.weights) if isinstance(logits, LinearLogits) else (logits, None)


def pack_logits(values: Tensor, weights: Tensor | None) -> Logits:
    """The reverse of `unpack_logits`."""
    return values if weights is None else LinearLogits(values, weights)


def empty_gradient(logits: Logits) -> Logits:
    """Uninitialised memory for the gradients of values and weights."""
    values, weights = unpack_logits(logits)
    contiguous = torch.contiguous_format  # as the kernels write it
    return pack_logits(
        empty_like(values), None if weights is None else torch.empty_like(weights, memory_format=contiguous)
    )
