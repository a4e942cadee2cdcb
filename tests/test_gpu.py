"""What only a GPU can show: no synchronisation, streams, graphs, more than 2^31 elements, a second device.

`python -m benchmarks.gpu` runs it there, with --backend cuda and with --backend triton, beside the tests of every op.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers.options import on_every_backend, only_on
from sslfast import DualContrastiveLoss, ResVNet, VNet
from sslfast.ops import dual_supervised, masked_consistency, rectified_consistency, reliability, sample_voxels
from sslfast.ops.backend import backend
from sslfast.ops.flags import CLASS, RELIABLE, is_reliable
from sslfast.training.streams import SideBySide

pytestmark = [on_every_backend, only_on("cuda", "triton")]


def batch(size: tuple[int, ...], classes: int = 3, width: int = 8, device: str = "cuda") -> tuple[list[Tensor], Tensor]:
    maps = [torch.randn(4, c, *size, device=device).requires_grad_() for c in (classes, classes, width, width)]
    return maps, torch.randint(0, classes, (2, *size), device=device)


def gradients(loss: DualContrastiveLoss, maps: list[Tensor], labels: Tensor, step: int | Tensor = 9) -> list[Tensor]:
    """Gradients of the loss with a teacher and without, and of the consistency that other methods add."""
    a, b = (m[2:] for m in maps[:2])
    consistency = masked_consistency(a, b, max_entropy=0.9).loss
    with_teacher = loss(*maps, labels, step=step, teacher=a + b)
    total = loss(*maps, labels, step=step).loss + with_teacher.loss + consistency
    return list(torch.autograd.grad(total, maps, materialize_grads=True))


def record(compute: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of what it computes, and where each replay writes the results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()
    return graph, result


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_a_step_reads_nothing_on_the_host(preset: Any) -> None:
    maps, labels = batch((24, 25, 26))
    loss = DualContrastiveLoss(3, preset=preset, gate=(0, 0), percentile=(60, 80), ramp_steps=20)
    for step in (9, torch.tensor(9, device="cuda")):
        gradients(loss, maps, labels, step)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(loss, maps, labels, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@only_on("cuda")
def test_a_view_waits_for_nothing() -> None:
    networks = [kind(2, width=4, depth=2).cuda() for kind in (VNet, ResVNet)]
    images = torch.randn(2, 1, 16, 12, 8, device="cuda")
    sslfast.teacher_view(*networks, images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sslfast.teacher_view(*networks, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_step_runs_on_the_current_stream() -> None:
    maps, labels = batch((16, 17, 18))
    loss = DualContrastiveLoss(3, gate=(0, 0), ramp_steps=9)
    expected = gradients(loss, maps, labels)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever ignores the stream reads zeros
        late = [torch.zeros_like(m) for m in maps]
        for to, m in zip(late, maps):
            to.copy_(m.detach())
        result = gradients(loss, [m.requires_grad_() for m in late], labels)
    stream.synchronize()
    for mine, other in zip(result, expected):
        assert torch.equal(mine, other)


def test_a_graph_that_would_repeat_a_step_is_refused() -> None:
    maps, labels = batch((16, 17, 18))
    loss = DualContrastiveLoss(3, gate=(0, 0), ramp_steps=9)
    gradients(loss, maps, labels)
    with pytest.raises(RuntimeError, match="every replay"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        loss(*maps, labels, step=9)


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_a_captured_step_replays_as_any_other_step(preset: Any) -> None:
    maps, labels = batch((16, 17, 18))
    teacher, step = torch.randn(2, 3, 16, 17, 18, device="cuda"), torch.tensor(1, device="cuda")
    loss = DualContrastiveLoss(
        3, preset=preset, gate=(0, 0), percentile=(40, 90), anchors=20, negatives=30, ramp_steps=9
    )

    def compute(step: int | Tensor = step) -> list[Tensor]:
        result = loss(*maps, labels, step, teacher)
        return [
            result.loss.detach(),
            *result.terms.values(),
            *torch.autograd.grad(result.loss, maps, materialize_grads=True),
        ]

    graph, result = record(compute)
    for number in (1, 6, 6, 40):
        with torch.no_grad():
            for values in (*maps, teacher):
                values.copy_(torch.randn_like(values))
        step.fill_(number)
        before = loss.running.clone()
        graph.replay()
        after = loss.running.clone()
        assert not torch.equal(after, before)
        others = []
        for given in (step, number):
            loss.running.copy_(before)
            others.append(compute(given))
            assert torch.equal(loss.running, after)
        for mine, other, by_number in zip(result, *others, strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, by_number, rtol=1e-5, atol=1e-7)


def test_a_captured_graph_replays_an_op() -> None:
    maps, labels = batch((16, 17, 18))

    def compute() -> list[Tensor]:
        threshold, flags = reliability(maps[1][2:], 30.0)
        losses = dual_supervised(maps[0][:2], maps[1][:2], labels)
        total = losses.ce.sum() + losses.dice.sum() + rectified_consistency(maps[0][2:], maps[1][2:], flags).cosine
        return [threshold, flags, *torch.autograd.grad(total, maps[:2])]

    graph, result = record(compute)
    with torch.no_grad():
        for m in maps:
            m.copy_(torch.randn_like(m))
    graph.replay()
    for mine, other in zip(result, compute()):
        assert torch.equal(mine, other)


@only_on("cuda")
def test_threads_may_launch_kernels_of_different_sizes_at_once() -> None:
    # 33 and 41 KB of shared memory in InfoNCE
    each = [batch((16, 17, 18), classes=3, width=width) for width in (200, 250)]
    loss = DualContrastiveLoss(3, gate=(0, 0), ramp_steps=9)
    expected = [gradients(loss, *one) for one in each]
    with ThreadPoolExecutor(2) as pool:
        result = list(pool.map(lambda i: gradients(loss, *each[i % 2]), range(60)))
    for i, mine in enumerate(result):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected[i % 2], strict=True))


def test_equal_runs_give_equal_bits() -> None:
    maps, labels = batch((40, 41, 42))
    loss = DualContrastiveLoss(3, gate=(0, 0), ramp_steps=9)
    first = gradients(loss, maps, labels)
    for _ in range(5):
        for mine, other in zip(gradients(loss, maps, labels), first):
            assert torch.equal(mine, other)


def test_the_sample_is_the_references() -> None:
    maps, _ = batch((30, 31, 32))
    flags = reliability(maps[0], 70.0).flags
    for role in ("anchors", "negatives"):
        ours = sample_voxels(flags, [50, 60, 70], 2**63 + 5, 2**32 - 1, role=role)
        with backend("reference"):
            theirs = sample_voxels(flags, [50, 60, 70], 2**63 + 5, 2**32 - 1, role=role)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.counts, theirs.counts)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
    reason="needs 60 GB",
)
def test_more_than_two_to_the_31_elements_give_what_their_last_part_gives() -> None:
    size = (2, 2, 1024, 1024, 560)  # 1.2e9 voxels, 2.3e9 logits
    logits = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    flags = reliability(logits, 50.0).flags
    assert abs(float(is_reliable(flags).float().mean()) - 0.5) < 0.02
    last = logits[1:, :, -8:].contiguous()
    sample = sample_voxels(flags, [4, 4], 1, 2)
    assert int(sample.indices.max()) < flags.numel()
    assert torch.equal(reliability(last, 50.0).flags & CLASS, flags[1:, -8:] & CLASS)
    flags.zero_()[1:, -8:] = RELIABLE
    results = []
    for student, sure in ((logits, flags), (last, flags[1:, -8:].contiguous())):
        rectified = rectified_consistency(student.requires_grad_(), student.flip(1), sure).rectified
        results.append((rectified.detach(), torch.autograd.grad(rectified, student)[0][-1:, :, -8:]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device_gives_the_same() -> None:
    maps, labels = batch((9, 10, 11))
    loss = DualContrastiveLoss(3, gate=(0, 0), ramp_steps=9)
    expected = gradients(loss, maps, labels)
    there = [m.detach().to("cuda:1").requires_grad_() for m in maps]
    for mine, other in zip(gradients(loss.to("cuda:1"), there, labels.to("cuda:1")), expected):
        assert torch.equal(mine.cpu(), other.cpu())


@only_on("cuda")
def test_networks_on_streams_of_their_own_compute_the_same() -> None:
    torch.manual_seed(0)
    networks = VNet(2, width=8, depth=3).cuda(), ResVNet(2, width=8, depth=3).cuda()
    images = torch.randn(4, 1, 32, 32, 32, device="cuda")
    labels = torch.randint(0, 2, (2, 32, 32, 32), device="cuda")
    criterion = DualContrastiveLoss(2, gate=(0, 0), ramp_steps=1)
    side_by_side = SideBySide(*networks)
    logits, gradients = [], []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        for pair in (networks, side_by_side.networks, side_by_side.networks):
            torch.manual_seed(1)
            for network in networks:
                network.zero_grad()
            side_by_side.begin(images)
            others = [network(images + 0)[0].mean() for network in pair]  # not the batch itself
            (za, fa), (zb, fb) = (network(images) for network in pair)
            (criterion(za, zb, fa, fb, labels, step=1).loss + sum(others)).backward()
            logits.append((za.detach(), zb.detach()))
            gradients.append([p.grad.clone() for net in networks for p in net.parameters() if p.grad is not None])
    for plain, *other in zip(*logits, strict=True):
        assert all(torch.equal(mine, plain) for mine in other)
    for plain, *other in zip(*gradients, strict=True):
        for mine in other:
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)
