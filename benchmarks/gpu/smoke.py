"""Does anything run: one backend's loss and gradients, option by option, against the reference in float64 on the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sslfast
from benchmarks.gpu.device import BACKENDS, DEVICE, synchronize
from benchmarks.gpu.records import append
from sslfast.losses import PRESETS
from sslfast.ops import masked_consistency

CLASSES, WIDTH, SIZE = 3, 8, (9, 11, 13)
CASES: dict[str, dict[str, Any]] = {f"preset {name}": {"preset": name} for name in PRESETS} | {
    "cross pseudo-labels": {"pseudo_label": "cross"},
    "per class": {"per_class_percentile": True, "anchor_label": "loser"},
    "gradients of the keys": {"grad_keys": True},
}
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of a gradient, relative, in the L2 norm


def compute(options: dict[str, Any], maps: list[Tensor], labels: Tensor, teacher: Tensor | None) -> list[Tensor]:
    """The loss with every option's kernels in it, and its gradients; on the CPU, in float64."""
    leaves = [m.detach().requires_grad_() for m in maps]
    criterion = sslfast.DualContrastiveLoss(CLASSES, ramp_steps=2, anchors=9, negatives=11, **options).to(labels.device)
    loss = criterion(*leaves, labels, step=2, teacher=teacher).loss
    loss = loss + masked_consistency(leaves[0], leaves[1], max_entropy=0.5).loss
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [t.detach().double().cpu() for t in (loss, *gradients)]


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits and features of four volumes, labels of the first two, a teacher's logits for the others."""
    random = torch.Generator().manual_seed(3)
    maps = [
        2 * torch.randn(4, channels, *SIZE, generator=random).to(dtype) for channels in (CLASSES, CLASSES, WIDTH, WIDTH)
    ]
    labels = torch.randint(-1, CLASSES, (2, *SIZE), generator=random)
    return maps, labels, 2 * torch.randn(2, CLASSES, *SIZE, generator=random).to(dtype)


def main() -> int:
    """The command; returns the exit status: 1 where a case differs or fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("backend", choices=tuple(BACKENDS))
    parser.add_argument("--output", type=Path, help="folder of the results; none: they are only printed")
    flags = parser.parse_args()
    cases = [
        (f"{name}{', teacher' if taught else ''}{', bf16' if dtype == torch.bfloat16 else ''}", options, taught, dtype)
        for name, options in CASES.items()
        for taught in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
        if not (taught and options.get("preset") == "as-released")
        if dtype == torch.float32 or options == {"preset": "recommended"}
    ]
    wrong = 0
    for name, options, taught, dtype in cases:
        ok, loss, gradient, said = _check(flags.backend, options, taught, dtype)
        wrong += not ok
        print(
            f"{name}: {'equal' if ok else 'WRONG'}, loss off by {loss}, gradient by {gradient} {said or ''}", flush=True
        )
        if flags.output:
            record = {
                "backend": flags.backend,
                "case": name,
                "ok": ok,
                "loss": loss,
                "gradient": gradient,
                "said": said,
            }
            append(flags.output, "check", **record)
    print(f"{len(cases) - wrong} of {len(cases)} cases equal the reference")
    return int(wrong > 0)


def _check(
    backend: str, options: dict[str, Any], taught: bool, dtype: torch.dtype
) -> tuple[bool, float | None, float | None, str | None]:
    """Whether they are equal, the relative errors of loss and gradients, and the error that ended it."""
    maps, labels, teacher = inputs(dtype)
    with sslfast.backend("reference"):
        exact = compute(options, [m.double() for m in maps], labels, teacher.double() if taught else None)
    try:
        there = [m.to(DEVICE) for m in maps]
        with sslfast.backend(BACKENDS[backend]):
            ours = compute(options, there, labels.to(DEVICE), teacher.to(DEVICE) if taught else None)
        synchronize()
    except (RuntimeError, TypeError, ValueError) as error:
        return False, None, None, str(error).splitlines()[0]
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(ours, exact, strict=True)]
    ok = errors[0] <= ROUNDING[torch.float32] and max(errors[1:]) <= ROUNDING[dtype]  # NaN is not
    return ok, errors[0], max(errors[1:]), None


if __name__ == "__main__":
    sys.exit(main())
