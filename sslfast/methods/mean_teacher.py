"""`mean-teacher` (Tarvainen & Valpola, NeurIPS 2017): each network's teacher is a moving average of its weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss, ramp_up
from sslfast.methods.method import ConsistencyOptions, Method
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.ops.masked_consistency import masked_consistency

DECAY = 0.99  # decay of the average from step 99 on; it rises to this before
NOISE, MOST_NOISE = 0.1, 0.2  # standard deviation and bound of the noise on the teachers' images


class WithTeachers(Method):
    """A method in which each network has a teacher: a copy whose weights `ema_update` changes."""

    teachers: nn.ModuleList

    def prepare(self, network_a: nn.Module, network_b: nn.Module) -> None:
        self.teachers = nn.ModuleList(copy.deepcopy(network) for network in (network_a, network_b))
        self.teachers.requires_grad_(False)


class MeanTeacher(WithTeachers):
    """Labelled volumes: CE + Dice. Unlabelled volumes: mean squared difference of the student's and the teacher's
    probabilities; the teacher's images have a little noise added.
    """

    Options = ConsistencyOptions

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        ema_update(self.teachers, (network_a, network_b), min(1 - 1 / (step + 1), DECAY))
        logits = [network(images)[0] for network in (network_a, network_b)]
        num_labelled = len(labels)
        supervised = dual_supervised(logits[0][:num_labelled], logits[1][:num_labelled], labels, reducer=self.reducer)
        consistency = torch.stack(
            [
                masked_consistency(
                    student[num_labelled:],
                    self.teach(teacher, images[num_labelled:])
                    if len(images) > num_labelled
                    else student[num_labelled:],
                    max_entropy=self.max_entropy(step),
                    reducer=self.reducer,
                ).loss
                for student, teacher in zip(logits, self.teachers, strict=True)
            ]
        )
        weight = self.options.consistency_weight * ramp_up(step, self.ramp_steps(self.options.ramp))
        losses = supervised.ce + supervised.dice + weight * consistency
        terms = {**supervised.learned, "consistency": consistency}
        return DualLoss(losses[0], losses[1], {name: value.detach() for name, value in terms.items()})

    @torch.no_grad()
    def teach(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """The teacher's logits [U, C, *spatial] for images [U, 1, *spatial], U > 0."""
        logits: Tensor = teacher(noisy(images))[0]
        return logits

    def max_entropy(self, step: int) -> float:
        """Voxels where the teacher's entropy is at least this, in nats, are left out."""
        return math.inf


@torch.no_grad()
def ema_update(teachers: nn.ModuleList, students: tuple[nn.Module, nn.Module], decay: float) -> None:
    """Sets the teachers' weights to decay · teacher + (1 - decay) · student."""
    for teacher, student in zip(teachers, students, strict=True):
        for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
            average.lerp_(value, 1 - decay)


def noisy(images: Tensor) -> Tensor:
    """The images with noise added: the teachers' input."""
    return images + (NOISE * torch.randn_like(images)).clamp(-MOST_NOISE, MOST_NOISE)
