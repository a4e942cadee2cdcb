"""Mutated files: a short run of tests/fuzz.py."""

from __future__ import annotations

import logging

import pytest
from fuzz import KINDS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), [("niftis", 200), ("checkpoints", 60), ("texts", 60)])
def test_mutated_files_are_read_or_refused_in_words(kind: str, count: int) -> None:
    run, _ = KINDS[kind]
    logging.disable(logging.CRITICAL)  # nibabel's of odd headers
    try:
        outcomes, faults = run(count, seed=3)
    finally:
        logging.disable(logging.NOTSET)
    assert not faults
    assert outcomes["refused"] > 0
    assert outcomes["fault"] == 0
