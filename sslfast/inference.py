"""Whole volumes through both networks: sliding window, mean of the two softmaxes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslfast.checkpoint import Model
from sslfast.data.nifti import Volume
from sslfast.data.volumes import from_grid, image_to_grid
from sslfast.errors import UserError
from sslfast.options import Device, Precision, Windows


def choose_device(name: Device) -> torch.device:
    """The device that the flag `--device` means (UserError: no GPU)."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; `python -m sslfast.doctor` says why. Use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None for float32. "auto" takes bfloat16 where the hardware multiplies it natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bf16" else None


@torch.inference_mode()
def predict_probabilities(
    model: Model, image: np.ndarray, *, precision: Precision = "auto", windows: Windows | None = None
) -> Tensor:
    """Class probabilities of a prepared scan: the mean of both networks' softmax, averaged over windows.

    With constant weights and strides 18, 18 and 4 this is arXiv 2311.12617's test protocol.

    Args:
        model: its networks must be in evaluation mode.
        image: [X, Y, Z] float32 on the networks' grid.
        windows: where they lie and how they are weighted.

    Returns:
        [C, X, Y, Z] float32 on the CPU.
    """
    from monai.inferers import sliding_window_inference

    windows = windows or Windows()
    device = next(model.network_a.parameters()).device
    dtype = autocast_dtype(precision, device)

    def mean_softmax(patches: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = [network(patches)[0] for network in (model.network_a, model.network_b)]
        return (logits[0].float().softmax(1) + logits[1].float().softmax(1)) / 2

    result = sliding_window_inference(
        torch.from_numpy(np.asarray(image))[None, None],
        model.patch,
        windows.at_once or (4 if device.type == "cuda" else 1),
        mean_softmax,
        overlap=_overlaps(windows, model.patch),
        mode=windows.blend,
        cval=float(image.min()),
        sw_device=device,
        device="cpu",
    )
    return result[0]


def _overlaps(windows: Windows, patch: tuple[int, int, int]) -> tuple[float, ...]:
    """By axis, such that MONAI steps on by whole voxels: int(size * (1 - overlap))."""
    if windows.strides is None:
        return (windows.overlap,) * 3
    return tuple(
        max(0.0, 1 - (stride + 0.5) / size) if stride < size else 0.0
        for stride, size in zip(windows.strides, patch, strict=True)
    )


def segment(
    model: Model, volume: Volume, *, precision: Precision = "auto", windows: Windows | None = None
) -> np.ndarray:
    """The label map of a scan on the scan's own grid: [X, Y, Z] uint8."""
    probabilities = predict_probabilities(
        model, image_to_grid(volume, model.preprocessing), precision=precision, windows=windows
    )
    return from_grid(probabilities, volume, model.preprocessing).argmax(0).to(torch.uint8).numpy()
