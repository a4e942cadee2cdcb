"""`bcp` (Bai et al., CVPR 2023, arXiv 2305.00673): labelled and unlabelled patches pasted into each other."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from sslfast.losses import DualLoss
from sslfast.methods.mean_teacher import WithTeachers, ema_update
from sslfast.ops.dual_supervised import DualSupervised, dual_supervised
from sslfast.options import MethodOptions

BOX = 2 / 3  # extent of the box as a fraction of each axis
PASTED = 0.5  # weight of the losses on unlabelled voxels
PRETRAINING = 0.1  # fraction of the run, at its start, in which only labelled patches are mixed
DECAY = 0.99  # decay of the teachers' moving average


class BCP(WithTeachers):
    """A box of a labelled patch is pasted into an unlabelled patch, and the reverse. The labelled voxels of a mixed
    patch have CE + Dice against the label. The unlabelled ones have half of that, against the largest component of each
    of the teacher's classes (its equations 3 to 9). Each network has its own teacher. The first tenth of the run mixes
    only labelled patches.
    """

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.pretraining = round(PRETRAINING * steps)

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        networks, num_labelled = (network_a, network_b), len(labels)
        inside = box(images.shape[2:], images.device)
        known, unknown = images[:num_labelled], images[num_labelled:]
        if step < self.pretraining or not len(unknown):
            ema_update(self.teachers, networks, 0.0)
            mixed = torch.where(inside, known, known.roll(1, 0))
            target = torch.where(inside, labels, labels.roll(1, 0))
            supervised = dual_supervised(network_a(mixed)[0], network_b(mixed)[0], target, reducer=self.reducer)
            return self.result(supervised, torch.zeros_like(supervised.ce))
        ema_update(self.teachers, networks, DECAY)
        pairs = max(num_labelled, len(unknown))  # the shorter of the two is repeated
        to_label, to_guess = (torch.arange(pairs, device=images.device) % n for n in (num_labelled, len(unknown)))
        label, image, other = labels[to_label], known[to_label], unknown[to_guess]
        box_is_labelled = (torch.arange(pairs, device=images.device) % 2 == step % 2).view(-1, 1, 1, 1)
        is_known = torch.where(box_is_labelled, inside, ~inside)  # [pairs, *patch]
        mixed = torch.where(is_known.unsqueeze(1), image, other)
        logits = network_a(mixed)[0], network_b(mixed)[0]
        supervised = dual_supervised(*logits, torch.where(is_known, label, -1), reducer=self.reducer)
        guessed = []
        for n, teacher in enumerate(self.teachers):
            guess = torch.where(is_known, -1, self.guess(teacher, unknown)[to_guess])
            terms = dual_supervised(*logits, guess, reducer=self.reducer)
            guessed.append(terms.ce[n] + terms.dice[n])
        return self.result(supervised, torch.stack(guessed))

    @staticmethod
    def result(supervised: DualSupervised, guessed: Tensor) -> DualLoss:
        """Half of CE + Dice on labelled voxels, and on guessed ones [2] the same with their weight."""
        losses = (supervised.ce + supervised.dice + PASTED * guessed) / 2
        return DualLoss(losses[0], losses[1], {**supervised.learned, "pseudo": guessed.detach()})

    @torch.no_grad()
    def guess(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """The teacher's classes [U, *patch], of each foreground class only the largest component."""
        classes = teacher(images)[0].argmax(1)
        return torch.from_numpy(np.stack([largest_components(c) for c in classes.cpu().numpy()])).to(images.device)


def box(size: torch.Size, device: torch.device) -> Tensor:
    """Bool [*size], true in a randomly placed box of two thirds of each axis."""
    inside = torch.zeros(size, dtype=torch.bool, device=device)
    extent = [round(s * BOX) for s in size]
    start = [int(torch.randint(s - e + 1, ())) for s, e in zip(size, extent, strict=True)]
    inside[tuple(slice(b, b + e) for b, e in zip(start, extent, strict=True))] = True
    return inside


def largest_components(classes: np.ndarray) -> np.ndarray:
    """The classes [*spatial], of each foreground class only the largest component (26-connected in 3D)."""
    kept = np.zeros_like(classes)
    for c in np.unique(classes[classes > 0]):
        components, count = ndimage.label(classes == c, np.ones((3,) * classes.ndim))
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        kept[components == 1 + sizes.argmax()] = c
    return kept
