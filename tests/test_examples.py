"""The examples in other people's code: each trains a few steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.processes import run_python
from helpers.volumes import write_cases
from sslfast.networks import ResVNet, VNet


def test_the_monai_loop_trains(tmp_path: Path) -> None:
    data = write_cases(tmp_path, cases=5, labelled=3)
    printed = run_python("-m", "sslfast.examples.monai_loop", data, "--steps", "3", "--patch", "32", "32", "32")
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in printed.splitlines() if "loss" in line]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)


class Batches:
    """Two labelled and two unlabelled volumes, for ever."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            images = torch.randn(4, 1, 8, 8, 8)
            yield {"images": images, "labels": (images[:2, 0] > 0).long()}


def test_the_lightning_module_trains(tmp_path: Path) -> None:
    import lightning

    from sslfast.examples.lightning_module import DualNetworks

    networks = VNet(2, width=4, depth=2), ResVNet(2, width=4, depth=2)
    module = DualNetworks(*networks, num_classes=2, steps=3)
    before = [p.detach().clone() for p in module.parameters()]
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, Batches())
    assert trainer.global_step == 3
    assert trainer.callback_metrics["loss_a"] > 0
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before))
    assert torch.allclose(module.eval()(torch.randn(1, 1, 8, 8, 8)).sum(1), torch.ones(1, 8, 8, 8))


def test_with_several_processes_the_lightning_module_computes_the_loss_over_all_of_them() -> None:
    from sslfast.examples.lightning_module import DualNetworks

    module = DualNetworks(VNet(2, width=4, depth=2), VNet(2, width=4, depth=2), num_classes=2, steps=3)
    module.trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    before = module.criterion.state_dict()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module.on_fit_start()
        assert module.criterion.reducer.group is torch.distributed.group.WORLD
        for name, value in module.criterion.state_dict().items():
            assert torch.equal(value, before[name])
    finally:
        torch.distributed.destroy_process_group()


class PlansNetwork(nn.Module):
    """What stands in for nnU-Net's: its classifier comes last."""

    def __init__(self, classes: int, n_conv_per_stage: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(1, 6, 3, padding=1)]
        for _ in range(sum(n_conv_per_stage)):
            layers += [nn.LeakyReLU(), nn.Conv3d(6, 6, 3, padding=1)]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Conv3d(6, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images))


class FakeTrainer:
    """The attributes of nnU-Net 2.8's trainer that the example uses."""

    def __init__(self, ignore_label: int | None = 3) -> None:
        self.device, self.is_ddp, self.grad_scaler, self.current_epoch = torch.device("cpu"), False, None, 0
        self.num_epochs, self.num_iterations_per_epoch, self.enable_deep_supervision = 2, 3, True
        self.label_manager = SimpleNamespace(ignore_label=ignore_label, has_regions=False, num_segmentation_heads=3)
        self.configuration_manager = SimpleNamespace(
            network_arch_class_name="",
            network_arch_init_kwargs={"n_conv_per_stage": [1, 1]},
            network_arch_init_kwargs_req_import=[],
        )

    def initialize(self) -> None:
        self.network = self.build_network_architecture(None, self.configuration_manager, 1, 3, False)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01)


@pytest.fixture
def trainer_class(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The example on top of a stand-in for nnU-Net, whose 60 dependencies the tests do without."""
    name = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    for part in ("nnunetv2", "nnunetv2.training", "nnunetv2.training.nnUNetTrainer", name, "nnunetv2.utilities"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    plans = ModuleType("nnunetv2.utilities.get_network_from_plans")
    plans.get_network_from_plans = lambda name, settings, imports, channels, classes, **_: PlansNetwork(
        classes, **settings
    )  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, plans.__name__, plans)
    sys.modules[name].nnUNetTrainer = FakeTrainer  # type: ignore[attr-defined]
    module = "sslfast.examples.nnunet.nnUNetTrainerDualContrastive"
    monkeypatch.delitem(sys.modules, module, raising=False)
    return import_module(module).nnUNetTrainerDualContrastive  # type: ignore[no-any-return]


def test_the_nnunet_trainer_takes_ignored_patches_as_unlabelled(trainer_class: type[Any]) -> None:
    trainer = trainer_class()
    trainer.initialize()
    depths = [len(n.network.body) for n in (trainer.network.network_a, trainer.network.network_b)]
    assert depths[1] > depths[0]
    target = torch.randint(0, 3, (4, 1, 6, 7, 8))
    target[[0, 2]] = 3  # unlabelled
    target[1, :, :2] = 3  # annotated in part
    seen = []
    trainer.criterion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[4]))
    images = torch.randn(4, 1, 6, 7, 8)
    for _ in range(3):
        loss = trainer.train_step({"data": images, "target": target})["loss"]
        assert 0 < float(loss) < 20
    assert torch.equal(seen[0], target[[1, 3], 0].masked_fill(target[[1, 3], 0] == 3, -1))
    nothing = trainer.train_step({"data": images, "target": torch.full_like(target, 3)})["loss"]
    assert torch.isfinite(torch.as_tensor(nothing))
    trainer.network.eval()
    assert trainer.network(images).shape == (4, 3, 6, 7, 8)


def test_the_nnunet_trainer_scales_its_gradients_as_nnunet_does(trainer_class: type[Any]) -> None:
    data = {"data": torch.randn(4, 1, 6, 7, 8), "target": torch.randint(0, 3, (4, 1, 6, 7, 8))}
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        torch.manual_seed(0)
        trainer = trainer_class()
        trainer.initialize()
        trainer.grad_scaler = scaler
        assert not trainer._do_i_compile()
        trainer.train_step(data)
        weights.append([p.detach() for p in trainer.network.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("example", "library", "said"),
    [
        ("lightning_module", "lightning", "this example needs Lightning: pip install lightning"),
        ("nnunet.nnUNetTrainerDualContrastive", "nnunetv2", "this example needs nnU-Net: pip install nnunetv2"),
    ],
)
def test_without_its_library_an_example_says_how_to_install_it(
    example: str, library: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"sslfast.examples.{example}", raising=False)
    with pytest.raises(ImportError, match=said):
        import_module(f"sslfast.examples.{example}")


def test_a_dataset_without_an_ignore_label_is_refused(trainer_class: type[Any]) -> None:
    with pytest.raises(ValueError, match="must declare an ignore label"):
        trainer_class(ignore_label=None).initialize()
