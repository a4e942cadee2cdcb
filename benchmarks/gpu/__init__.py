"""One run on a GPU that always brings back what it learnt: `python -m benchmarks.gpu --help`."""
