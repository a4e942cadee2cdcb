"""The smoke test: one backend's loss and gradients, option by option, against the reference in float64 on the CPU."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sslfast
from benchmarks.gpu.device import BACKENDS, DEVICE
from benchmarks.gpu.records import append
from sslfast.losses import PRESETS
from sslfast.ops import masked_consistency


class Case(NamedTuple):
    """One call of the loss."""

    name: str
    options: dict[str, Any]
    with_teacher: bool = False
    classes: int = 3
    width: int = 8
    size: tuple[int, ...] = (9, 11, 13)  # no multiple of a vector's length
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


def cases(backend: str) -> list[Case]:
    """Every preset and option, with a teacher and without; for CUDA also the sizes that have kernels of their own."""
    options: dict[str, dict[str, Any]] = {f"preset {name}": {"preset": name} for name in PRESETS}
    options |= {"contrast": {"contrast_weight": 0.1}, "no negatives": {"contrast_weight": 0.1, "negatives": 0}}
    plain = [Case(name, chosen) for name, chosen in options.items()]
    plain += [
        Case("C=2, whole vectors", {}, classes=2, width=16, size=(8, 12, 16)),
        Case("C=2, bf16", {}, classes=2, size=(8, 12, 16), dtype=torch.bfloat16),
    ]
    if backend == "cuda":
        plain += [
            Case("C=4, channels last", {"contrast_weight": 0.1}, classes=4, channels_last=True),
            Case("C=14, K=40", {"contrast_weight": 0.1}, classes=14, width=40, size=(5, 6, 7)),
            Case("C=32", {}, classes=32, size=(5, 6, 8)),
        ]
    return plain + [case._replace(name=f"{case.name}, teacher", with_teacher=True) for case in plain]


ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of a gradient, relative, in the L2 norm


def compute(case: Case, maps: Sequence[Tensor], labels: Tensor, teacher: Tensor) -> list[Tensor]:
    """The loss, a consistency that is no part of it, and their gradients; on the CPU, in float64."""
    leaves = [m.detach().requires_grad_() for m in maps]
    options = {"anchors": 9, "negatives": 11, **case.options}
    criterion = sslfast.DualContrastiveLoss(case.classes, **{"gate": (0, 0), "ramp_steps": 2, **options})
    criterion.to(labels.device)
    loss = criterion(*leaves, labels, step=2, teacher=teacher if case.with_teacher else None).loss
    loss = loss + masked_consistency(leaves[0], leaves[1], max_entropy=0.5).loss
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [t.detach().double().cpu() for t in (loss, *gradients)]


def inputs(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits and features of four volumes, labels of the first two, a teacher's logits for the others."""
    random = torch.Generator().manual_seed(3)

    def normal(volumes: int, channels: int) -> Tensor:
        values = 2 * torch.randn(volumes, channels, *case.size, generator=random).to(case.dtype)
        return values.to(memory_format=torch.channels_last_3d) if case.channels_last else values

    maps = [normal(4, channels) for channels in (case.classes, case.classes, case.width, case.width)]
    labels = torch.randint(-1, case.classes, (2, *case.size), generator=random)
    return maps, labels, normal(2, case.classes)


def check(backend: str, case: Case) -> tuple[float, float]:
    """The relative errors of the loss and, in the L2 norm, of the worst gradient."""
    maps, labels, teacher = inputs(case)
    with sslfast.backend("reference"):
        exact = compute(case, [m.double() for m in maps], labels, teacher.double())
    with sslfast.backend(BACKENDS[backend]):
        result = compute(case, [m.to(DEVICE) for m in maps], labels.to(DEVICE), teacher.to(DEVICE))
    loss, *gradients = (float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(result, exact, strict=True))
    return loss, max(gradients) if all(map(math.isfinite, gradients)) else math.nan


def main() -> int:
    """The command; returns the exit status: 1 where a case differs or fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("backend", choices=tuple(BACKENDS))
    parser.add_argument("--output", type=Path, help="folder of the results; none: they are only printed")
    flags = parser.parse_args()
    equal, wanted = 0, cases(flags.backend)
    for case in wanted:
        loss = gradient = failure = None
        ok = False
        try:
            loss, gradient = check(flags.backend, case)
            ok = loss <= ROUNDING[torch.float32] and gradient <= ROUNDING[case.dtype]  # NaN is not
        except Exception as error:  # of Triton's compiler, or of the device, which may end all that follow
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        equal += ok
        print(
            f"{case.name}: {'equal' if ok else 'WRONG'}, off by {loss}, gradient {gradient} {failure or ''}", flush=True
        )
        if flags.output:
            values = {"ok": ok, "loss": loss, "gradient": gradient, "error": failure}
            append(flags.output, "check", backend=flags.backend, case=case.name, **values)
    print(f"{equal} of {len(wanted)} cases equal the reference")
    return int(equal < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
