"""`--init-from`: what fits is taken and said, what does not is named, and a resumed run keeps its own weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.training import assert_same_bits, train, weights
from helpers.volumes import write_cases
from sslfast import UserError
from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions, Preprocessing
from sslfast.training.checkpoint import save_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.training.initial_weights import init_networks

SMALL = NetworkOptions(width=2, depth=2)


def build(classes: int = 2, channels: int = 1, **changes: Any) -> tuple[nn.Module, nn.Module]:
    return build_networks(replace(SMALL, **changes), classes, channels)


def write_run(path: Path, options: NetworkOptions = SMALL) -> Model:
    """A checkpoint of fresh networks."""
    model = Model(options, Preprocessing(), {0: "background", 1: "x"}, (8, 8, 8), *build_networks(options, 2))
    save_checkpoint(path, {"model": model.state()})
    return model


def states(*networks: nn.Module) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]


def test_the_networks_of_a_run_are_taken_by_their_letters(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model, networks = write_run(path), build()
    said = init_networks(path, networks)
    for network, own in zip(networks, (model.network_a, model.network_b)):
        assert_same_bits(network.state_dict(), own.state_dict())
    count = len(networks[0].state_dict())
    assert said[0] == f"--init-from {path}: network_a {count} of {count} tensors (100.0 % of its weights) taken"


def test_networks_that_changed_places_are_taken_as_they_fit(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run.pt")
    networks = build(network_a="resvnet", network_b="vnet")
    init_networks(tmp_path / "run.pt", networks)
    for network, own in zip(networks, (model.network_b, model.network_a)):
        assert_same_bits(network.state_dict(), own.state_dict())


def test_what_has_another_shape_stays_random_and_is_named(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run.pt")
    networks = build(classes=3, channels=2)
    before = states(*networks)
    said = init_networks(tmp_path / "run.pt", networks)
    first = "encoder.stages.0.0.weight"
    for network, own, old, line in zip(networks, (model.network_a, model.network_b), before, said):
        left = {first, "classifier.weight", "classifier.bias"}
        for name, value in network.state_dict().items():
            expected = old[name] if name in left else own.state_dict()[name]
            assert torch.equal(value, expected), name
        count = len(old)
        assert f" {count - 3} of {count} tensors (" in line
        assert line.endswith(
            f"left: {first} (of 1 instead of 2 input channels); classifier.weight, classifier.bias (of another shape)"
        )


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="plain"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="nested"),
        pytest.param(lambda state: {"network_weights": state}, id="of nnU-Net"),
        pytest.param(lambda state: {"model": {f"module.{n}": v for n, v in state.items()}}, id="with a prefix"),
        pytest.param(lambda state: {n: v.half() for n, v in state.items()}, id="in half precision"),
    ],
)
def test_a_state_dict_fills_both_networks_as_far_as_it_fits(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    state = {name: value.half().float() for name, value in build()[0].state_dict().items()}
    torch.save(wrap(state), tmp_path / "weights.pt")
    networks = build()
    before = states(*networks)
    said = init_networks(tmp_path / "weights.pt", networks)
    assert_same_bits(networks[0].state_dict(), state)
    assert "network_b" in said[1]
    assert " and " in said[1].partition("left: ")[2]
    own = networks[1].state_dict()
    assert torch.equal(own["classifier.weight"], state["classifier.weight"])
    assert torch.equal(own["encoder.stages.1.0.body.0.weight"], before[1]["encoder.stages.1.0.body.0.weight"])


@pytest.mark.parametrize("name", ["dynunet", "segresnet", "unet"])
def test_weights_of_a_network_of_monai_fit_without_the_adapter(tmp_path: Path, name: Any) -> None:
    options = replace(SMALL, depth=3)
    other: Any = build_networks(replace(options, network_b=name), 2)[1]
    torch.save(other.network.state_dict(), tmp_path / "weights.pt")
    networks = build_networks(replace(options, network_b=name), 2)
    said = init_networks(tmp_path / "weights.pt", networks)
    assert_same_bits(networks[1].state_dict(), other.state_dict())
    assert "(100.0 % of its weights)" in said[1]


def test_two_networks_that_begin_alike_are_warned_of(tmp_path: Path) -> None:
    torch.save(build()[0].state_dict(), tmp_path / "weights.pt")
    said = init_networks(tmp_path / "weights.pt", build(network_b="vnet"))
    assert said[-1].startswith("warning: both networks begin with the same weights")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(
            lambda path: torch.save({"a.weight": torch.ones(3)}, path),
            r"no weight fits by name and shape; it holds 1 tensors, and begins with a.weight \[3\]\. Choose the same",
            id="other names",
        ),
        pytest.param(
            lambda path: write_run(path, replace(SMALL, network_b="vnet", width=3)),
            "no weight fits .*; it is a run with --network-a vnet --network-b vnet --width 3 --depth 2 --norm instance",
            id="another width",
        ),
        pytest.param(lambda path: torch.save([1, 2], path), "holds no weights by their names; give the", id="a list"),
        pytest.param(lambda path: path.write_bytes(b"junk"), "holds more than tensors, or is damaged", id="junk"),
        pytest.param(lambda path: torch.save(nn.Conv3d(1, 1, 1), path), "holds more than tensors", id="a module"),
        pytest.param(
            lambda path: torch.save({n: v * math.nan for n, v in build()[0].state_dict().items()}, path),
            "weights in it are NaN or infinite; use an earlier checkpoint",
            id="NaN",
        ),
        pytest.param(lambda path: None, "there is no .*weights.pt; give the folder of a run", id="no file"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_remedy(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path, networks = tmp_path / "weights.pt", build()
    write(path)
    before = states(*networks)
    with pytest.raises(UserError, match=f"--init-from .*weights.pt: .*{message}"):
        init_networks(path, networks)
    for network, old in zip(networks, before):
        assert_same_bits(network.state_dict(), old)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run.pt")
    content = bytearray((tmp_path / "run.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.pt .*is damaged|holds more than tensors, or is damaged"):
        init_networks(tmp_path / "run.pt", build())


def test_a_run_begins_with_the_weights_of_another_and_is_resumed_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=2)
    assert train(data, tmp_path / "first", "--steps", 1) == 0
    begin = ["--steps", 2, "--init-from", tmp_path / "first", "--learning-rate", 1e-30, "--weight-decay", 0]
    assert train(data, tmp_path / "next", *begin, "--method", "mean-teacher") == 0
    assert f"--init-from {tmp_path / 'first'}: network_b " in capsys.readouterr().out
    first, after = weights(tmp_path / "first"), weights(tmp_path / "next")
    assert all(torch.allclose(first[name], after[name], rtol=0, atol=1e-20) for name in first)
    (tmp_path / "first").rename(tmp_path / "moved")
    config = ["--init-from", tmp_path / "first", *begin[:2], *begin[4:], "--method", "mean-teacher", "--resume"]
    assert train(data, tmp_path / "next", *config) == 0
    assert "--init-from" not in capsys.readouterr().out
    assert train(data, tmp_path / "next", *begin[:2], *begin[4:], "--method", "mean-teacher", "--resume") == 2
    assert f"--init-from (was {tmp_path / 'first'}, is None)" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cases(tmp_path / "data", cases=2, labelled=2)
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    assert train(data, tmp_path / "run", "--init-from", tmp_path / "weights.pt") == 2
    assert "no weight fits by name and shape" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--init-from nowhere: there is no such folder or file; correct the path"):
        TrainConfig("", Path("run"), init_from=Path("nowhere")).check()
