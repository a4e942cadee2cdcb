"""Which implementation of the ops runs, and why not another."""

from __future__ import annotations

from importlib import resources

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the first that is available and fits the tensors' device runs

_SOURCES = {"cuda": ("sslfast.csrc", "cuda"), "triton": ("sslfast.kernels", ""), "cpu": ("sslfast.csrc", "cpu")}


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here, or None if it can."""
    if backend == "reference":
        return None
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    package, folder = _SOURCES[backend]
    place = resources.files(package) / folder if folder else resources.files(package)
    kernels = (
        [f.name for f in place.iterdir() if f.name.endswith((".cu", ".cpp", ".py")) and f.name != "__init__.py"]
        if place.is_dir()
        else []
    )
    return None if kernels else "this version has no fused kernels for it yet"
