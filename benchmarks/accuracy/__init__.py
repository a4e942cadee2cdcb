"""The study of what unlabelled volumes gain: `python -m benchmarks --suite accuracy`."""
