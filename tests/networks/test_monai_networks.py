"""MONAI's networks in the trainer: as its own ones, in shapes, features, losses, files and flags."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.training import assert_same_bits, train, weights
from helpers.volumes import decoded_case, noise, write_cases
from sslfast import UserError
from sslfast.convolution_check import compare, convolutions
from sslfast.data.classes import Classes
from sslfast.inference import predict_probabilities
from sslfast.methods import METHODS
from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.ops.linear_logits import LinearLogits, materialize
from sslfast.options import FROM_MONAI, NetworkName, NetworkOptions, Norm, Preprocessing
from sslfast.train import main
from sslfast.training.checkpoint import load_model
from sslfast.training.config import TrainConfig
from sslfast.training.memory_budget import fit_to_budget, step_bytes
from sslfast.training.trainer import Trainer

SMALL = NetworkOptions(width=2, depth=3, dropout=0.0)
GRIDS = [
    pytest.param(name, pooling, id=" ".join((name, *pooling)))
    for name in FROM_MONAI
    for pooling in ((), ("221", "222"))
    if not (pooling and name == "segresnet")
]


def build(name: NetworkName, classes: int = 3, channels: int = 1, **changes: Any) -> Any:
    return build_networks(replace(SMALL, network_b=name, **changes), classes, channels)[1]


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize(("name", "pooling"), GRIDS)
def test_logits_and_features_have_the_grid_of_the_images_and_every_weight_learns(
    name: NetworkName, pooling: tuple[str, ...], norm: Norm
) -> None:
    network = build(name, channels=2, pooling=pooling, norm=norm)
    size = [2 * factor for factor in network.factors]
    assert size == ([8, 8, 4] if pooling else [8, 8, 8])
    images = torch.randn(2, 2, *size)
    logits, features = network(images)
    assert (logits.shape, features.shape) == ((2, 3, *size), (2, 2, *size))
    linear, _ = network(images, linear=True)
    assert isinstance(linear, LinearLogits)
    torch.testing.assert_close(materialize(linear), logits)
    (materialize(linear).square().mean() + features.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(ValueError, match="D, H and W must be multiples of 4, 4, "):
        network(images[..., :-1])


@pytest.mark.parametrize("name", FROM_MONAI)
def test_dropout_leaves_out_channels_of_the_bottleneck_and_of_the_classifier(name: NetworkName) -> None:
    network, images = build(name, dropout=0.99), torch.randn(1, 1, 8, 8, 8)
    torch.manual_seed(0)
    (logits, features), (linear, _) = network(images), network(images, linear=True)
    assert features.any()
    for dropped in (logits, materialize(linear)):
        flat = dropped.flatten(2)
        assert torch.allclose(flat, flat[..., :1]), "the bias is left"
    network.eval()
    assert network(images)[0].flatten(2).std(-1).all()


@pytest.mark.parametrize("name", FROM_MONAI)
def test_a_copy_has_its_own_features_and_in_bfloat16_both_have_the_dtype_of_the_logits(name: NetworkName) -> None:
    network, images = build(name).eval(), torch.randn(1, 1, 8, 8, 8)
    twin = copy.deepcopy(network)
    expected = network(images)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(map(torch.equal, twin(images), expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert [values.dtype for values in twin(images)] == [torch.bfloat16] * 2


def test_they_compile_to_one_graph() -> None:
    network, images = build("dynunet").eval(), torch.randn(1, 1, 8, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(images), network(images)))


@pytest.mark.parametrize(
    ("method", "network_a", "network_b"),
    [(method, "vnet", "dynunet") for method in METHODS] + [("u2pl", "unet", "segresnet")],
)
def test_every_method_trains_them(method: str, network_a: NetworkName, network_b: NetworkName, tmp_path: Path) -> None:
    networks = replace(SMALL, network_a=network_a, network_b=network_b)
    config = TrainConfig("", tmp_path, method, steps=1, patch=(8, 8, 8), networks=networks, precision="fp32")
    label = np.zeros((10, 10, 10), np.int16)
    label[3:7, 3:7, 3:7] = 1
    cases = [decoded_case(tmp_path, f"case_{i}", noise(10, 10, 10), label if i < 2 else None) for i in range(4)]
    trainer = Trainer(config, Classes({0: "background", 1: "x"}), cases, 2, [], torch.device("cpu"))
    before = [copy.deepcopy(network.state_dict()) for network in trainer.networks]
    trainer.run()
    for old, network in zip(before, trainer.networks):
        assert any(not torch.equal(value, old[name]) for name, value in network.state_dict().items())


FLAGS = ["--network-b", "dynunet", "--depth", 3, "--width", 2, "--steps", 3, "--labeled", 2]


def save_and_end(trainer: Trainer, path: Path, step: int, save: Any = Trainer._save) -> None:
    save(trainer, path, step)
    raise SystemExit


def test_a_run_is_repeated_when_resumed_and_predicts_the_same_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_cases(tmp_path / "data", cases=4, labelled=2)
    assert train(data, tmp_path / "whole", *FLAGS) == 0
    again = ["--config", str(tmp_path / "whole" / "config.yaml"), "--output", str(tmp_path / "whole"), "--resume"]
    assert main(again) == 0, "the names of the networks are in the config file"
    part = tmp_path / "part"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", save_and_end)
        with pytest.raises(SystemExit):
            train(data, part, *FLAGS, "--save-every", 1)
    assert train(data, part, *FLAGS, "--resume") == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(part))
    model, image = load_model(part), noise(11, 9, 8)
    assert torch.equal(
        predict_probabilities(model, image[None], precision="fp32"),
        predict_probabilities(load_model(tmp_path / "whole"), image[None], precision="fp32"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_b": "dynunet", "norm": "sync-batch"}, "--norm sync-batch with --network-b dynunet: only vnet"),
        ({"network_a": "unet", "checkpointing": True}, "--checkpointing with --network-a unet: only vnet"),
        ({"network_b": "dynunet", "depth": 2}, "--depth 2 with --network-b dynunet: .* use --depth 3"),
        (
            {"network_a": "segresnet", "pooling": ("221", "222")},
            "--pooling 221 222 with --network-a segresnet: .* leave out --pooling",
        ),
    ],
)
def test_what_a_network_cannot_be_is_refused_with_the_remedy(changes: Any, message: str) -> None:
    options = replace(SMALL, **changes)
    with pytest.raises(UserError, match=message):
        TrainConfig("", Path("run"), patch=(16, 16, 16), networks=options).check()
    with pytest.raises(UserError, match=message):
        build_networks(options, 2)


def test_a_memory_budget_halves_batches_where_nothing_is_recomputed() -> None:
    networks = replace(SMALL, network_b="dynunet")
    a_voxel, fixed = step_bytes(networks, 2, None)
    budget = (3 * a_voxel * 32**3 + fixed) / 2**30  # of the four patches of a step
    config = TrainConfig("", Path("run"), patch=(32, 32, 32), networks=networks, memory_budget=budget)
    chosen, said = fit_to_budget(config, 2, None)
    assert chosen == replace(config, labeled_batch=1, unlabeled_batch=1)
    assert "--checkpointing" not in said


def test_the_doctor_compares_their_convolutions_without_folding() -> None:
    options = replace(SMALL, network_a="segresnet", network_b="dynunet", norm="batch", dropout=0.5)
    found = convolutions(options, 3, (8, 8, 8))
    assert len(found) > 10
    assert not any(convolution.folds for convolution in found)
    classifiers = [convolution for convolution in found if convolution.module.out_channels == 3]
    assert classifiers
    assert not any(compare(convolution, torch.device("cpu")).faults for convolution in classifiers)


def test_a_model_of_them_is_restored() -> None:
    options = replace(SMALL, network_a="segresnet", network_b="unet")
    model = Model(options, Preprocessing(), {0: "background", 1: "x"}, (8, 8, 8), *build_networks(options, 2))
    restored = Model.restore(model.state())
    assert_same_bits(restored.network_b.state_dict(), model.network_b.state_dict())
