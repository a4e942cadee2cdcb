"""What the speed benchmarks compute: the inputs, the implementations, and the fewest bytes that must move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from sslfast.losses import DualContrastiveHead, DualContrastiveLoss
from sslfast.ops import (
    VoxelSample,
    class_prototypes,
    dual_supervised,
    gather_voxels,
    masked_consistency,
    pseudo_supervised,
    rectified_consistency,
    reliability,
    sample_voxels,
    voxel_infonce,
)
from sslfast.options import Norm

PERCENTILE = 20.0
MAX_ENTROPY = 0.5  # nats
STEP_WITH_TEACHER = "dual_contrastive, teacher"  # of the default method
STEP_WITHOUT = "dual_contrastive, contrast"  # of networks that teach each other, with a contrastive loss
HEAD = "head, teacher"  # from features instead of logits, as the trainer calls it
OPS = (
    "dual_supervised",
    "reliability",
    "pseudo_supervised",
    "rectified_consistency",
    "masked_consistency",
    "class_prototypes",
    "sample_voxels",
    "voxel_infonce",
)
STEP = 6000  # the end of the ramp
NORMS: tuple[Norm, ...] = ("batch", "instance")  # sync-batch is batch in one process
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOLUMES = {
    "la": (112, 112, 80),
    "pancreas": (96, 96, 96),
    "whole": (256, 256, 128),
    "small": (32, 32, 32),
    "tiny": (4, 4, 8),
}


@dataclass(frozen=True)
class Case:
    """The inputs of one row."""

    volume: str
    classes: int
    width: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """From `volume,classes,width,dtype`."""
        volume, classes, width, dtype = text.split(",")
        return cls(volume, int(classes), int(width), dtype)

    @property
    def volumes(self) -> int:
        """Half of them labelled."""
        return 2 if self.volume == "whole" else 4

    @property
    def voxels(self) -> int:
        """Voxels of one network's output."""
        size = VOLUMES[self.volume]
        return self.volumes * size[0] * size[1] * size[2]

    def __str__(self) -> str:
        size = "x".join(map(str, VOLUMES[self.volume]))
        return f"{self.volumes} x {size}, C={self.classes}, K={self.width}, {self.dtype}"


