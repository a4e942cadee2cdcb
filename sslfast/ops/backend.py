"""Which backend runs the ops, and why another cannot.

By default each call uses the first available backend that computes its tensors. A backend that is requested by name but
not available is an error.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sslfast.ops.check import VoxelMap
from sslfast.ops.registry import LIBRARIES

BACKENDS = ("cuda", "triton", "cpu", "reference")

LINEAR_LOGITS = ["cpu"]  # the devices whose kernels compute logits from features

_requested = os.environ.get("SSLFAST_BACKEND", "auto")
_reasons: dict[str, str | None] = {"reference": None}


def ops_for(values: VoxelMap) -> Any:
    """The namespace of `torch.ops` whose kernels compute this tensor."""
    return torch.ops.sslfast_triton if _runs_triton(values.device.type, _requested) else torch.ops.sslfast


def norm_ops_for(x: VoxelMap) -> Any:
    """The namespace whose kernels compute `norm_act` of this tensor; None if the reference does.

    On a GPU that is Triton's, whichever backend computes the losses: CUDA C++ has no kernels of it.
    """
    if not runs_fused(x):
        return None
    if x.device.type != "cuda":
        return ops_for(x)
    return torch.ops.sslfast_triton if _has_triton() else None


def has_linear_logits(values: VoxelMap) -> bool:
    """True if the kernels that compute this tensor take `LinearLogits`."""
    return _has_linear_logits(values.device.type, _requested)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op within the block on this backend.

    It is "cpu" (C++), "cuda" (CUDA C++), "triton", "reference" (plain PyTorch), or "auto" for the best one available.

        with sslfast.backend("reference"):
            result = criterion(...)

    The environment variable SSLFAST_BACKEND sets it for the whole process.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run here; the message says why.
    """
    global _requested
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend is {name!r}; it must be auto or one of {', '.join(BACKENDS)}")
    reason = None if name == "auto" else unavailable(name)
    if reason:
        raise RuntimeError(f"the backend {name!r} cannot run here: {reason}")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def unavailable(name: str) -> str | None:
    """Why this backend cannot run here, or None if it can. The first call compiles and loads it."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if name not in _reasons:
        _reasons[name] = _LOAD[name]()
    return _reasons[name]


def runs_fused(*tensors: VoxelMap) -> bool:
    """True if kernels compute these tensors; False if the reference does: float64, or a device without kernels.

    Raises:
        RuntimeError: the requested backend cannot run here.
        TypeError: the requested backend does not compute this dtype.
    """
    return _runs_fused(tensors[0].device.type, all(t.dtype != torch.float64 for t in tensors), _requested)


def _runs_fused(device: str, fits: bool, requested: str) -> bool:
    if requested == "reference":
        return False
    if requested == "auto":
        backends = FUSED.get(device, ())
        if not fits or not backends:
            return False
        first = any(name not in _reasons for name in backends)
        reasons = {}
        for name in backends:
            reason = unavailable(name)
            if reason is None:
                return True
            reasons[name] = reason
        if first:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            warnings.warn(f"no kernels can run here, so the slow reference runs: {why}", stacklevel=4)
        return False
    reason = unavailable(requested)
    if reason or device != _device_of(requested):
        raise RuntimeError(f"the backend {requested!r} was requested, but {reason or f'the tensors are on {device}'}")
    if not fits:
        raise TypeError(f"the backend {requested!r} computes float32, bfloat16 and float16 only")
    return True


def _runs_triton(device: str, requested: str) -> bool:
    if requested == "triton":
        return device == _device_of("triton")
    return device == "cuda" and requested != "cuda" and unavailable("cuda") is not None


def _has_linear_logits(device: str, requested: str) -> bool:
    return device in LINEAR_LOGITS and not _runs_triton(device, requested)


def _has_triton() -> bool:
    return unavailable("triton") is None


# What torch.compiler.assume_constant_result does; importing that takes a second
for _function in (_runs_fused, _runs_triton, _has_linear_logits, _has_triton):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def _device_of(name: str) -> str:
    """The device whose tensors this backend computes."""
    return "cpu" if name == "cpu" or (name == "triton" and _is_interpreting()) else "cuda"


def _is_interpreting() -> bool:
    """True if Triton runs its kernels in Python, on the CPU: for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_cpu() -> str | None:
    from sslfast.kernel_library import cpu_library

    return _load(cpu_library)


def _load_cuda() -> str | None:
    from sslfast.kernel_library import cuda_library

    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if major < 8:
        return f"a GPU here has compute capability {major}.{minor}; the CUDA kernels need 8.0"
    reason = _load(cuda_library)
    if reason is None:
        try:  # launch a kernel: the library may have been built for other GPUs
            torch.ops.sslfast.voxel_entropy(torch.zeros(1, 2, 1, device="cuda"), None)
        except RuntimeError as error:
            return f"its kernels do not start on {torch.cuda.get_device_name()}: {error}"
    return reason


def _load(library: Callable[[], Path]) -> str | None:
    """Builds or finds a library and loads it. Returns why that failed, or None."""
    try:
        torch.ops.load_library(library())
    except (OSError, ImportError, RuntimeError) as error:  # a BuildError is a RuntimeError
        return str(error)
    return None


def _load_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; torch's GPU builds include it"
    if not (_is_interpreting() or torch.cuda.is_available()):
        return "no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests"
    try:
        from sslfast.kernels import IMPLEMENTATIONS
    except (
        OSError,
        ImportError,
        RuntimeError,
        AttributeError,
    ) as error:  # the versions of Triton, torch and the driver may not match
        return f"its kernels cannot be imported: {error}"

    for name, implementation in IMPLEMENTATIONS.items():
        LIBRARIES["sslfast_triton"].impl(name, implementation, _device_of("triton").upper())
    return None


FUSED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the backends of each device, best first
_LOAD = {"cuda": _load_cuda, "triton": _load_triton, "cpu": _load_cpu}
