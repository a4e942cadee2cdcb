"""`DualContrastiveLoss` as an nnU-Net v2 trainer, for datasets in which some cases are unlabelled.

nnU-Net has no folder for unlabelled images. Declare an ignore label in dataset.json, put every image into imagesTr, and
give the unlabelled ones a label map that is the ignore label everywhere. Then tell nnU-Net where this trainer is:

    export nnUNet_extTrainer=$(python -c "import sslfast.examples.nnunet as e; print(*e.__path__)")
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerDualContrastive

Two networks are trained: that of the plan, and one with one more convolution in each encoder stage. Both are in the
checkpoint. `nnUNetv2_predict -tr nnUNetTrainerDualContrastive` uses the mean of their logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslfast import DualContrastiveLoss, WithFeatures, teacher_view

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
except ImportError as error:
    raise ImportError("this example needs nnU-Net: pip install nnunetv2") from error


class TwoNetworks(nn.Module):
    """Returns logits and features of both networks in training, else the mean of the logits for nnU-Net's predictor."""

    def __init__(self, network_a: nn.Module, network_b: nn.Module) -> None:
        super().__init__()
        self.network_a, self.network_b = WithFeatures(network_a), WithFeatures(network_b)

    def forward(self, images: Tensor) -> Any:
        (logits_a, features_a), (logits_b, features_b) = self.network_a(images), self.network_b(images)
        if self.training:
            return logits_a, logits_b, features_a, features_b
        return (logits_a + logits_b) / 2


class nnUNetTrainerDualContrastive(nnUNetTrainer):  # nnU-Net finds a trainer by the name of its class
    """Replaces the networks and the training step. The rest is nnU-Net's."""

    def initialize(self) -> None:
        """Checks that the dataset can have unlabelled voxels, and creates the loss."""
        if self.label_manager.ignore_label is None or self.label_manager.has_regions:
            raise ValueError(
                "dataset.json must declare an ignore label for the unlabelled cases, and must not declare regions"
            )
        self.enable_deep_supervision = False
        super().initialize()
        steps = self.num_epochs * self.num_iterations_per_epoch
        self.criterion = DualContrastiveLoss(
            self.label_manager.num_segmentation_heads,
            ramp_steps=max(1, steps),
            group=torch.distributed.group.WORLD if self.is_ddp else None,
        ).to(self.device)

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """The network of the plan, and one with one more convolution (or block) in each stage of the encoder."""
        networks = []
        for more in (0, 1):
            settings = dict(configuration_manager.network_arch_init_kwargs)
            for name in ("n_conv_per_stage", "n_blocks_per_stage"):
                if name in settings:
                    settings[name] = [n + more for n in settings[name]]
            networks.append(
                get_network_from_plans(
                    configuration_manager.network_arch_class_name,
                    settings,
                    configuration_manager.network_arch_init_kwargs_req_import,
                    num_input_channels,
                    num_output_channels,
                    allow_init=True,
                    deep_supervision=False,
                )
            )
        return TwoNetworks(*networks)

    def _do_i_compile(self) -> bool:
        return False  # a forward hook reads the features

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Does nothing: there is no deep supervision."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One training step. A patch without an annotated voxel counts as unlabelled."""
        images = batch["data"].to(self.device, non_blocking=True)
        labels = batch["target"].to(self.device, non_blocking=True)[:, 0].long()
        ignored = labels == self.label_manager.ignore_label
        unlabelled = ignored.flatten(1).all(1)
        order = unlabelled.long().argsort(stable=True)  # the labelled patches first
        known = max(1, int((~unlabelled).sum()))  # without any, one patch whose voxels are all ignored
        labels = labels.masked_fill(ignored, -1)[order[:known]]

        images = images[order]
        # with several processes, each must pass a teacher
        teacher = images.new_zeros(0, self.label_manager.num_segmentation_heads, *images.shape[2:])
        networks: Any = self.network.module if self.is_ddp else self.network

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            if known < len(images):
                view, teacher = teacher_view(networks.network_a, networks.network_b, images[known:])
                images = torch.cat((images[:known], view))
            outputs = self.network(images)
        step = self.current_epoch * self.num_iterations_per_epoch + self.optimizer_steps
        loss = self.criterion(*outputs, labels, step=step, teacher=teacher).loss
        self.optimizer_steps = (self.optimizer_steps + 1) % self.num_iterations_per_epoch
        scaler = self.grad_scaler
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}

    optimizer_steps = 0  # in this epoch
