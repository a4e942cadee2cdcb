"""A pytest plugin for tests on a GPU: a device fault, or a test that hangs, costs one test and not those after it.

    python -m pytest -n 12 --max-worker-restart 100 -p benchmarks.gpu.workers --seconds 30 ...

After an illegal access every call of that process fails. So a worker of pytest-xdist waits for the device after each
test and ends itself where that fails; pytest-xdist counts the test as failed and starts another worker for the rest.
Failures are printed at once, because a run that is out of time does not reach its end.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Generator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=30.0, help="that a test may take (default: 30)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around each test."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    faulthandler.dump_traceback_later(item.config.option.seconds, exit=True)
    result = yield
    faulthandler.cancel_dump_traceback_later()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device is in error, this worker ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each test's, in the process that collects them."""
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        print(f"\nfailed: {report.nodeid}\n{report.longreprtext}", flush=True)
