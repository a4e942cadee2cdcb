"""The comparison of bfloat16 convolutions with float32: which shapes it takes, and what it notices."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from sslfast import convolution_check
from sslfast.convolution_check import check_convolutions, compare, convolutions, report
from sslfast.errors import UserError
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions, Norm

CPU = torch.device("cpu")
Layer = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("norm", get_args(Norm))
def test_every_convolution_of_both_networks_is_among_them(norm: Norm) -> None:
    options = NetworkOptions(width=4, depth=3, norm=norm)
    found = convolutions(options, 2, (8, 12, 16))
    layers = [m for network in build_networks(options, 2) for m in network.modules()]
    kinds = {(type(m), str(m)) for m in layers if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))}
    assert {(type(one.module), str(one.module)) for one in found} == kinds
    assert sum(not one.input_gradient for one in found) == 1  # the images need none
    assert len({str(one) for one in found}) == len(found)
    named = {str(one) for one in found}
    assert "3x3x3, 1 to 4 channels, input 4x1x8x12x16" in named
    assert "2x2x2, 8 to 16 channels, stride 2x2x2, input 4x8x4x6x8" in named
    assert "transposed 2x2x2, 16 to 8 channels, stride 2x2x2, input 4x16x2x3x4" in named


def test_one_patch_is_enough_for_large_grids() -> None:
    named = {str(one) for one in convolutions(NetworkOptions(), 2, (112, 112, 80))}
    assert "3x3x3, 16 to 16 channels, input 1x16x112x112x80" in named
    assert "3x3x3, 256 to 256 channels, input 4x256x7x7x5" in named


def test_as_many_patches_at_once_as_in_a_run() -> None:
    for norm in ("batch", "instance"):
        found = convolutions(NetworkOptions(norm=norm), 2, (112, 112, 80))
        assert {one.evaluation_patches for one in found} == {1}
        assert any(one.folds for one in found) == (norm == "batch")


def test_convolutions_agree_within_rounding() -> None:
    for one in convolutions(NetworkOptions(width=4, depth=3), 2, (8, 12, 16)):
        result = compare(one, CPU)
        assert not result.faults
        assert result.error <= 2**-7
        assert result.in_float32 == (result.convolution.grid[0] == 2 and "3x3x3" in str(one))


def scaled(values: Tensor) -> Tensor:
    """The same values with a gradient that is 5 % larger."""
    return 1.05 * values - 0.05 * values.detach()


def with_hole(values: Tensor) -> Tensor:
    """One wrong value in thousands."""
    values = values.clone()
    values[0, 0, 0, 0, 0] += values.detach().abs().max() / 2
    return values


class Alternating:
    """Within rounding, but not the same in every second call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
        self.calls += 1
        return layer(x, weight) * (1 + self.calls % 2 / 128)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (lambda layer, x, weight: 1.05 * layer(x, weight), r"output off by 0\.0[45]\d* times"),
        (lambda layer, x, weight: with_hole(layer(x, weight)), r"output off by 0\.[45]\d* times"),
        (
            lambda layer, x, weight: layer(scaled(x), weight),
            r"input gradient off by 0\.0[45]\d* times its largest value",
        ),
        (
            lambda layer, x, weight: layer(x, scaled(weight)),
            r"weight gradient off by 0\.0[45]\d* times its largest value",
        ),
        (lambda layer, x, weight: layer(x, weight) / 0, "output not finite"),
        # the NaN that the check leaves there, or what another thread put in its place
        (lambda layer, x, weight: layer(x, weight) + torch.empty(64, 64).sum(), "output (not finite|off by|differs)"),
        (Alternating(), "output differs from one time to the next"),
    ],
    ids=["output", "one value", "input gradient", "weight gradient", "not finite", "memory", "not repeatable"],
)
def test_a_wrong_convolution_is_noticed(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Layer, Tensor, Tensor], Tensor], fault: str
) -> None:
    right = nn.Conv3d._conv_forward

    def forward(self: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return right(self, x, weight, bias)
        return wrong(lambda x, weight: right(self, x, weight, bias), x, weight)

    monkeypatch.setattr(nn.Conv3d, "_conv_forward", forward)
    monkeypatch.setattr(convolution_check, "autocast_dtype", lambda precision, device: torch.bfloat16)
    layers = [one for one in convolutions(NetworkOptions(width=4, depth=2), 2, (12, 12, 12)) if one.input_gradient]
    lines = report(layers, CPU)
    faulty = [line for line in lines if line.startswith("WRONG: 3x3x3, 8 to 8 channels, input 4x8x6x6x6: ")]
    assert len(faulty) == 1
    assert re.search(fault, faulty[0])
    assert lines[0].startswith("1 shapes agree with float32")  # the transposed convolution


def test_a_wrong_convolution_of_evaluation_is_noticed_and_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = convolution_check.convolve_folded
    monkeypatch.setattr(convolution_check, "NetworkOptions", lambda: NetworkOptions(norm="batch"))
    monkeypatch.setattr(convolution_check, "convolve_folded", lambda *args: 1.05 * right(*args))
    monkeypatch.setattr(convolution_check, "autocast_dtype", lambda precision, device: torch.bfloat16)
    with pytest.raises(UserError, match="with --precision fp32"):
        check_convolutions(None, (8, 8, 8), 4, 2)


def test_progress_is_told() -> None:
    done: list[int] = []
    layers = convolutions(NetworkOptions(width=2, depth=2), 2, (4, 4, 4))
    report(layers, CPU, done.append)
    assert done in ([], list(range(len(layers))))  # [] where bf16 is not used


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(convolution_check, "autocast_dtype", lambda precision, device: torch.bfloat16)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    check_convolutions(None, (4, 4, 4), 2, 2)
    assert capsys.readouterr().err.startswith("  0 of ")
