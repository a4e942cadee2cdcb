"""`DualContrastiveLoss` in a plain MONAI training loop: MONAI's networks, transforms and caches.

    python -m sslfast.examples.monai_loop DIR --steps 1000

DIR/images/*.nii.gz are the volumes, DIR/labels/*.nii.gz the label maps with the same file names. A volume without a
label map is unlabelled.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import BasicUNet, SegResNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByPosNegLabeld,
    RandSpatialCropd,
    SpatialPadd,
    ToTensord,
)

from sslfast import DualContrastiveLoss, WithFeatures, teacher_view


def cases(folder: Path) -> tuple[list[dict[str, Path]], list[dict[str, Path]]]:
    """The labelled and the unlabelled cases."""
    images = sorted((folder / "images").glob("*.nii.gz"))
    labels = {path.name: path for path in (folder / "labels").glob("*.nii.gz")}
    labelled = [{"image": path, "label": labels[path.name]} for path in images if path.name in labels]
    return labelled, [{"image": path} for path in images if path.name not in labels]


def batches(files: list[dict[str, Path]], patch: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """An endless stream of batches of random patches."""
    keys = [key for key in ("image", "label") if key in files[0]]
    crop = (
        RandCropByPosNegLabeld(keys, label_key="label", spatial_size=patch, num_samples=1)
        if "label" in keys
        else RandSpatialCropd(keys, patch, random_size=False)
    )
    transform = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            NormalizeIntensityd("image"),
            SpatialPadd(keys, patch),
            crop,
            ToTensord(keys, track_meta=False),
        ]
    )
    loader = DataLoader(CacheDataset(files, transform, progress=False), batch_size=size, shuffle=True)
    while True:
        yield from loader


def train(folder: Path, steps: int, classes: int, patch: Sequence[int], device: str) -> list[float]:
    """Trains both networks. Returns the loss of each step."""
    network_a = WithFeatures(BasicUNet(3, 1, classes, features=(16, 16, 32, 64, 128, 16))).to(device)
    network_b = WithFeatures(SegResNet(3, 16, 1, classes)).to(device)  # both classify 16 features
    criterion = DualContrastiveLoss(classes, ramp_steps=max(1, steps)).to(device)
    optimizer = torch.optim.AdamW([*network_a.parameters(), *network_b.parameters()], lr=1e-3)
    labelled, unlabelled = cases(folder)
    streams = zip(batches(labelled, patch, 2), batches(unlabelled, patch, 2), strict=False)
    losses = []
    for step, (known, other) in zip(range(steps), streams, strict=False):
        view, teacher = teacher_view(network_a, network_b, other["image"].to(device))
        images = torch.cat((known["image"].to(device), view))  # the labelled ones come first
        labels = known["label"][:, 0].long().to(device)
        (logits_a, features_a), (logits_b, features_b) = network_a(images), network_b(images)
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
        print(f"step {step}: loss {losses[-1]:.3f}, reliable {float(result.terms['kept_fraction']):.0%}", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    train(chosen.folder, chosen.steps, chosen.classes, chosen.patch, chosen.device)
