"""Compiles the kernels at their first use and keeps the library in the cache folder.

    python -m sslfast.build            compiles ahead of the first use, e.g. in a container's image
    SSLFAST_PREBUILT=DIR               takes the library from DIR and never compiles; `--output DIR` writes it there

It needs torch, numpy and a compiler, and no GPU. A library's folder is named by a hash of everything that it depends on:
sources, flags, compiler, torch, instruction set.
One process builds and the others wait for its file lock, which the system drops if the builder dies; what is built appears
at once or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from sslfast.atomic_io import cache_folder, make_folder
from sslfast.errors import UserError, exit_status

Isa = Literal["avx512", "avx2", "baseline"]

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC", "--fmad=false")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "baseline": (),
}
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable ABI as of torch 2.10


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why and what to do."""


def build(output: Path | None, isas: Sequence[str], capabilities: Sequence[str]) -> None:
    """Compiles the CPU kernels for these instruction sets, the CUDA kernels for these compute capabilities, if any, and
    prints where the libraries lie.

    Args:
        output: folder for SSLFAST_PREBUILT; None: the cache folder, where the first use looks.
        isas: of `ISA_FLAGS`; none named: this machine's.
        capabilities: such as 9.0.

    Raises:
        UserError: the kernels cannot be compiled here.
    """
    jobs: dict[str, Callable[[], Path]] = {isa: partial(compile_cpu, isa) for isa in isas or (host_isa(),)}
    if capabilities:
        jobs["cuda"] = partial(compile_cuda, capabilities)
    for what, compiled in jobs.items():
        try:
            library = compiled()
        except BuildError as error:
            raise UserError(str(error)) from None
        if output:
            make_folder(output)
            library = Path(shutil.copy(library, output / library.name))
            stamp(library)
        print(f"{what:<9} {library}")


def library_name(isa: str) -> str:
    """The file in SSLFAST_PREBUILT."""
    return f"sslfast_cpu_{isa}.so"


def host_isa() -> Isa:
    """The widest instruction set that torch uses here; ATEN_CPU_CAPABILITY lowers both."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() in ("x86_64", "amd64"):
        if capability.startswith("AVX512"):
            return "avx512"
        if capability == "AVX2":
            return "avx2"
    return "baseline"


def cpu_library(isa: str | None = None) -> Path:
    """The CPU kernels for an instruction set, by default this machine's: SSLFAST_PREBUILT's, else compiled at the first use.

    Raises:
        BuildError: SSLFAST_PREBUILT lacks them or has those of other sources; or as `compile_cpu`.
    """
    isa = isa or host_isa()
    return _prebuilt(library_name(isa), f"--isa {isa}") or compile_cpu(isa)


def cuda_library() -> Path:
    """The CUDA kernels for TORCH_CUDA_ARCH_LIST, or for the GPUs here: SSLFAST_PREBUILT's, else compiled at the first use.

    Raises:
        BuildError: SSLFAST_PREBUILT lacks them or has those of other sources; or as `compile_cuda`.
    """
    return _prebuilt("sslfast_cuda.so", f"--cuda {' '.join(_capabilities())}") or compile_cuda(_capabilities())


def compile_cpu(isa: str) -> Path:
    """The CPU kernels in the cache; compiles them if they are not there.

    Raises:
        BuildError: no compiler, a compiler's error, or no place to write.
    """
    sources = [_csrc() / "bind_cpu.cpp", *sorted((_csrc() / "cpu").glob("*.cpp"))]
    command = [*_compiler(), *FLAGS, *ISA_FLAGS[isa], ABI, *_extra_flags()]
    return _library(f"cpu-{isa}", library_name(isa), sources, command, [f"-L{_torch() / 'lib'}", "-ltorch_cpu"])


def compile_cuda(capabilities: Sequence[str]) -> Path:
    """The CUDA kernels for compute capabilities such as 9.0, in the cache; compiles them if they are not there.

    Raises:
        BuildError: no nvcc, one of another CUDA than torch's, its error, or no place to write.
    """
    nvcc = find_nvcc()
    _check_toolkit(nvcc)
    sources = [_csrc() / "bind_cuda.cpp", *sorted((_csrc() / "cuda").glob("*.cu"))]
    command = [str(nvcc), *CUDA_FLAGS, *(flag for c in capabilities for flag in cuda_architecture(c)), ABI]
    runtime = nvcc.resolve().parent.parent / "lib64"  # torch has loaded its own by the time that this is needed
    libraries = ["-cudart", "shared", f"-L{_torch() / 'lib'}", "-ltorch_cpu", "-Xlinker", f"-rpath={runtime}"]
    return _library(f"cuda-{'-'.join(capabilities)}", "sslfast_cuda.so", sources, command, libraries)


def find_nvcc() -> Path:
    """CUDA's compiler: CUDA_HOME's, else the one on the PATH, else the one in /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        found = shutil.which(candidate)
        if found:
            return Path(found)
    where = f"CUDA_HOME is {home}" if home else "it is not on the PATH"
    raise BuildError(f"no nvcc ({where}); install NVIDIA's CUDA toolkit or set CUDA_HOME; the Triton kernels need none")


