"""What autograd and the dispatcher ask of an op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.loss_step import PRESETS, whole_step
from helpers.maps import random_flags, random_map
from helpers.options import TARGET, not_on, on_every_backend
from sslfast.ops import (
    class_prototypes,
    dual_supervised,
    gather_voxels,
    masked_consistency,
    norm_act,
    pseudo_supervised,
    rectified_consistency,
    reliability,
    sample_voxels,
    voxel_infonce,
)
from sslfast.ops.backend import has_linear_logits, norm_ops_for, ops_for
from sslfast.ops.linear_logits import LinearLogits
from sslfast.ops.registry import LIBRARIES, OPS

pytestmark = [on_every_backend, not_on("reference")]


def every_loss(a: Tensor, b: Tensor, f: Tensor) -> dict[str, Tensor]:
    """The losses of single ops, and of whole steps, of maps [4, ...]."""
    flags, labels = reliability(b, 50.0).flags, b.argmax(1)
    anchors, ones, negatives = torch.tensor([5] * 3), torch.tensor([1] * 3), torch.tensor([4] * 3)
    keys = anchors, torch.ones(3, 6), ones, torch.ones(3, 4, 6), negatives
    rows = gather_voxels(f, sample_voxels(flags, [5, 5, 5], 1, 2).indices)
    return {
        "supervised": dual_supervised(a, b, labels).ce.sum(),
        "pseudo": pseudo_supervised(a, flags).ce,
        "rectified": rectified_consistency(a, b, flags).rectified,
        "masked": masked_consistency(a, b).loss,
        "gathered": rows.square().sum(),
        "contrast": voxel_infonce(rows, *keys).loss,
        "normalised": norm_act(a, torch.ones(3), torch.zeros(3), residual=b, skip=b.detach()).values.square().sum(),
        **{preset: whole_step(labels[:2], preset=preset)(a, b, f, f)[0].sum() for preset in PRESETS},
    }


@pytest.mark.parametrize(
    "name", ["supervised", "pseudo", "rectified", "masked", "gathered", "contrast", "normalised", *PRESETS]
)
def test_a_second_derivative_raises_instead_of_being_zero(name: str) -> None:
    maps = [random_map(4, c, (3, 4, 5)).requires_grad_() for c in (3, 3, 6)]
    loss = every_loss(*maps)[name]
    gradients = torch.autograd.grad(loss, maps, create_graph=True, materialize_grads=True)
    penalty = sum(g.square().sum() for g in gradients)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + penalty).backward()


@contextmanager
def recorded_ops() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The ops that are called, with their arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace in LIBRARIES:
                name = function.name().partition("::")[2]
                calls.append((name, tuple(a.clone() if isinstance(a, Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield calls


def test_every_op_passes_opcheck() -> None:
    a, b, f = (random_map(4, c, (4, 5, 6)) for c in (3, 3, 6))
    linear = [LinearLogits(f[..., :3], torch.randn(4, 3, 7).requires_grad_()) for _ in range(2)]
    with recorded_ops() as calls:
        leaves = [m.requires_grad_() for m in (a, b, f)]
        sum(every_loss(*leaves).values()).backward()
        ops_for(a).voxel_entropy(a, None)
        ops_for(a).reliability(a, None, torch.tensor(30.0, dtype=torch.float64), torch.tensor(0.5))
        class_prototypes(f, random_flags(4, 3, (4, 5, 6)), 3, other=f, second=torch.tensor(1))
        if has_linear_logits(a):
            rectified_consistency(*linear, random_flags(4, 3, (4, 5, 3))).cosine.backward()
            dual_supervised(*linear, torch.zeros(4, 4, 5, 3, dtype=torch.long)).ce.sum().backward()
    assert {name for name, _ in calls} == set(OPS)
    different = {(name, *(a is None for a in arguments)): arguments for name, arguments in calls}
    for (name, *_), arguments in different.items():
        torch.library.opcheck(
            getattr(norm_ops_for(a) if name.startswith("norm_") else ops_for(a), name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_at_most_12_arguments_and_a_kernel(name: str) -> None:
    triton = TARGET.backend == "triton" or (TARGET.backend == "cuda" and name.startswith("norm_"))
    namespace = "sslfast_triton" if triton else "sslfast"
    assert len(getattr(torch.ops, namespace).__getattr__(name).default._schema.arguments) <= 12
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", TARGET.device.upper())
