"""`sslfast build`: compiles the kernels ahead of their first use, for instance in a container's image."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sslfast.atomic_io import make_folder
from sslfast.errors import exit_status
from sslfast.kernel_library import ISA_FLAGS, compile_cpu, compile_cuda, host_isa, stamp
from sslfast.renamed import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)


def build(output: Path | None, isas: Sequence[str], capabilities: Sequence[str]) -> None:
    """Compiles kernels and prints the paths of the libraries.

    Args:
        output: folder for SSLFAST_PREBUILT; None: the cache folder.
        isas: instruction sets of the CPU kernels; none: this machine's.
        capabilities: compute capabilities of the CUDA kernels, such as 9.0; none: no CUDA kernels.

    Raises:
        BuildError: they cannot be compiled here; the message says why and what to do.
    """
    jobs = [partial(compile_cpu, isa) for isa in isas or (host_isa(),)]
    jobs += [partial(compile_cuda, capabilities)] if capabilities else []
    for job in jobs:
        library = job()
        if output:
            make_folder(output)
            library = Path(shutil.copy(library, output / library.name))
            stamp(library)
        print(library)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sslfast.build",
        description="Compile the kernels now instead of at their first use.",
        epilog="In a container's image, where the compiler will be gone:\n"
        "    python -m sslfast.build --output /opt/sslfast --isa avx512 avx2 --cuda 9.0\n"
        "    ENV SSLFAST_PREBUILT=/opt/sslfast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder for SSLFAST_PREBUILT (default: the cache folder)")
    isa = "instruction sets of the CPU kernels (default: this machine's)"
    cuda = "also compile the CUDA kernels, for compute capabilities such as 8.0 9.0; needs nvcc"
    add("--isa", nargs="+", choices=list(ISA_FLAGS), default=[], help=isa)
    add("--cuda", nargs="+", metavar="CAPABILITY", default=[], help=cuda)
    flags = parser.parse_args(argv)
    return exit_status(partial(build, flags.output, flags.isa, flags.cuda))


if __name__ == "__main__":
    sys.exit(main())
