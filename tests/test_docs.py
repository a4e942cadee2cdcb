"""The written pages: links lead to a file and a heading, lines are short, the README is a page, tables are complete."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from sslfast.data.public.conversion import READERS
from sslfast.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "LOG.md"]
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
MADE_BY_A_PROGRAM = {"api.md"}


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in MADE_BY_A_PROGRAM], ids=lambda page: page.name)
def test_prose_is_wrapped_at_120_columns(page: Path) -> None:
    lines = prose(page).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|") and " " in line.strip()]


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize(("page", "names"), [("method.md", [*METHODS]), ("datasets.md", [*READERS])])
def test_the_table_of_a_page_names_all_there_are(page: str, names: Iterable[str]) -> None:
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")]
    assert not [name for name in names if not any(f"`{name}`" in row for row in rows)]
