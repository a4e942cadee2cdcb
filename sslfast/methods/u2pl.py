"""`u2pl` (Wang et al., CVPR 2022, arXiv 2203.03884).

A mean teacher; its unreliable voxels are negatives of the classes that it finds unlikely there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss
from sslfast.methods.mean_teacher import WithTeachers, ema_update
from sslfast.ops.class_prototypes import class_prototypes, unit
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.ops.flags import RELIABLE, is_reliable, pseudo_label
from sslfast.ops.linear_logits import Logits, materialize
from sslfast.ops.pseudo_supervised import pseudo_supervised
from sslfast.ops.reliability import reliability
from sslfast.ops.sample_voxels import gather_over_ranks, gather_voxels, sample_voxels
from sslfast.options import MethodOptions
from sslfast.ranges import Range

DROPPED = 20.0  # percentage of voxels, the most uncertain, without a pseudo-label at first; falls linearly to 0
CONFIDENT = 0.3  # a voxel is an anchor of its class above this probability
ANCHORS, NEGATIVES = 256, 50  # anchors per class, negatives per anchor
LOWEST, LIKELIEST = 3, 20  # a class is unlikely in a voxel if its rank there is in LOWEST .. LIKELIEST - 1
TEMPERATURE = 0.5
CONTRAST = 0.1  # weight of the contrastive loss
NEW = 512  # most negatives that a step adds to a class


class Memory(nn.Module):
    """Ring buffers [C, room, K] of each class's negatives, the same in every process. The host reads nothing."""

    rows: Tensor
    written: Tensor  # [C] int64, negatives added so far
    room: Tensor  # [C] int64, capacities

    def __init__(self, num_classes: int, width: int, remembered: int) -> None:
        super().__init__()
        room = torch.tensor([remembered * 5 // 3] + [remembered] * (num_classes - 1)).clamp_min(NEW)
        self.register_buffer("rows", torch.zeros(num_classes, int(room[0]), width))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("room", room, persistent=False)
        self.forgets = remembered == 0

    @torch.no_grad()
    def add(self, label: int, rows: Tensor, count: Tensor) -> None:
        """Adds the first `count` [] of rows [M, K] to the negatives of class `label`; without memory, replaces them."""
        if self.forgets:
            self.written[label] = 0
        order = torch.arange(len(rows), device=rows.device)
        slots = (self.written[label] + order) % self.room[label]
        used = (order < count).unsqueeze(1)
        self.rows[label, slots] = torch.where(used, rows, self.rows[label, slots])
        self.written[label] += count

    def draw(self, anchors: int) -> tuple[Tensor, Tensor]:
        """Random negatives [C, anchors, NEGATIVES, K]; and bool [C], if a class has any."""
        available = torch.minimum(self.written, self.room).view(-1, 1, 1)
        chosen = torch.rand(len(available), anchors, NEGATIVES, device=self.rows.device)
        slots = (chosen * available).long().clamp_max(available - 1).clamp_min(0)
        classes = torch.arange(len(available), device=self.rows.device).view(-1, 1, 1)
        return self.rows[classes, slots], available.flatten() > 0


class U2PL(WithTeachers):
    """CE + Dice, CE against pseudo-labels, and contrast.

    Labelled volumes: CE + Dice. Unlabelled volumes: CE against the teacher's class on its reliable voxels, times voxels
    / reliable voxels (its equations 2 to 5). Contrast (equations 6 to 14): the anchors of a class are voxels with this
    label or reliable pseudo-label and a probability above 0.3. Their positive is the mean of the teacher's features
    there. Their negatives are labelled voxels of other classes where the teacher ranks the class high, and unreliable
    voxels where it ranks it low.
    """

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """Options of u2pl."""

        memory: Annotated[int, Range(0, 10**6)] = 30_000
        """Negatives kept per class from step to step; 5/3 as many of the background. 0: only those of this step."""

    memories: nn.ModuleList

    def __init__(self, num_classes: int, steps: int, seed: int, options: Options) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.remembered = options.memory
        self.lowest = min(LOWEST, num_classes - 1)

    def prepare(self, network_a: nn.Module, network_b: nn.Module) -> None:
        super().prepare(network_a, network_b)
        networks: tuple[Any, Any] = network_a, network_b
        self.memories = nn.ModuleList(Memory(self.num_classes, one.width, self.remembered) for one in networks)

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        ema_update(self.teachers, (network_a, network_b), min(1 - 1 / (step + 1), 0.99))
        num_labelled = len(labels)
        outputs: list[tuple[Logits, Tensor]] = [network(images, linear=True) for network in (network_a, network_b)]
        logits = [z for z, _ in outputs]
        supervised = dual_supervised(logits[0][:num_labelled], logits[1][:num_labelled], labels, reducer=self.reducer)
        with torch.no_grad():
            teacher_outputs = [teacher(images) for teacher in self.teachers]
        percentile = 100 - DROPPED * max(1 - step / self.steps, 0)
        pseudo, contrast = [], []
        for i, (memory, (_, features)) in enumerate(zip(self.memories, outputs, strict=True)):
            flags = reliability(teacher_outputs[i][0][num_labelled:], percentile, reducer=self.reducer).flags
            selected = pseudo_supervised(logits[i][num_labelled:], flags, reducer=self.reducer)
            voxels = self.reducer.sum(selected.reliable_voxels.new_full((), flags.numel()))
            pseudo.append(selected.ce * voxels / selected.reliable_voxels.clamp_min(1))
            probabilities = materialize(logits[i]).detach().float().softmax(1)
            contrast.append(
                self.contrast(memory, probabilities, features, teacher_outputs[i], labels, flags, 2 * step + i)
            )
        losses = supervised.ce + supervised.dice + torch.stack(pseudo) + CONTRAST * torch.stack(contrast)
        terms = {**supervised.learned, "pseudo": torch.stack(pseudo), "contrast": torch.stack(contrast)}
        return DualLoss(losses[0], losses[1], {name: value.detach() for name, value in terms.items()})

    def contrast(
        self,
        memory: nn.Module,
        probabilities: Tensor,
        features: Tensor,
        teacher_outputs: tuple[Tensor, Tensor],
        labels: Tensor,
        flags: Tensor,
        draw: int,
    ) -> Tensor:
        """The contrastive loss [] of one network with probabilities [N, C, *spatial]; also fills its memory.

        `teacher_outputs`: the logits and features of its teacher.
        """
        assert isinstance(memory, Memory)
        classes, (teacher_logits, teacher_features) = self.num_classes, teacher_outputs
        label = torch.cat((labels.long(), pseudo_label(flags)))  # [N, *spatial], -1 where not annotated
        sure = torch.cat((labels >= 0, is_reliable(flags)))
        target = label.clamp_min(0)
        anchor = sure & (probabilities.gather(1, target.unsqueeze(1)).squeeze(1) > CONFIDENT)
        marked = torch.where(anchor, target + RELIABLE, target).to(torch.uint8)
        centres, members = class_prototypes(teacher_features, marked, classes, reducer=self.reducer)
        drawn = sample_voxels(marked ^ RELIABLE, [ANCHORS] * classes, self.seed, draw, reducer=self.reducer)
        anchors = unit(gather_voxels(features, drawn.indices), dim=-1)  # [C, A, K]

        with torch.no_grad():
            samples = []
            for c in range(classes):
                # the number of classes that the teacher finds likelier
                rank = (teacher_logits > teacher_logits[:, c : c + 1]).sum(1)
                likely, unlikely = rank < self.lowest, (rank >= self.lowest) & (rank < LIKELIEST)
                num_labelled = len(labels)
                negative = torch.cat(
                    (
                        (labels >= 0) & (labels != c) & likely[:num_labelled],
                        ~is_reliable(flags) & unlikely[num_labelled:],
                    )
                )
                marked = torch.where(negative, 0, RELIABLE).to(torch.uint8)
                samples.append(sample_voxels(marked, [NEW, 0], self.seed + 1 + c, draw, reducer=self.reducer))
            indices, counts = (torch.stack([of[0] for of in parts]) for parts in zip(*samples, strict=True))
            rows, counts = gather_over_ranks(gather_voxels(teacher_features, indices), counts, self.reducer)
            for c in range(classes):
                memory.add(c, rows[c], counts[c])
            negatives, filled = memory.draw(ANCHORS)

        to_positive = (anchors * unit(centres, dim=-1).unsqueeze(1)).sum(-1, keepdim=True)  # [C, A, 1]
        to_negatives = torch.einsum("cak,cank->can", anchors, unit(negatives, dim=-1))
        losses = -(torch.cat((to_positive, to_negatives), -1) / TEMPERATURE).log_softmax(-1)[..., 0]  # [C, A]
        used = torch.arange(ANCHORS, device=losses.device) < drawn.counts.unsqueeze(1)
        used = used & (filled & (members > 0)).unsqueeze(1)
        return self.reducer.sum(torch.where(used, losses, 0).sum()) / self.reducer.sum(used.sum()).clamp_min(1)
