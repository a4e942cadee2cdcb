"""Demo cohorts, made from real anatomy at their first use, for trying the program without data."""

from sslfast.renamed import old_names

__getattr__ = old_names(__name__)
