"""The CUDA kernels' code compiled for the CPU (tests/emulated_cuda.h), in the place of the C++ kernels: for machines without a GPU."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sslfast.build import ABI, host_isa, library_name, stamp

ROOT = Path(__file__).parents[2]


def build_emulated(folder: Path) -> Path:
    """Writes the library into `folder`, from where SSLFAST_PREBUILT serves it as the backend "cpu"; returns its path.

    Raises:
        subprocess.CalledProcessError: the compiler's error.
    """
    headers = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-w", "-x", "c++", "-I", str(headers), ABI]
    emulation = ["-include", str(ROOT / "tests" / "emulated_cuda.h"), "-DSSLFAST_KEY=CPU"]
    sources = [p for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if p.name != "device.cu"]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["c++", *flags, *emulation, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(
            pool.map(compile_one, [*sources, ROOT / "csrc" / "bind_cuda.cpp", ROOT / "tests" / "emulated_cuda.cpp"])
        )
    library = folder / library_name(host_isa())
    subprocess.run(
        ["c++", "-shared", *objects, f"-L{headers.parent / 'lib'}", "-ltorch_cpu", "-o", library], check=True
    )
    for file in objects:
        file.unlink()
    stamp(library)
    return library


if __name__ == "__main__":
    print(build_emulated(Path(sys.argv[1])))
