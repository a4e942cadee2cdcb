"""Compiling: one builder among many, killed builders, missing and failing tools, caches, prebuilt libraries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import processes
from helpers.options import ROOT
from sslfast.build import main
from sslfast.kernel_library import (
    BuildError,
    cpu_library,
    digest_of_sources,
    find_ninja,
    host_isa,
    host_module,
    library_name,
)

# Takes --version; else notes the call, waits, and writes the file after -o.
COMPILER = """#!/usr/bin/env {python}
import pathlib, sys, time
if "--version" in sys.argv:
    sys.exit(print("pretend 1.0"))
with open({log!r}, "a") as log:
    log.write("call\\n")
time.sleep({delay})
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"library")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSLFAST_PREBUILT", raising=False)
    return tmp_path / "cache"


def pretend_compiler(folder: Path, delay: float = 0.0, script: str = COMPILER) -> tuple[Path, Path]:
    """A compiler that is quick, and the file where it notes its calls."""
    path, log = folder / "pretend-c++", folder / "calls"
    path.write_text(script.format(python=Path(sys.executable).name, log=str(log), delay=delay))
    path.chmod(0o755)
    return path, log


def start_build(compiler: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "CXX": str(compiler), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [sys.executable, "-m", "sslfast.build"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


LOSS = """
import torch, warnings, sslfast
from sslfast.ops.backend import unavailable
maps = [torch.randn(3, c, 4, 5, 6) for c in (2, 2, 4, 4)]
print(float(sslfast.DualContrastiveLoss(2)(*maps, torch.zeros(1, 4, 5, 6, dtype=torch.long)).loss) > 0)
print(unavailable("cpu"))
"""


def test_two_processes_build_once(cache: Path, tmp_path: Path) -> None:
    compiler, log = pretend_compiler(tmp_path, delay=0.3)
    builders = [start_build(compiler) for _ in range(3)]
    outputs = [b.communicate(timeout=120) for b in builders]
    assert [b.returncode for b in builders] == [0, 0, 0]
    libraries = {out.split()[-1] for out, _ in outputs}
    assert len(libraries) == 1
    assert Path(libraries.pop()).read_bytes() == b"library"
    once = len(log.read_text().splitlines())
    compiled = sum("compiling sslfast_cpu_" in err for _, err in outputs)
    assert compiled == 1
    again = start_build(compiler)
    assert again.communicate(timeout=120)[1] == ""
    assert len(log.read_text().splitlines()) == once


def test_a_killed_builder_leaves_no_lock_and_no_half_library(cache: Path, tmp_path: Path) -> None:
    compiler, log = pretend_compiler(tmp_path, delay=10)
    builder = start_build(compiler)
    while not log.exists():
        time.sleep(0.05)
    os.killpg(builder.pid, signal.SIGKILL)  # not the compilers, which ninja starts in groups of their own
    builder.wait()
    assert not list(cache.rglob(library_name(host_isa())))
    pretend_compiler(tmp_path)  # the same path and version, but quick
    second = start_build(compiler)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert Path(out.split()[-1]).read_bytes() == b"library"
    assert not list(cache.rglob("*.part"))


def test_without_a_compiler_the_reference_runs_and_says_so(cache: Path) -> None:
    result = run_python(LOSS, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "the slow reference runs: cpu: no C++ compiler: looked for no-such-compiler" in result.stderr
    assert "install g++ or clang, or set CXX" in result.stdout
    assert result.stdout.startswith("True")


def test_without_a_compiler_an_explicit_request_fails(cache: Path) -> None:
    for code in ("import sslfast\nwith sslfast.backend('cpu'): pass", LOSS):
        result = run_python(code, CXX="no-such-compiler", SSLFAST_BACKEND="cpu" if code is LOSS else "auto")
        assert result.returncode != 0
        assert "no C++ compiler" in result.stderr.splitlines()[-1]


def test_a_compilers_error_is_shown(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "#!/bin/sh\ncase $1 in --version) echo 1;; *) echo 'voxels.h:3: error: no such thing' >&2; exit 1;; esac\n"
    compiler, _ = pretend_compiler(tmp_path, script=script)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"the compiler failed:\n.*pretend-c\+\+ .*\n.*error: no such thing") as caught:
        cpu_library()
    assert str(caught.value).count("pretend-c++") == 1  # nothing of those that failed beside it
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".lock"}


def test_a_missing_ninja_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, _ = pretend_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="no ninja, which runs the compilers; pip install ninja"):
        cpu_library()


def test_the_ninja_of_the_python_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ninja"
    program.touch(0o755)
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=str(tmp_path)))
    assert find_ninja() == str(program)


def test_sources_may_lie_in_a_folder_of_any_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, _ = pretend_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    (tmp_path / "a: $b" / "cpu").mkdir(parents=True)
    for name in ("bind_cpu.cpp", "cpu/one.cpp"):
        (tmp_path / "a: $b" / name).touch()
    monkeypatch.setattr("sslfast.kernel_library._csrc", lambda: tmp_path / "a: $b")
    assert cpu_library().read_bytes() == b"library"


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, _ = pretend_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("SSLFAST_PREBUILT", raising=False)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot write .*sslfast_cpu_.*set SSLFAST_CACHE"):
        cpu_library()


def test_what_a_library_depends_on_changes_its_place(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, _ = pretend_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    paths = {cpu_library("avx2"), cpu_library("avx512"), cpu_library("baseline")}
    monkeypatch.setenv("SSLFAST_CXXFLAGS", "-g")
    paths.add(cpu_library("avx2"))
    monkeypatch.setattr("torch.__version__", "9.9")
    paths.add(cpu_library("avx2"))
    assert len(paths) == 5


def test_prebuilt_libraries(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = pretend_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    folder = tmp_path / "image"
    result = subprocess.run(
        [sys.executable, "-m", "sslfast.build", "--output", folder, "--isa", "avx2", "avx512"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(folder / library_name("avx2")) in result.stdout
    calls = log.read_text()
    monkeypatch.setenv("SSLFAST_PREBUILT", str(folder))
    assert cpu_library("avx512") == folder / library_name("avx512")
    with pytest.raises(BuildError, match=r"does not exist; build it with python -m sslfast\.build --output"):
        cpu_library("baseline")
    (folder / library_name("avx2")).with_suffix(".sources").write_text("older")
    with pytest.raises(BuildError, match=r"built from other sources .*; rebuild it with python -m sslfast\.build"):
        cpu_library("avx2")
    assert main(["--output", str(folder), "--isa", "avx2"]) == 0  # which is what the message advises
    assert cpu_library("avx2") == folder / library_name("avx2")
    assert log.read_text() == calls


def test_what_python_leaves_beside_the_sources_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslfast.kernel_library._csrc", lambda: tmp_path)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "passes.cu").write_text("one")
    before = digest_of_sources()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "__init__.cpython-312.pyc").write_text("compiled")
    assert digest_of_sources() == before
    (tmp_path / "cuda" / "passes.cu").write_text("two")
    assert digest_of_sources() != before


def test_on_windows_nothing_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    with pytest.raises(BuildError, match="not supported on Windows; the reference implementation runs"):
        cpu_library()


def test_missing_headers_of_python_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match=r"has no Python\.h; install Python's headers"):
        host_module()


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded")
def test_ops_on_any_input_are_the_references_under_the_sanitizers() -> None:
    said = processes.run_python("tests/fuzz_ops.py", "--sanitize", "--examples", "2000", PYTHONPATH=str(ROOT))
    assert "2000 others: the same as the reference" in said
