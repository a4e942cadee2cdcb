"""A GPU's kernels on a CPU: CUDA's emulated (tests/emulated_cuda.h) instead of the C++ ones, Triton's interpreted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sslfast.atomic_io import cache_folder
from sslfast.kernel_library import ABI, compile_library, digest_of_sources, host_isa, library_name, stamp
from sslfast.ops.backend import LINEAR_LOGITS

ROOT = Path(__file__).parents[2]
BACKEND_IN_REHEARSAL = {"cuda": "cpu", "triton": "triton"}  # whose name the kernels of a GPU's backend go by
RUN = {False: "on a GPU", True: "rehearsal"}
REHEARSES = os.environ.get("SSLFAST_REHEARSAL") == "1"


def environment() -> dict[str, str]:
    """Compiles the emulated kernels if need be, and gives the environment in which a process rehearses."""
    return {"SSLFAST_REHEARSAL": "1", "SSLFAST_PREBUILT": str(emulated_library().parent), "TRITON_INTERPRET": "1"}


def mend_interpreter() -> None:
    """Lets Triton's interpreter before 3.7 run with NumPy 2.5.

    It makes a number of an array of one element, which NumPy 2.5 refuses unless the array has no dimension.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_mend


def store_logits() -> None:
    """In a rehearsal, classifiers store their logits, as on a GPU: its kernels do not compute them from features."""
    if REHEARSES:
        LINEAR_LOGITS.clear()


def emulated_library() -> Path:
    """The library in the cache folder, compiled at its first use; in its folder SSLFAST_PREBUILT finds it.

    Raises:
        BuildError: no ninja, or the compiler's error.
    """
    digest = hashlib.sha256(f"{digest_of_sources()} {torch.__version__}".encode())
    for emulation in sorted((ROOT / "tests").glob("emulated_cuda.*")):
        digest.update(emulation.read_bytes())
    folder = cache_folder().resolve() / "kernels" / f"emulated-{digest.hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as building:
            build_emulated(Path(building) / "library")
            with contextlib.suppress(OSError):  # another process was first
                (Path(building) / "library").rename(folder)
    return folder / library_name(host_isa())


def build_emulated(folder: Path) -> Path:
    """Writes the library into `folder`, from where SSLFAST_PREBUILT serves it as the backend "cpu"; returns its path.

    Raises:
        BuildError: no ninja, or the compiler's error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    sources = [csrc / "bind_cuda.cpp", ROOT / "tests" / "emulated_cuda.cpp"]
    sources += [csrc / "bind_norm.cpp", csrc / "threads.cpp", csrc / "cpu" / "norm_act.cpp"]  # have no CUDA form
    for kernels in sorted((csrc / "cuda").glob("*.cu")):
        if kernels.name != "device.cu":
            sources.append(folder / f"{kernels.stem}.cpp")  # a C++ compiler goes by the suffix
            sources[-1].write_text(f'#include "{kernels}"\n')
    emulation = ["-include", str(ROOT / "tests" / "emulated_cuda.h"), "-DSSLFAST_KEY=CPU"]
    command = ["c++", "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-w", *emulation, ABI]
    library = folder / library_name(host_isa())
    compile_library(library, sources, command)
    stamp(library)
    return library
