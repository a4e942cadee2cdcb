"""The package as it is installed: what the wheel holds, what an import costs, what the commands say."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.options import ROOT
from helpers.processes import run_python

COMMANDS = ("train", "evaluate", "predict", "prepare", "doctor")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    assert path.name.endswith("py3-none-any.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_one_top_level_package(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sslfast"}


def test_the_wheel_holds_every_module_and_every_source(wheel: list[str]) -> None:
    for folder, inside in (("sslfast", "sslfast"), ("csrc", "sslfast/csrc"), ("kernels", "sslfast/kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu") or path.name == "py.typed":
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in wheel


def test_setup_imports_nothing_but_setuptools() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"setuptools"}


def modules_after(code: str) -> set[str]:
    """The names of the modules that are loaded after it."""
    return set(run_python("-c", f"{code}\nimport sys; print(*sys.modules)").split())


def test_the_losses_need_torch_and_numpy_alone() -> None:
    loaded = modules_after("import sslfast; sslfast.DualContrastiveLoss(2)")
    assert "torch" in loaded
    assert not loaded & {"monai", "nibabel", "scipy", "matplotlib", "tyro", "yaml", "tensorboard"}


def test_the_package_itself_does_not_wait_for_torch() -> None:
    assert "torch" not in modules_after("import sslfast")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_without_torch(command: str) -> None:
    assert not modules_after(f"import sslfast.{command}") & {"torch", "monai", "nibabel"}
    assert f"python -m sslfast.{command}" in run_python("-m", f"sslfast.{command}", "--help")


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {"tyro", "yaml", "monai", "nibabel", "scipy", "hypothesis", "tqdm", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path[:] = [Absent(), *(finder for finder in sys.meta_path if "editable" not in repr(finder).lower())]
sys.path.insert(0, sys.argv[1])
"""
LOSS = """
import torch, sslfast, sslfast.build, sslfast.doctor, sslfast.kernels
assert sslfast.__file__.startswith(sys.argv[1]) and sslfast.kernels.__file__.startswith(sys.argv[1])
assert sslfast.doctor.main("--patch 8 8 8 --width 2 --depth 2".split()) == 0
assert sslfast.build.main([]) == 0
maps = [torch.randn(3, c, 4, 5, 6) for c in (2, 2, 4, 4)]
with sslfast.backend("cpu"):
    print(float(sslfast.DualContrastiveLoss(2)(*maps, torch.zeros(1, 4, 5, 6, dtype=torch.long)).loss) > 0)
"""
REASONS = """
from sslfast.ops.backend import BACKENDS, unavailable
print([unavailable(name) for name in BACKENDS])
"""


def test_a_checkout_that_was_not_installed_runs_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for folder in ("sslfast", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)

    def run_bare(code: str) -> str:
        command = [sys.executable, "-c", BARE + code, str(tmp_path)]
        return subprocess.run(command, cwd="/", stdout=subprocess.PIPE, text=True, check=True).stdout

    assert run_bare(LOSS).endswith("True\n")
    shutil.rmtree(tmp_path / "csrc")
    assert "No module named 'sslfast.csrc'" in run_bare(REASONS)


def test_the_api_reference_is_that_of_the_docstrings() -> None:
    page = ROOT / "docs" / "api.md"
    before = page.read_text()
    written = run_python("-c", "import runpy; print(runpy.run_path('docs/api.py')['render'](), end='')")
    assert written == before, "run: python docs/api.py"
