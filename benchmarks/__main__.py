"""Runs a suite and writes its table and CSV to benchmarks/results/.

python -m benchmarks                      the fused loss and head against plain PyTorch (25 minutes)
python -m benchmarks --suite ops          each op of the loss, timed by pytest-benchmark (5 minutes)
python -m benchmarks --suite norm_act     normalisation with ReLU against torch's and a copy (2 minutes)
python -m benchmarks --suite step         a whole training step against the step as published (45 minutes)
python -m benchmarks --suite inference    a whole volume at the published strides against window by window (20 minutes)
python -m benchmarks --suite accuracy     held-out Dice of the methods on real and demo cohorts (a day of two cores)
python -m benchmarks --suite quality      whether a run knows which of its segmentations fail (an hour, with training)
python -m benchmarks --suite rank         whether the scans that rank chooses teach more than others (3 hours)
python -m benchmarks --suite NAME --help  the suite's flags
python -m benchmarks.accuracy.nnunet      nnU-Net v2 on the hippocampus, in an environment of its own (an hour)
python -m benchmarks.gpu                  tests and timings on a GPU
"""

import argparse
import sys
from importlib import import_module

SUITES = {name: f"benchmarks.{name}" for name in ("loss", "ops", "norm_act", "step", "inference", "quality", "rank")}
SUITES["accuracy"] = "benchmarks.accuracy.study"

parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    add_help=False,
)
parser.add_argument("--suite", choices=tuple(SUITES))

if __name__ == "__main__":
    chosen, flags = parser.parse_known_args()
    if chosen.suite is None and {"-h", "--help"} & {*flags}:
        parser.print_help()
        sys.exit(0)
    sys.exit(import_module(SUITES[chosen.suite or "loss"]).main(flags))
