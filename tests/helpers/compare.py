"""Values and gradients of a computation, and how they are compared with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helpers.maps import sums_otherwise
from helpers.options import TARGET
from sslfast.ops.backend import backend

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3 if TARGET.interpreted else 4e-3, torch.float16: 5e-4}
SMALLEST = {  # float16 has nothing between 0 and 2^-24
    torch.float32: 1e-12,
    torch.bfloat16: 1e-12,
    torch.float16: 2.0**-24,
}

Compute = Callable[..., list[Tensor]]


def with_gradients(compute: Compute, *maps: Tensor) -> list[Tensor]:
    """The values, and the gradients of a weighted sum of those that have one; zeros for a map without one."""
    leaves = [m.detach().requires_grad_() for m in maps]
    values = compute(*leaves)
    smooth = [v for v in values if v.requires_grad]
    total = sum((v * torch.linspace(1, 2, max(v.numel(), 1)).view_as(v).to(v.dtype)).sum() for v in smooth)
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True) if smooth else map(torch.zeros_like, leaves)
    return [*(v.detach() for v in values), *gradients]


def reference(compute: Compute, *maps: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values and gradients of the specification on the same numbers in `dtype`."""
    with backend("reference"):
        return with_gradients(compute, *(m.detach().to(dtype) for m in maps))


def assert_as_good_as_eager(compute: Compute, *maps: Tensor, terms: Sequence[Tensor | float] | None = None) -> None:
    """|ours - float64| <= 2 |eager float32 - float64| + rounding of the dtype, elementwise and in the relative L2 norm.

    `terms`: for each map, the size of the terms that cancel in its gradient; else its largest gradient.
    """
    ours = with_gradients(compute, *maps)
    exact = reference(compute, *maps)
    eager = reference(compute, *maps, dtype=torch.float32)
    assert len(ours) == len(exact)
    values = len(ours) - len(maps)
    for i, (mine, truth, plain) in enumerate(zip(ours, exact, eager)):
        assert mine.shape == truth.shape
        if not truth.is_floating_point():
            assert torch.equal(mine, truth)
            continue
        truth, mine, plain = truth.double(), mine.double(), plain.double()
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        scale = max(scale, 1.0) if i < values else scale  # values are means and sums of terms of order 1
        rounding = ROUNDING[maps[0].dtype if truth.shape == maps[0].shape else torch.float32]
        bound = 2 * (plain - truth).abs() + rounding * truth.abs() + 1e-6 * scale + SMALLEST[maps[0].dtype]
        if terms and i >= values:
            bound = bound + 1e-6 * terms[i - values]
        assert ((mine - truth).abs() <= bound).all()
        assert torch.linalg.norm(mine - truth) <= torch.linalg.norm(bound)


def assert_same(result: Sequence[Tensor], plain: Sequence[Tensor], layout: str) -> None:
    """The same bits, or within rounding where the sums are added up in another order."""
    for mine, other in zip(result, plain, strict=True):
        if sums_otherwise(layout):
            torch.testing.assert_close(mine, other)
        else:
            assert torch.equal(mine, other), layout


def with_threads(compute: Callable[[], list[Tensor]], *counts: int) -> list[list[Tensor]]:
    """The results with each number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(compute())
        return results
    finally:
        torch.set_num_threads(before)
