"""The compiled kernels: compiled at their first use, kept in the cache folder.

    SSLFAST_PREBUILT=DIR    takes the libraries from DIR and never compiles; `python -m sslfast.build` writes them there
    MAX_JOBS=N              limits how many compilers run at a time

Compiling needs torch, ninja and a compiler, and no GPU. A hash of everything that a library depends on names its
folder: sources, flags, compiler, torch, instruction set. One process compiles and the others wait for its file lock,
which the system drops if the process dies; the library appears at once or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from sslfast.atomic_io import cache_folder
from sslfast.errors import UserError

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC", "--fmad=false")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "baseline": (),
}
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable ABI as of torch 2.10


class BuildError(UserError, RuntimeError):
    """The kernels cannot be compiled here; the message says why and what to do."""


def library_name(isa: str) -> str:
    """The file in SSLFAST_PREBUILT."""
    return f"sslfast_cpu_{isa}.so"


def host_isa() -> str:
    """The widest instruction set that torch uses here; ATEN_CPU_CAPABILITY lowers both."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "avx512"
    return "avx2" if capability == "AVX2" else "baseline"


def cpu_library(isa: str | None = None) -> Path:
    """The CPU kernels for an instruction set, by default this machine's: SSLFAST_PREBUILT's, else compiled.

    Raises:
        BuildError: SSLFAST_PREBUILT lacks them or has those of other sources; or as `compile_cpu`.
    """
    isa = isa or host_isa()
    return _prebuilt(library_name(isa), f"--isa {isa}") or compile_cpu(isa)


def cuda_library() -> Path:
    """The CUDA kernels for TORCH_CUDA_ARCH_LIST, or for the GPUs here: SSLFAST_PREBUILT's, else compiled.

    Raises:
        BuildError: SSLFAST_PREBUILT lacks them or has those of other sources; or as `compile_cuda`.
    """
    return _prebuilt("sslfast_cuda.so", f"--cuda {' '.join(_capabilities())}") or compile_cuda(_capabilities())


def compile_cpu(isa: str) -> Path:
    """The CPU kernels in the cache, for one of `ISA_FLAGS`; compiles them if they are not there."""
    others = {"bind_cuda.cpp", "host.cpp"}  # of other libraries
    bindings = [file for file in sorted(_csrc().glob("*.cpp")) if file.name not in others]
    sources = [*bindings, *sorted((_csrc() / "cpu").glob("*.cpp"))]
    return _library(library_name(isa), sources, _cxx(*ISA_FLAGS[isa], ABI))


def compile_cuda(capabilities: Sequence[str]) -> Path:
    """The CUDA kernels in the cache, for compute capabilities such as 9.0; compiles them if they are not there."""
    nvcc = find_nvcc()
    _check_toolkit(nvcc)
    sources = [_csrc() / "bind_cuda.cpp", *sorted((_csrc() / "cuda").glob("*.cu"))]
    runtime = nvcc.resolve().parent.parent / "lib64"  # torch has loaded its own by the time that this is needed
    linking = ["-cudart", "shared", "-Xlinker", f"-rpath={runtime}"]
    architectures = [flag for capability in capabilities for flag in cuda_architecture(capability)]
    return _library("sslfast_cuda.so", sources, [str(nvcc), *CUDA_FLAGS, *architectures, ABI, *linking])


def find_nvcc() -> Path:
    """CUDA's compiler: CUDA_HOME's, else the one on the PATH, else the one in /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        path = shutil.which(candidate)
        if path:
            return Path(path)
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
    present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return named or [f"{major}.{minor}" for major, minor in sorted(present)]


def _check_toolkit(nvcc: Path) -> None:
    import torch

    version = _run(str(nvcc), "--version").stdout.partition("release ")[2].partition(",")[0]
    wanted = torch.version.cuda
    if wanted and version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(
            f"{nvcc} belongs to CUDA {version or 'unknown'}, but torch was built for CUDA {wanted}; install that "
            "version and set CUDA_HOME to it; the Triton kernels need no nvcc"
        )


def _prebuilt(name: str, flags: str) -> Path | None:
    folder = os.environ.get("SSLFAST_PREBUILT")
    if not folder:
        return None
    library = Path(folder) / name
    remedy = f"python -m sslfast.build --output {folder} {flags}"
    if not library.is_file():
        raise BuildError(f"SSLFAST_PREBUILT is set, but {library} does not exist; build it with {remedy}")
    built_from = library.with_suffix(".sources")
    if not built_from.is_file() or built_from.read_text() != digest_of_sources():
        raise BuildError(f"{library} was built from other sources than this sslfast's; rebuild it with {remedy}")
    return library


def stamp(library: Path) -> None:
    """Notes beside a library for SSLFAST_PREBUILT which sources it was built from; only they may use it."""
    library.with_suffix(".sources").write_text(digest_of_sources())


def digest_of_sources() -> str:
    """Digest of the kernels' C++ and CUDA sources: 64 hexadecimal digits."""
    return _digest(file for file in sorted(_csrc().rglob("*")) if file.suffix in (".h", ".cuh", ".cpp", ".cu"))


