"""Runs a suite and writes its table, CSV and plot to benchmarks/results/.

python -m benchmarks                          time and memory of the fused loss against plain PyTorch (10 minutes)
python -m benchmarks --suite head             the fused head against classifier and fused loss (5 minutes)
python -m benchmarks --suite step             a whole training step against the step as published (10 minutes)
python -m benchmarks --suite inference        a whole scan at the published strides against window by window (10 minutes)
python -m benchmarks --suite precision        training curves in float32 and bfloat16 (half an hour)
python -m benchmarks --suite accuracy         held-out Dice of the methods on the demo cohorts (hours on two cores)
python -m benchmarks --suite NAME --help      the suite's flags
python -m pytest benchmarks --benchmark-only  the ops one by one under pytest-benchmark
"""

import argparse
import sys
from importlib import import_module

parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    add_help=False,
)
parser.add_argument("--suite", choices=("loss", "head", "step", "inference", "precision", "accuracy"))

if __name__ == "__main__":
    chosen, flags = parser.parse_known_args()
    if chosen.suite is None and {"-h", "--help"} & {*flags}:
        parser.print_help()
        sys.exit(0)
    sys.exit(import_module(f"benchmarks.{chosen.suite or 'loss'}").main(flags))
