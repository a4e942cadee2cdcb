"""The numbers in the README, and the commands that make them: `python -m benchmarks`."""