def cuda_architecture(capability: str) -> list[str]:
    """nvcc's flags for a compute capability such as 9.0, or 9.0+PTX for later ones too."""
    number = capability.removesuffix("+PTX").replace(".", "")
    if not number.isdigit():
        raise BuildError(f"{capability!r} is no compute capability; name one such as 8.0, 9.0 or 9.0+PTX")
    flags = ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    if capability.endswith("+PTX"):
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def _capabilities() -> list[str]:
    import torch

    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if named:
        return named
    return sorted({".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())})


def _check_toolkit(nvcc: Path) -> None:
    import torch

    report = subprocess.run(
        [nvcc, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
    found = report.partition("release ")[2].partition(",")[0]
    wanted = torch.version.cuda
    if wanted and found.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(
            f"{nvcc} is of CUDA {found or 'unknown'}, torch of CUDA {wanted}; install CUDA {wanted} and set CUDA_HOME to it;"
            " the Triton kernels need no nvcc"
        )


def _prebuilt(name: str, flags: str) -> Path | None:
    folder = os.environ.get("SSLFAST_PREBUILT")
    if not folder:
        return None
    library = Path(folder) / name
    remedy = f"python -m sslfast.build --output {folder} {flags}"
    if not library.is_file():
        raise BuildError(f"SSLFAST_PREBUILT is set, but {library} does not exist: {remedy}")
    if not _stamp_of(library).is_file() or _stamp_of(library).read_text() != digest_of_sources():
        raise BuildError(f"{library} was built from other sources than this sslfast's: {remedy}")
    return library


def stamp(library: Path) -> None:
    """Notes beside a library for SSLFAST_PREBUILT which sources it was built from; only they may use it."""
    _stamp_of(library).write_text(digest_of_sources())


def _stamp_of(library: Path) -> Path:
    return library.with_suffix(".sources")


def digest_of_sources() -> str:
    """Of the kernels' C++ and CUDA sources: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(_csrc().rglob("*")):
        if file.suffix in (".h", ".cuh", ".cpp", ".cu"):
            digest.update(file.relative_to(_csrc()).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def host_module() -> ModuleType:
    """csrc/host.cpp: `cpu_features()` and `build_facts()`; compiled if need be, with the kernels' compiler and flags.

    Raises:
        BuildError: as `cpu_library`, or Python's headers are missing.
    """
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise BuildError(f"{headers} has no Python.h; install Python's headers (python3-dev)")
    name = f"sslfast_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [*ISA_FLAGS[host_isa()], "-O1", "-fvisibility=hidden", "-I", str(headers)]
    command = [*_compiler(), *FLAGS, *flags, *_extra_flags()]
    spec = spec_from_file_location("sslfast_host", _library("host", name, [_csrc() / "host.cpp"], command, []))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _csrc() -> Path:
    return Path(import_module("sslfast.csrc").__path__[0])


def _torch() -> Path:
    import torch

    return Path(torch.__file__).parent


def _library(what: str, name: str, sources: Sequence[Path], command: Sequence[str], libraries: Sequence[str]) -> Path:
    """The library `name` that a compiler's command makes of these sources, in a folder of the cache named by all of it."""
    if platform.system() == "Windows":
        raise BuildError("compiling the kernels is not supported on Windows; the reference implementation runs")
    command = [*command, "-I", str(_torch() / "include")]
    folder = cache_folder() / "kernels" / f"{what}-{_key(command, sources)}"
    library = folder / name
    if library.is_file():
        return library
    try:
        make_folder(folder.parent)
        with _lock(folder.with_suffix(".lock")):
            if not library.is_file():
                _compile(what, command, sources, library, libraries)
    except (UserError, OSError) as error:
        raise BuildError(f"cannot write the compiled kernels to {folder.parent}: {error}; set SSLFAST_CACHE") from error
    return library


def _compiler() -> list[str]:
    named = os.environ.get("CXX", "").split()
    for candidate in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(candidate[0]):
            return candidate
    tried = named[0] if named else "c++, g++ and clang++"
    raise BuildError(f"no C++ compiler: looked for {tried}; install g++ or clang, or set CXX")


def _extra_flags() -> list[str]:
    return os.environ.get("SSLFAST_CXXFLAGS", "").split()  # e.g. sanitizers


def _key(command: Sequence[str], sources: Sequence[Path]) -> str:
    import torch

    version = subprocess.run(
        [command[0], "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
    facts = [*command, version, torch.__version__, str(torch.version.git_version), platform.machine()]
    digest = hashlib.sha256("\0".join(facts).encode())
    for file in [*sources, *sorted(_csrc().rglob("*.h")), *sorted(_csrc().rglob("*.cuh"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; a dead holder's lock is free."""
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(
                f"sslfast: waiting for process {file.read() or '?'} to compile the kernels", file=sys.stderr, flush=True
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _compile(
    what: str, command: Sequence[str], sources: Sequence[Path], library: Path, libraries: Sequence[str]
) -> None:
    """Compiles into a folder beside the library's and renames it."""
    started = time.perf_counter()
    print(f"sslfast: compiling the library {what}, once for this machine ...", end="", file=sys.stderr, flush=True)
    folder = library.parent
    work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))

    def compile_one(source: Path) -> Path:
        target = work / f"{source.stem}.o"
        _run([*command, "-c", str(source), "-o", str(target)])
        return target

    try:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or min(len(sources), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources))
        _run([*command, "-shared", *map(str, objects), *libraries, "-o", str(work / library.name)])
        for file in objects:
            file.unlink()
        work.rename(folder)
    except BaseException:
        print(" failed", file=sys.stderr)
        shutil.rmtree(work, ignore_errors=True)
        raise
    print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode:
        output = (result.stderr or result.stdout).strip().splitlines()
        first = next((i for i, line in enumerate(output) if "error" in line.lower()), 0)
        raise BuildError(
            "the compiler failed:\n  " + " ".join(command) + "\n  " + "\n  ".join(output[first : first + 8])
        )


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
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for SSLFAST_PREBUILT (default: the cache folder, where the first use looks)",
    )
    parser.add_argument(
        "--isa",
        nargs="+",
        choices=get_args(Isa),
        default=[],
        help="instruction sets of the CPU kernels (default: this machine's)",
    )
    parser.add_argument(
        "--cuda",
        nargs="+",
        default=[],
        metavar="CAPABILITY",
        help="compute capabilities, such as 8.0 9.0, to compile the CUDA kernels for too; needs nvcc, no GPU",
    )
    flags = parser.parse_args(argv)
    return exit_status(partial(build, flags.output, flags.isa, flags.cuda))


if __name__ == "__main__":
    sys.exit(main())
