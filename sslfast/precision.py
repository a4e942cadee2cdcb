"""The precision of the networks."""

from __future__ import annotations

import torch

from sslfast.options import Precision


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """bfloat16, or None for float32. "auto": bfloat16 if the hardware multiplies it natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bf16" else None
