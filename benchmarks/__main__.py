"""`python -m benchmarks`: runs a suite and writes its table to benchmarks/results/."""

import sys

from benchmarks.accuracy import main

if __name__ == "__main__":
    sys.exit(main())