def _digest(files: Iterable[Path], *facts: str) -> str:
    digest = hashlib.sha256("\0".join(facts).encode())
    for file in files:
        digest.update(file.relative_to(_csrc()).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def host_module() -> ModuleType:
    """csrc/host.cpp by the kernels' compiler and flags: `cpu_features()`, `build_facts()`, `constants()`.

    Raises:
        BuildError: as `cpu_library`, or Python's headers are missing.
    """
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise BuildError(f"{headers} has no Python.h; install Python's headers (python3-dev)")
    name = f"sslfast_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = _cxx(*ISA_FLAGS[host_isa()], "-fvisibility=hidden", "-I", str(headers))
    loader = ExtensionFileLoader("sslfast_host", str(_library(name, [_csrc() / "host.cpp"], command)))
    module = module_from_spec(ModuleSpec(loader.name, loader, origin=loader.path))
    loader.exec_module(module)
    return module


def _cxx(*flags: str) -> list[str]:
    """The C++ compiler with our flags, these, and the user's, such as sanitizers."""
    named = os.environ.get("CXX", "").split()
    for candidate in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(candidate[0]):
            return [*candidate, *FLAGS, *flags, *os.environ.get("SSLFAST_CXXFLAGS", "").split()]
    tried = named[0] if named else "c++, g++ and clang++"
    raise BuildError(f"no C++ compiler: looked for {tried}; install g++ or clang, or set CXX")


def _library(name: str, sources: Sequence[Path], command: Sequence[str]) -> Path:
    """The library that a compiler's command makes of these sources, in a folder of the cache named by all of it."""
    if platform.system() == "Windows":
        raise BuildError("compiling the kernels is not supported on Windows; the reference implementation runs")
    library = cache_folder() / "kernels" / f"{name.partition('.')[0]}-{_key(sources, command)}" / name
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _lock(library.with_suffix(".lock")):
            if not library.is_file():
                started = time.perf_counter()
                print(f"sslfast: compiling {name}, once for this machine ...", file=sys.stderr, flush=True)
                compile_library(library, sources, command)
                print(f"sslfast: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    except OSError as error:
        raise BuildError(f"cannot write {library}: {error}; set SSLFAST_CACHE") from error
    return library


def _key(sources: Sequence[Path], command: Sequence[str]) -> str:
    import torch

    facts = [*command, _run(command[0], "--version").stdout, platform.machine()]
    facts += [torch.__file__, torch.__version__, str(torch.version.git_version)]
    headers = [*sorted(_csrc().rglob("*.h")), *sorted(_csrc().rglob("*.cuh"))]
    return _digest([*sources, *headers], *facts)[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; a dead holder's lock is free."""
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text() or "?"
            print(f"sslfast: waiting for process {holder} to compile the kernels", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        path.write_text(str(os.getpid()))
        yield


def compile_library(library: Path, sources: Sequence[Path], command: Sequence[str]) -> None:
    """Compiles a library that uses torch, in a folder beside it, and moves it into place.

    Args:
        command: the compiler, and the flags both for compiling and for linking.

    Raises:
        BuildError: no ninja, or the compiler's error.
    """
    for left in library.parent.glob(f"{library.name}.*.part"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(".part", f"{library.name}.", library.parent, ignore_cleanup_errors=True) as folder:
        _run_ninja(Path(folder), library.name, sources, command)
        (Path(folder) / library.name).rename(library)


def _run_ninja(folder: Path, target: str, sources: Sequence[Path], command: Sequence[str]) -> None:
    import torch

    home = Path(torch.__file__).parent
    compiler, include, libraries = (
        shlex.join(words).replace("$", "$$")
        for words in (command, ["-I", str(home / "include")], ["-L", str(home / "lib"), "-ltorch_cpu"])
    )
    lines = [
        f"rule compile\n  command = {compiler} {include} -c $in -o $out",
        f"rule link\n  command = {compiler} -shared $in {libraries} -o $out",
        *(f"build {s.stem}.o: compile " + re.sub("([$ :])", r"$\1", str(s.absolute())) for s in sources),
        f"build {target}: link " + " ".join(f"{s.stem}.o" for s in sources),
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    ninja = _run(find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else []))
    if ninja.returncode:
        output = ninja.stdout + ninja.stderr
        failed = re.split(r"\n\[\d+/\d+\] |\nninja: ", output.partition("FAILED: ")[2])[0].splitlines()[1:]
        failed = failed or [output]  # the first command that failed, and what it printed
        first = next((i for i, line in enumerate(failed) if i and "error" in line.lower()), 1)
        raise BuildError("\n  ".join(["the compiler failed:", failed[0], *failed[first : first + 8]]))


def find_ninja() -> str:
    """The Python package's program, else the one on the PATH."""
    try:
        from ninja import BIN_DIR as folder
    except ImportError:
        folder = None
    ninja = shutil.which("ninja", path=folder) or shutil.which("ninja")
    if not ninja:
        raise BuildError("no ninja, which runs the compilers; pip install ninja")
    return ninja


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _csrc() -> Path:
    return Path(import_module("sslfast.csrc").__path__[0])
