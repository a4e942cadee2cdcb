"""How the package hangs together: which modules import which, and when."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "sslfast").rglob("*.py"))
}
COMMANDS = {
    f"sslfast.{name}"
    for name in ("train", "plan", "predict", "evaluate", "rank", "report", "export", "prepare", "doctor", "build")
}
# --help does not wait for torch, nor an import for kernels
AT_START_UP = COMMANDS | {"sslfast.ops.backend", "sslfast.kernel_library"}
# where they are missing, an error says so when they are needed
OPTIONAL = {"h5py", "onnx", "onnxruntime", "SimpleITK", "highdicom", "pydicom", "fcntl"}


def imported(node: ast.stmt) -> list[str]:
    """The modules that an import statement names; `from package import name` names package.name if it is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in FILES else node.module for name in inside]
    return []


def statements(body: list[ast.stmt], in_function: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement that runs, and whether it is inside of a function; without `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node, in_function
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, part, []), inside)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, inside)


IMPORTS = {
    module: [
        (name, in_function)
        for node, in_function in statements(ast.parse(path.read_text()).body)
        for name in imported(node)
    ]
    for module, path in FILES.items()
}


def test_no_module_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for name, in_function in IMPORTS[module]:
            if name in FILES and not in_function and name != module:
                visit(name, (*trail, module))
        done.add(module)

    for module in FILES:
        visit(module, ())


def test_functions_import_nothing_but_for_start_up_or_optional_packages() -> None:
    late = {
        f"{module}: {name}"
        for module, imports in IMPORTS.items()
        for name, in_function in imports
        if in_function and module not in AT_START_UP and name not in OPTIONAL
    }
    assert not late


@pytest.mark.parametrize(
    ("package", "knows_not"),
    [
        ("sslfast.ops", ("sslfast.losses", "sslfast.methods", "sslfast.networks", "sslfast.data", "sslfast.training")),
        ("sslfast.losses", ("sslfast.methods", "sslfast.data", "sslfast.training", "sslfast.networks")),
        ("sslfast.networks", ("sslfast.losses", "sslfast.methods", "sslfast.data", "sslfast.training")),
        ("sslfast.methods", ("sslfast.data", "sslfast.training", "sslfast.networks")),
        ("sslfast.data", ("sslfast.losses", "sslfast.methods", "sslfast.ops", "sslfast.networks", "sslfast.training")),
        ("sslfast.training", tuple(sorted(COMMANDS))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrows_run_one_way(package: str, knows_not: tuple[str, ...]) -> None:
    wrong = {
        f"{module} imports {name}"
        for module, imports in IMPORTS.items()
        if module == package or module.startswith(f"{package}.")
        for name, _ in imports
        if any(name == other or name.startswith(f"{other}.") for other in knows_not)
    }
    assert not wrong


@pytest.mark.parametrize("folder", ["sslfast", "kernels", "benchmarks", "tests", "docs"])
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    long = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.py") if len(p.read_text().splitlines()) > 400}
    assert not long


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_is_shorter_than_150_lines(command: str) -> None:
    assert len(FILES[command].read_text().splitlines()) < 150
