"""Checkpoint files: tensors and plain values, of this program alone, and never with a changed bit."""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import make_model
from helpers.options import SEED
from helpers.training import assert_same_bits
from sslfast import UserError
from sslfast.training.checkpoint import FORMAT, load_checkpoint, load_model, save_checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of a small model."""
    save_checkpoint(tmp_path / "model.pt", {"model": make_model().state()})
    return tmp_path / "model.pt"


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Boom()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_plain_torch_reads_a_checkpoint(path: Path) -> None:
    assert_same_bits(torch.load(path, weights_only=True)["model"]["network_a"], load_model(path).network_a.state_dict())


def test_a_flipped_bit_anywhere_is_noticed(path: Path) -> None:
    whole, choice = path.read_bytes(), random.Random(SEED)
    places = [*range(0, len(whole), len(whole) // 100), *range(len(whole) - 60, len(whole))]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << choice.randrange(8)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.pt is not a readable checkpoint: it is damaged.*Copy it again"):
            load_model(path)


def test_a_checkpoint_of_before_the_digest_is_read_if_no_value_of_it_is_damaged(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "model": make_model().state()}, buffer)
    path, whole, choice = tmp_path / "old.pt", buffer.getvalue(), random.Random(SEED)
    path.write_bytes(whole)
    weights = load_model(path).network_a.state_dict()
    refused = []
    for place in range(0, len(whole), len(whole) // 150):
        content = bytearray(whole)
        content[place] ^= 1 << choice.randrange(8)
        path.write_bytes(content)
        try:
            assert_same_bits(load_model(path).network_a.state_dict(), weights)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 75, "the rest are bits that stand for nothing"
    assert all("old.pt is not a readable checkpoint" in message for message in refused)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"junk", "it is damaged, cut short, or from another program")],
)
def test_what_is_no_checkpoint_is_named_in_one_line(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_model(path)
    assert str(raised.value).startswith(f"{path} is not a readable checkpoint: {reason}. Copy it again")
    assert "\n" not in str(raised.value)


def spoil_a_weight(model: dict[str, Any], value: complex) -> None:
    name, weight = next(iter(model["network_b"].items()))
    model["network_b"][name] = torch.full_like(weight, value) if value != 1j else weight * value


def change(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(model: dict[str, Any]) -> None:
        for key in keys[:-1]:
            model = model[key]
        model[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda model: model.pop("network_b"), id="no second network"),
        pytest.param(lambda model: model["network_a"].popitem(), id="a weight is missing"),
        pytest.param(change("network_a", to=[1, 2]), id="a list for a network"),
        pytest.param(change("networks", "width", to=10**6), id="a width that no machine holds"),
        pytest.param(change("networks", "width", to="wide"), id="a word for a number"),
        pytest.param(change("networks", "network_a", to="nonet"), id="an unknown network"),
        pytest.param(change("networks", "network_a", to="unet"), id="the name of another network"),
        pytest.param(change("networks", "colour", to=1), id="an unknown option"),
        pytest.param(change("preprocessing", "spacing", to=float("nan")), id="NaN as spacing"),
        pytest.param(change("preprocessing", "intensity", to="loud"), id="an unknown normalisation"),
        pytest.param(change("preprocessing", "intensity", to=("ct", "zscore")), id="intensities of two channels"),
        pytest.param(change("preprocessing", "intensity", to=()), id="no intensity"),
        pytest.param(lambda model: spoil_a_weight(model, math.nan), id="NaN as a weight"),
        pytest.param(lambda model: spoil_a_weight(model, 1j), id="complex weights"),
        pytest.param(change("preprocessing", "window", to=(1.0,)), id="half a window"),
        pytest.param(change("patch", to=(2**32,) * 3), id="a patch that no memory holds"),
        pytest.param(change("classes", 1, to=None), id="a class without a name"),
        pytest.param(change("patch", to=(8, 8)), id="a patch of two axes"),
        pytest.param(change("patch", to=(8, 8, -8)), id="a patch below 0"),
        pytest.param(change("classes", to={1: "x", 7: "y"}), id="no background"),
        pytest.param(change("classes", to=None), id="no classes"),
    ],
)
def test_a_model_of_another_structure_is_named_with_the_remedy(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object]
) -> None:
    model = make_model().state()
    spoil(model)
    save_checkpoint(tmp_path / "model.pt", {"model": model})
    with pytest.raises(UserError, match=r"model\.pt does not hold what a checkpoint .* Use another one"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [{"model": 1, "format": 1}, {"model": 1, "format": torch.ones(2)}, [1, 2], {}])
def test_a_file_of_another_version_or_kind_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is not a checkpoint of this version"):
        load_checkpoint(tmp_path / "model.pt")
