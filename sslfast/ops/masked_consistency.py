"""`masked_consistency`: squared distance of a student's and a teacher's probabilities, where the teacher is certain."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast.ops.check import check_classes, check_pair, check_range, check_reducer, compute_dtype
from sslfast.ops.linear_logits import Logits
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.sums import Slots, SumsOp, masked_logits, pack, unpack
from sslfast.renamed import old_arguments

SLOTS: Slots = {"certain": (), "squares": ()}  # voxels where the teacher is certain, and sum |p - q|^2 over them


class MaskedConsistency(NamedTuple):
    """The loss, and the number of voxels in its mean."""

    loss: Tensor  # []
    certain_voxels: Tensor  # [] int64


@old_arguments(ranks="reducer")
def masked_consistency(
    student: Logits,
    teacher: Logits,
    *,
    temperature: float = 1.0,
    max_entropy: float = math.inf,
    reducer: Reducer = SINGLE_PROCESS,
) -> MaskedConsistency:
    """Mean of (p - q)^2 over the classes and the voxels where H(q) < max_entropy.

    p = softmax(student), q = softmax(teacher / temperature). This is the loss of mean teachers (Tarvainen & Valpola,
    NeurIPS 2017); with a bound on the teacher's entropy that of UA-MT (Yu et al., MICCAI 2019); with a low temperature
    that of MCF (Wang et al., CVPR 2023). Only the student gets a gradient. Without such voxels the loss is exactly 0,
    with zero gradients.

    A NaN or infinite logit of the teacher makes the loss NaN, and so does one of the student where the voxel counts.

    Args:
        student, teacher: logits or log-probabilities [U, C, *spatial].
        temperature: values below 1 sharpen the teacher.
        max_entropy: nats; an entropy is at most ln C.
        reducer: process group over which the sums are all-reduced.
    """
    check_pair("student", student, "teacher", teacher)
    check_classes("student", student)
    check_range("temperature", temperature, 1e-6, 1e6)
    check_range("max_entropy", max_entropy, 0, math.inf)
    check_reducer(reducer)
    s = unpack(SLOTS, reducer.sum(OP((student, teacher), temperature, max_entropy)))
    loss = s["squares"] / (student.shape[1] * s["certain"].clamp_min(1))
    return MaskedConsistency(loss.to(compute_dtype(student)), s["certain"].detach().long())


def masked_consistency_ref(student: Tensor, teacher: Tensor, temperature: float, max_entropy: float) -> Tensor:
    """The specification of the sums in plain PyTorch."""
    log_q = (masked_logits(teacher.detach()) / temperature).log_softmax(1)
    q = log_q.exp()
    entropy = -torch.where(q == 0, 0, q * log_q).sum(1)  # [U, *spatial]
    certain = ~(entropy >= max_entropy)  # a NaN entropy passes, so that the loss is NaN
    squares = (masked_logits(student).softmax(1) - q).square().sum(1)
    return pack(SLOTS, certain=certain.count_nonzero(), squares=torch.where(certain, squares, 0).sum())


OP = SumsOp(
    "masked_consistency",
    SLOTS,
    maps=("student", "teacher"),
    students=1,
    rest="float temperature, float max_entropy",
    ref=masked_consistency_ref,
)
