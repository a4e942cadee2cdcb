"""Demo cohorts, made from real anatomy at their first use, for trying the program without data."""

from typing import TYPE_CHECKING

from sslfast.renamed import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
