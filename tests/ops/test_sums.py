"""Every op from maps to sums: the kernels of each backend against the references in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.compare import Compute, assert_as_good_as_eager, assert_same, with_gradients, with_threads
from helpers.maps import (
    DTYPES,
    SIZES,
    SUMS_OPS,
    layouts,
    random_flags,
    random_map,
    sums_arguments,
    sums_otherwise,
)
from helpers.options import TARGET, not_on, on_every_backend, some
from sslfast.ops import (
    class_prototypes,
    dual_supervised,
    masked_consistency,
    pseudo_supervised,
    rectified_consistency,
    reliability,
)
from sslfast.ops.flags import pseudo_label

pytestmark = on_every_backend


def losses(name: str, flags: Tensor) -> Compute:
    """The losses of the public op of this name."""
    result: dict[str, Compute] = {
        "dual_supervised": lambda a, b: list(dual_supervised(a, b, pseudo_label(flags))),
        "pseudo_supervised": lambda a: list(pseudo_supervised(a, flags)),
        "rectified_consistency": lambda a, b: list(rectified_consistency(a, b, flags)),
        "masked_consistency": lambda a, b: list(masked_consistency(a, b, temperature=0.5, max_entropy=0.7)),
    }
    return result[name]


@pytest.mark.parametrize("classes", some([2, 14, 3, 32], 2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SUMS_OPS)
def test_sums_and_their_gradient_are_as_good_as_eager_ones(
    name: str, classes: int, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    op = SUMS_OPS[name]
    maps = [random_map(2, classes, size, dtype) for _ in op.maps]
    largest = 2 * float(max(m.abs().max() for m in maps))  # KL and cross-entropy are as large as the logits are apart
    for rest in sums_arguments(name, maps[0], maps[-1]):
        assert_as_good_as_eager(lambda *m, r=rest: [op(m, *r)], *maps, terms=[largest] * len(maps))
        sums, exact = op(maps, *rest), op.ref(*(m.double() for m in maps), *rest)
        whole = exact == exact.round()
        assert torch.equal(sums[whole], exact[whole]), "counts, and sums over nothing"


@pytest.mark.parametrize("dtype", some(DTYPES, 1))
@pytest.mark.parametrize("classes", some([3, 2], 1))
@not_on("reference")
def test_every_layout_gives_the_same_bits(classes: int, dtype: torch.dtype) -> None:
    size = (9, 10, 11)
    a, b, f = (random_map(3, c, size, dtype) for c in (classes, classes, 6))
    rest = {name: sums_arguments(name, a, b)[-1] for name in SUMS_OPS}
    flags = reliability(a, 50.0).flags

    def everything(a: Tensor, b: Tensor, f: Tensor) -> list[Tensor]:
        result = list(class_prototypes(f, flags, classes))
        for name, op in SUMS_OPS.items():
            result += with_gradients(lambda *m, o=op, n=name: [o(m, *rest[n])], *(a, b)[: len(op.maps)])
        return result

    plain = everything(a, b, f)
    of = {name: [layouts(m)[name] for m in (a, b, f)] for name in layouts(a)}
    for name, maps in of.items():
        differs = reliability(maps[0], 50.0).flags != flags
        assert differs.float().mean() < (1e-2 if sums_otherwise(name) else 1e-9), name
        assert_same(everything(*maps), plain, name)


@not_on("reference")
def test_a_backward_writes_its_gradients_everywhere() -> None:
    """Each backward op fills buffers that held NaN."""
    a, b = random_map(2, 3, (5, 6, 7)), random_map(2, 3, (5, 6, 7))
    poison = torch.full_like(a, torch.nan)
    for to in (poison, poison.movedim(1, -1).contiguous().movedim(-1, 1)):
        for name, op in SUMS_OPS.items():
            maps, (rest, *_) = (a, b)[: len(op.maps)], sums_arguments(name, a, b)
            result = [to.clone() for _ in range(op.students)]
            op.backward(torch.ones_like(op(maps, *rest)), maps, *rest, to=result)
            assert all(g.isfinite().all() for g in result), name


@pytest.mark.parametrize("volumes", [0, 2])
def test_no_reliable_voxel_gives_zero_and_zero_gradients(volumes: int) -> None:
    a, b = random_map(volumes, 3, (4, 5, 6)), random_map(volumes, 3, (4, 5, 6))
    nothing = torch.zeros(volumes, 4, 5, 6, dtype=torch.uint8)
    zeros = (
        *with_gradients(lambda a: list(pseudo_supervised(a, nothing)), a),
        *with_gradients(lambda a, b: [rectified_consistency(a, b, nothing).rectified], a, b),
        *with_gradients(lambda a, b: list(masked_consistency(a, b, max_entropy=0.0)), a, b),
        *class_prototypes(a, nothing, 3),
    )
    assert not any(value.any() for value in zeros)


def test_no_annotated_voxel_gives_zero_and_zero_gradients() -> None:
    a, b = random_map(2, 3, (4, 5, 6)), random_map(2, 3, (4, 5, 6))
    nothing = torch.full((2, 4, 5, 6), -1)
    *terms, class_dice, class_voxels, grad_a, grad_b = with_gradients(
        lambda a, b: list(dual_supervised(a, b, nothing)), a, b
    )
    assert not any(value.any() for value in (*terms, class_voxels, grad_a, grad_b))
    assert (class_dice == -1).all()


@pytest.mark.parametrize("name", SUMS_OPS)
@not_on("reference")
def test_runs_and_thread_counts_give_the_same_bits(name: str) -> None:
    size = (5 if TARGET.interpreted else 33, 20, 40)  # several programs, or threads
    maps, flags = [random_map(2, 3, size) for _ in SUMS_OPS[name].maps], random_flags(2, 3, size)
    result = with_threads(lambda: with_gradients(losses(name, flags), *maps), 1, 2)
    assert all(map(torch.equal, *result))


@pytest.mark.parametrize("name", SUMS_OPS)
def test_the_losses_compile_to_one_graph(name: str) -> None:
    maps, flags = [random_map(2, 3, (4, 5, 6)) for _ in SUMS_OPS[name].maps], random_flags(2, 3, (4, 5, 6))
    compiled = torch.compile(losses(name, flags), fullgraph=True, backend="aot_eager")
    for ours, plain in zip(with_gradients(compiled, *maps), with_gradients(losses(name, flags), *maps)):
        torch.testing.assert_close(ours, plain)
    for ours, plain in zip(compiled(*maps), losses(name, flags)(*maps)):  # without a gradient it is another graph
        assert torch.equal(ours, plain)