class Inputs:
    """Logits with a signal, features, labels; seeded."""

    def __init__(self, case: Case, layout: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self._make(case, layout)

    def _make(self, case: Case, layout: str) -> None:
        size = VOLUMES[case.volume]
        memory = torch.channels_last_3d if layout == "channels-last" else torch.contiguous_format

        def leaf(values: Tensor) -> Tensor:
            return values.to(DTYPES[case.dtype]).to(memory_format=memory).requires_grad_()

        truth = torch.randint(0, case.classes, (case.volumes, *(s // 4 for s in size))).repeat_interleave(4, 1)
        truth = truth.repeat_interleave(4, 2).repeat_interleave(4, 3)
        signal = 2 * torch.nn.functional.one_hot(truth, case.classes).movedim(-1, 1)
        self.logits_a, self.logits_b = (leaf(signal + torch.randn(signal.shape)) for _ in range(2))
        self.features_a, self.features_b = (leaf(torch.randn(case.volumes, case.width, *size)) for _ in range(2))
        self.num_labelled = case.volumes // 2
        self.labels = truth[: self.num_labelled].contiguous()
        unlabelled = signal[self.num_labelled :]
        self.teacher = (unlabelled + torch.randn(unlabelled.shape)).to(DTYPES[case.dtype]).log_softmax(1)

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient."""
        return [self.logits_a, self.logits_b, self.features_a, self.features_b]


Call = Callable[[], Tensor]  # the loss


def step_implementations(
    inputs: Inputs, case: Case, with_teacher: bool = False, compiled: bool = True
) -> dict[str, Call]:
    """The whole step, by name, with a teacher or with a contrastive loss; the last is ours."""
    contrast_weight = 0.0 if with_teacher else 0.1
    criterion = DualContrastiveLoss(
        case.classes, percentile=PERCENTILE, gate=(0, 0), contrast_weight=contrast_weight, ramp_steps=STEP
    )
    arguments = (inputs.logits_a, inputs.logits_b, inputs.features_a, inputs.features_b, inputs.labels)
    teacher = inputs.teacher if with_teacher else None
    rest: dict[str, Any] = {"contrast_weight": contrast_weight, "teacher": teacher}
    plain = functools.partial(eager.dual_contrastive, *arguments, PERCENTILE, **rest)
    calls: dict[str, Call] = {
        "eager, host percentile": lambda: plain(find=eager.numpy_percentile),
        "eager, kthvalue": lambda: plain(find=eager.kthvalue_percentile),
    }
    if compiled:
        fast = torch.compile(eager.dual_contrastive)
        calls["torch.compile, kthvalue"] = lambda: fast(*arguments, PERCENTILE, eager.kthvalue_percentile, **rest)
    return {**calls, "sslfast": lambda: criterion(*arguments, step=STEP, teacher=teacher).loss}


def head_implementations(inputs: Inputs, case: Case) -> dict[str, Call]:
    """Classifiers and loss in one, against torch's classifiers (under autocast for bfloat16 features) and our loss.

    The classifiers come with and without the published networks' channel dropout before them.
    """
    torch.manual_seed(1)
    options = {"percentile": PERCENTILE, "gate": (0, 0), "ramp_steps": STEP}
    head = DualContrastiveHead(case.classes, case.width, dropout=0.5, **options)
    classifiers, features = (head.classifier_a, head.classifier_b), (inputs.features_a, inputs.features_b)
    for classifier in classifiers:
        torch.nn.init.normal_(classifier.weight, std=2 / case.width**0.5)  # logits of a network that has learnt

    def unfused(dropout: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=DTYPES[case.dtype] == torch.bfloat16):
            logits = [c(head.dropout(f) if dropout else f) for c, f in zip(classifiers, features, strict=True)]
        return head.criterion(*logits, *features, inputs.labels, step=STEP, teacher=inputs.teacher).loss

    return {
        "classifier, sslfast loss": lambda: unfused(dropout=False),
        "dropout, classifier, sslfast loss": lambda: unfused(dropout=True),
        "sslfast": lambda: head(*features, inputs.labels, step=STEP, teacher=inputs.teacher).loss,
    }


def op_implementations(inputs: Inputs, case: Case) -> dict[str, dict[str, Call]]:
    """Each op, by name: eager and ours. An op without gradient gives a number that depends on its result."""
    num_labelled = inputs.num_labelled
    za, zb, labels = inputs.logits_a, inputs.logits_b, inputs.labels
    features, student, teacher = inputs.features_b[num_labelled:], za[num_labelled:], inputs.teacher
    flags = reliability(teacher, PERCENTILE).flags
    kept, label = (flags & 32) > 0, (flags & 31).long()

    def draw_ours() -> list[VoxelSample]:
        return [
            sample_voxels(flags, [256] * case.classes, 1, STEP, role="anchors"),
            sample_voxels(flags, [512] * case.classes, 1, STEP, role="negatives"),
        ]

    with torch.no_grad():
        sums, members = class_prototypes(features, flags, case.classes)
        samples = draw_ours()
        anchors, negatives = (gather_voxels(features, s.indices) for s in samples)
    anchors.requires_grad_()

    def draw() -> Tensor:
        flat, all_labels = kept.flatten(), label.flatten()
        drawn = []
        for c in range(case.classes):
            for mask, quota in ((~flat & (all_labels == c), 256), (flat & (all_labels != c), 512)):
                candidates = mask.nonzero().squeeze(1)
                drawn.append(candidates[torch.randperm(len(candidates), device=flat.device)[:quota]].sort().values)
        return torch.cat(drawn).sum()

    def sums_by_class() -> Tensor:
        rows = torch.nn.functional.normalize(features.movedim(1, -1)[kept].float(), dim=1)
        return torch.stack([rows[label[kept] == c].sum(0) for c in range(case.classes)]).sum()

    unit = functools.partial(torch.nn.functional.normalize, dim=-1)
    own_class = torch.arange(case.classes, device=anchors.device).repeat_interleave(anchors.shape[1])

    def infonce() -> Tensor:
        to_prototypes, to_negatives = unit(anchors) @ unit(sums).T, unit(anchors) @ unit(negatives).mT
        similarity = torch.cat((to_prototypes, to_negatives), -1).flatten(0, 1) / 0.1
        return torch.nn.functional.cross_entropy(similarity, own_class)

    def linear_cross_entropy() -> Tensor:  # each class has its own keys
        rows = unit(anchors) / 0.1
        losses = [
            torch.nn.functional.linear_cross_entropy(
                rows[c], torch.cat((unit(sums), unit(negatives[c]))), own_class[c * rows.shape[1] :][: rows.shape[1]]
            )
            for c in range(case.classes)
        ]
        return torch.stack(losses).mean()

    has_linear = hasattr(torch.nn.functional, "linear_cross_entropy")  # torch 2.13
    return {
        "dual_supervised": {
            "eager": lambda: torch.stack(eager.dual_supervised(za[:num_labelled], zb[:num_labelled], labels)).sum(),
            "sslfast": lambda: torch.stack(
                dual_supervised(za[:num_labelled], zb[:num_labelled], labels, discrepancy_over="labelled")[:3]
            ).sum(),
        },
        "reliability": {
            "eager": lambda: torch.as_tensor(eager.reliability(teacher, PERCENTILE, eager.kthvalue_percentile)[0]),
            "sslfast": lambda: reliability(teacher, PERCENTILE).threshold,
        },
        "pseudo_supervised": {
            "eager": lambda: eager.pseudo_supervised(student, kept, label),
            "sslfast": lambda: sum(pseudo_supervised(student, flags)[:2], torch.zeros(())),
        },
        "rectified_consistency": {
            "eager": lambda: eager.teacher_consistency(student, teacher, kept, label),
            "sslfast": lambda: sum(rectified_consistency(student, teacher, flags)[:3], torch.zeros(())),
        },
        "masked_consistency": {
            "eager": lambda: eager.masked_consistency(student, teacher, MAX_ENTROPY),
            "sslfast": lambda: masked_consistency(student, teacher, max_entropy=MAX_ENTROPY).loss,
        },
        "class_prototypes": {
            "eager": lambda: sums_by_class().detach(),
            "sslfast": lambda: class_prototypes(features.detach(), flags, case.classes).sums.sum(),
        },
        "sample_voxels": {
            "eager": draw,
            "sslfast": lambda: sum((sample.indices.sum() for sample in draw_ours()), torch.zeros(())),
        },
        "voxel_infonce": {
            "eager": infonce,
            **({"linear_cross_entropy": linear_cross_entropy} if has_linear else {}),
            "sslfast": lambda: (
                voxel_infonce(anchors, samples[0].counts, sums, members, negatives, samples[1].counts).loss
            ),
        },
    }


def implementations(op: str, inputs: Inputs, case: Case) -> dict[str, Call]:
    """Implementations of the loss, of the head or of one op, by name; the last is ours."""
    if op in (STEP_WITH_TEACHER, STEP_WITHOUT):
        return step_implementations(inputs, case, op == STEP_WITH_TEACHER)
    return head_implementations(inputs, case) if op == HEAD else op_implementations(inputs, case)[op]


def floor_bytes(op: str, case: Case) -> float:
    """The fewest bytes a voxel that must move: each pass reads its inputs once and writes its outputs once."""
    s = torch.finfo(DTYPES[case.dtype]).bits / 8
    logits, features, half = case.classes * s, case.width * s, 0.5  # of one network
    forward = {
        STEP_WITHOUT: half * (2 * logits + 8) + half * (2 * logits + 1 + features),
        STEP_WITH_TEACHER: half * (2 * logits + 8) + half * (3 * logits + 1),
        HEAD: 2 * features + half * 8 + half * (logits + 1),
        "dual_supervised": half * (2 * logits + 8),
        "reliability": half * (logits + 1),
        "pseudo_supervised": half * (logits + 1),
        "rectified_consistency": half * (2 * logits + 1),
        "masked_consistency": half * 2 * logits,
        "class_prototypes": half * (features + 1),
        "sample_voxels": half * 1,
        "voxel_infonce": 0.0,
    }
    backward = {
        STEP_WITHOUT: half * (4 * logits + 8) + half * (4 * logits + 1) + features,
        STEP_WITH_TEACHER: half * (4 * logits + 8) + half * (5 * logits + 1),
        HEAD: 4 * features + half * 8 + half * (logits + 1),
        "dual_supervised": half * (4 * logits + 8),
        "pseudo_supervised": half * (2 * logits + 1),
        "rectified_consistency": half * (3 * logits + 1),
        "masked_consistency": half * 3 * logits,
    }
    return forward[op] + backward.get(op, 0.0)


def check_same(op: str, calls: dict[str, Call]) -> None:
    """Checks that the implementations compute the same, but for the random draw and the percentile's rounding.

    Raises:
        RuntimeError: one computes something else.
    """
    values = {name: float(call().detach()) for name, call in calls.items()}
    for name, value in values.items():
        tolerance = {"sample_voxels": 0.1, "dual_contrastive": 0.02, "class_prototypes": 0.02}.get(
            op.partition(",")[0], 2e-3
        )
        if abs(value - values["sslfast"]) > tolerance * max(abs(value), 1.0):
            raise RuntimeError(f"{op}: {name} gives {value}, sslfast gives {values['sslfast']}")
