"""`python -m sslfast.doctor`: what is installed, which backend runs and why not another."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

import sslfast
from sslfast.errors import exit_status


def doctor() -> None:
    """Prints the report."""
    import torch  # which --help does not wait for

    from sslfast.atomic_io import cache_folder
    from sslfast.build import BuildError, host_module
    from sslfast.ops.backend import BACKENDS, unavailable

    print(f"sslfast {sslfast.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for name, extra in _requirements():
        note = f" (extra {extra})" if extra else ""
        print(f"  {name:<14} {_version(name) or 'not installed' + note}")
    print("\nhardware")
    print(
        f"  CPU            {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} of {os.cpu_count()} cores used by torch"
    )
    print(
        f"  CPU bf16       {'native' if torch.cpu._is_avx512_bf16_supported() else 'no AVX-512 BF16: --precision auto means fp32'}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"  GPU {i}          {torch.cuda.get_device_name(i)}")
    else:
        built = torch.version.cuda
        why = (
            "torch is a CPU build"
            if built is None
            else f"torch is built for CUDA {built}, but sees no device: look at nvidia-smi"
        )
        print(f"  GPU            none: {why}")
    for compiler in ("c++", "nvcc"):
        print(f"  {compiler:<14} {'found' if shutil.which(compiler) else 'not found'}")
    try:
        host = host_module()
        facts = host.build_facts()
        print(f"  CPU features   {' '.join(host.cpu_features()) or 'no vector extension that the kernels use'}")
        print(f"  kernels        by {facts['compiler']}, vectors of {facts['vector_bits']} bits")
        if facts["contracts"]:
            print("                 whose flags fuse a * b + c: the last bits differ from those of other machines")
    except BuildError as error:
        print(f"  kernels        not compiled here: {error}")
    print("\nbackends of the losses, the first that is available runs")
    for backend in BACKENDS:
        reason = unavailable(backend)
        print(f"  {backend:<14} {'available' if reason is None else f'no: {reason}'}")
    print(f"\ncache            {cache_folder()} (set SSLFAST_CACHE to move it)")


def _requirements() -> list[tuple[str, str]]:
    """The packages that sslfast asks for and the extra that asks, tools for its development left out."""
    try:
        lines = requires("sslfast") or []
    except PackageNotFoundError:  # a checkout that was not installed
        lines = ["torch", "numpy", "ninja", "triton"]
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        name = requirement.replace("[", " ").replace(">", " ").replace("=", " ").replace("<", " ").split()[0]
        extra = marker.partition("extra == ")[2].strip().strip("\"'")
        if extra not in ("dev", "test") and name not in found:
            found[name] = extra
    return list(found.items())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sslfast.doctor",
        description="Say what is installed, which backend computes the losses here, and why not another.\n\n"
        "Put its output into a bug report.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    return exit_status(doctor)


if __name__ == "__main__":
    sys.exit(main())
