"""`python -m sslfast.doctor`: what is installed, which backend runs, and whether bfloat16 convolutions are right."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import sslfast
from sslfast.errors import exit_status


def doctor() -> None:
    """Prints what is installed and which backend runs."""
    import torch  # here, so that --help does not wait for it

    from sslfast.atomic_io import cache_folder
    from sslfast.kernel_library import BuildError, host_module
    from sslfast.ops.backend import BACKENDS, unavailable

    print(f"sslfast {sslfast.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for name, extra in _requirements():
        note = f" (extra {extra})" if extra else ""
        print(f"  {name:<14} {_version(name) or 'not installed' + note}")
    print("\nhardware")
    print(
        f"  CPU            {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} of {os.cpu_count()} cores used by torch"
    )
    print(
        "  CPU bf16       "
        f"{'native' if torch.cpu._is_avx512_bf16_supported() else 'no AVX-512 BF16: --precision auto means fp32'}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"  GPU {i}          {torch.cuda.get_device_name(i)}")
    else:
        built = torch.version.cuda
        why = (
            "torch is a CPU build"
            if built is None
            else f"torch is built for CUDA {built} but sees no device; check nvidia-smi"
        )
        print(f"  GPU            none: {why}")
    for compiler in ("c++", "nvcc"):
        print(f"  {compiler:<14} {'found' if shutil.which(compiler) else 'not found'}")
    try:
        host = host_module()
        facts = host.build_facts()
        print(f"  CPU features   {' '.join(host.cpu_features()) or 'none that the kernels use'}")
        print(f"  kernels        compiled by {facts['compiler']}, vectors of {facts['vector_bits']} bits")
        if facts["contracts"]:
            print("                 with flags that fuse a * b + c: the last bits differ from those of other machines")
    except BuildError as error:
        print(f"  kernels        cannot be compiled here: {error}")
    print("\nbackends of the losses; the first available one runs")
    for backend in BACKENDS:
        reason = unavailable(backend)
        print(f"  {backend:<14} {'available' if reason is None else f'no: {reason}'}")
    print(f"\ncache            {cache_folder()} (set SSLFAST_CACHE to move it)")


def _requirements() -> list[tuple[str, str]]:
    """The packages that sslfast requires, with the extra that requires them; without the development tools."""
    try:
        lines = requires("sslfast") or []
    except PackageNotFoundError:  # a clone that is not installed
        lines = ["torch", "numpy", "ninja", "triton"]
    extras = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        name = requirement.replace("[", " ").replace(">", " ").replace("=", " ").replace("<", " ").split()[0]
        extra = marker.partition("extra == ")[2].strip().strip("\"'")
        if extra not in ("dev", "test") and name not in extras:
            extras[name] = extra
    return list(extras.items())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sslfast.doctor",
        description="Report what is installed, which backend computes the losses here, and why the others do not.\n"
        "Then compare the bfloat16 convolutions of a training run with float32: on some CPUs they have been wrong.\n\n"
        "Include its output in a bug report.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN|FILE", help="compare at the shapes of this run, not of the defaults"
    )
    parser.add_argument(
        "--patch", type=int, nargs=3, metavar=("X", "Y", "Z"), help="compare at the shapes of this patch"
    )
    parser.add_argument("--width", type=int, help="with networks of this width")
    parser.add_argument("--depth", type=int, help="with networks of this depth")
    parser.add_argument(
        "--no-convolutions", action="store_true", help="leave out the comparison (10 s on 2 free cores)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        doctor()
        if not flags.no_convolutions:
            from sslfast.convolution_check import check_convolutions

            check_convolutions(flags.run, flags.patch, flags.width, flags.depth)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
