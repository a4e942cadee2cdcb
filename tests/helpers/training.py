"""The training command on small volumes, and what its runs leave."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from sslfast.train import main
from sslfast.training.checkpoint import load_checkpoint

SMALL = [
    *("--patch", "8", "8", "8", "--depth", "2", "--width", "4", "--seed", "3"),
    *("--device", "cpu", "--precision", "fp32", "--log-every", "1", "--no-plan"),
]


def train(data: Path, output: Path, *flags: object) -> int:
    """The exit status."""
    return main(["--data", str(data), "--output", str(output), *SMALL, *map(str, flags)])


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The weights of both networks after the last step."""
    model = load_checkpoint(output / "checkpoint_last.pt")["model"]
    return {f"{n}.{name}": value for n in "ab" for name, value in model[f"network_{n}"].items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def log_rows(output: Path) -> list[dict[str, str]]:
    """The rows of log.csv, without the times."""
    with open(output / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
