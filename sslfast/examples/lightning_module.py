"""`DualContrastiveLoss` in a Lightning module. Needs `pip install lightning`.

    module = DualNetworks(VNet(2), ResVNet(2), num_classes=2, steps=6000)
    lightning.Trainer(max_steps=6000, use_distributed_sampler=False).fit(module, loader)

The loader yields {"images": [N, 1, D, H, W], "labels": [L, D, H, W]} with the labelled volumes first, as
`sslfast.data.patches` does. Under DDP, percentiles, prototypes and samples are those of the batches of all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslfast import DualContrastiveLoss, teacher_view

try:
    import lightning
except ImportError as error:
    raise ImportError("this example needs Lightning: pip install lightning") from error


class DualNetworks(lightning.LightningModule):
    """Both networks and the loss.

    Args:
        network_a, network_b: networks that return (logits, features); see `sslfast.WithFeatures`.
        num_classes: number of classes, C.
        steps: number of training steps.
        learning_rate: learning rate of AdamW.
        options: options of `DualContrastiveLoss`.
    """

    def __init__(
        self,
        network_a: nn.Module,
        network_b: nn.Module,
        *,
        num_classes: int,
        steps: int,
        learning_rate: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__()
        self.network_a, self.network_b = network_a, network_b
        self.learning_rate, self.num_classes = learning_rate, num_classes
        self.options = {"ramp_steps": max(1, steps), **options}
        self.criterion = DualContrastiveLoss(num_classes, **self.options)

    def on_fit_start(self) -> None:
        """With several processes, computes the loss over all of their batches."""
        if self.trainer.world_size > 1:
            group = torch.distributed.group.WORLD
            state = self.criterion.state_dict()
            self.criterion = DualContrastiveLoss(self.num_classes, group=group, **self.options).to(self.device)
            self.criterion.load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities [N, C, D, H, W]: the mean of both networks'."""
        return (self.network_a(images)[0].softmax(1) + self.network_b(images)[0].softmax(1)) / 2

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch["images"], batch["labels"]
        teacher = images.new_zeros(0, self.num_classes, *images.shape[2:])  # with several processes, each must pass one
        if len(images) > len(labels):
            view, teacher = teacher_view(self.network_a, self.network_b, images[len(labels) :])
            images = torch.cat((images[: len(labels)], view))
        (logits_a, features_a), (logits_b, features_b) = self.network_a(images), self.network_b(images)
        result = self.criterion(
            *(logits_a, logits_b, features_a, features_b, labels), step=self.global_step, teacher=teacher
        )
        self.log_dict({"loss_a": result.loss_a, "loss_b": result.loss_b, "kept": result.terms["kept_fraction"]})
        return result.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over both networks."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate)
