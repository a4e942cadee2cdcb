"""The list of mutations fits the sources, and the run over it tells which of them are noticed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from mutants import LIST, ROOT, main, mutated, read_mutations

MUTATIONS = read_mutations(ROOT)
BACKENDS = {"Python": {""}, "Triton": {"triton-interpreted"}, "C++": {"", "cuda-emulated"}, "CUDA": {"cuda-emulated"}}


def test_there_are_enough_in_every_language_and_none_twice() -> None:
    languages = Counter(mutation.language for mutation in MUTATIONS)
    assert languages.keys() == BACKENDS.keys()
    assert min(languages.values()) >= 10
    assert len(set(MUTATIONS)) == len(MUTATIONS) >= 80


def test_each_changes_one_place_and_names_tests_that_exist() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / mutation.file).read_text()
        assert mutated(mutation, text) != text
        assert "\n" not in mutation.old + mutation.new
        assert mutation.backend in BACKENDS[mutation.language]
        assert mutation.tests
        for test in mutation.tests:
            path, name = test.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test


SOURCE = """
def add(a, b):
    return a + b


def double(a):
    return 2 * a
"""
TESTS = """
import pytest
from sslfast.count import add, double

def test_add():
    assert add(2, 3) == 5

def test_double():
    assert double(0) == 0

def test_wrong():
    assert double(1) == 1

@pytest.mark.skip
def test_skipped():
    pass
"""
SMALL = [  # what is changed to what, the test, and the verdict
    ("a + b", "a - b", "test_add", "killed"),
    ("2 * a", "3 * a", "test_double", "survived"),
    ("2 * a", "4 * a", "test_gone", "broken"),
    ("2 * a", "5 * a", "test_wrong", "broken"),
    ("2 * a", "6 * a", "test_skipped", "broken"),
    ("def double", "double", "test_double", "broken"),
    ("no such text", "another", "test_double", "broken"),
]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small one, whose package has the name of one that is installed."""
    rows = "".join(
        f'[[mutation]]\nfile = "sslfast/count.py"\nold = "{old}"\nnew = "{new}"\n'
        f'tests = ["tests/test_count.py::{test}"]\n'
        for old, new, test, _ in SMALL
    )
    files = {"sslfast/__init__.py": "", "sslfast/count.py": SOURCE, "tests/test_count.py": TESTS, str(LIST): rows}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "tests" / "conftest.py").write_text("raise SystemExit('git does not track this file')")
    return tmp_path


def test_a_run_tells_what_is_noticed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--jobs", "2"], repository) == 1
    said = capsys.readouterr().out
    for old, new, test, verdict in SMALL:
        expected = f"{verdict}: sslfast/count.py: {old} → {new}\n    tests/test_count.py::{test}\n"
        assert (expected in said) == (verdict != "killed")
    assert re.search(r"^Python +1 +1 +5 +7$", said, re.MULTILINE)
    assert "1 of 7 mutations are noticed" in said
    assert "holds 'no such text' 0 times" in said
    assert (repository / "sslfast" / "count.py").read_text() == SOURCE
    assert main(["--only", r"a \+ b"], repository) == 0
    assert "1 of 1 mutations are noticed" in capsys.readouterr().out


def test_the_list_is_printed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "a - b"], repository) == 0
    assert capsys.readouterr().out == "sslfast/count.py: a + b → a - b\n    tests/test_count.py::test_add\n"
