"""What only a GPU can show: no synchronisation, streams, graphs, more than 2^31 elements, a second device.

`python -m benchmarks.gpu` runs it there. Every op × dtype × layout × size × empty set on the device is tests/test_{backends,consistency}.py with SSLFAST_TEST_DEVICE=cuda.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import sslfast
from sslfast import DualContrastiveLoss, ResVNet, VNet
from sslfast.ops import (
    class_prototypes,
    dual_supervised,
    masked_consistency,
    rectified_consistency,
    reliability,
    sample_voxels,
)
from sslfast.ops.backend import unavailable
from sslfast.ops.state import SURE_A, SURE_B
from sslfast.streams import SideBySide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ["cuda", "triton"]


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with sslfast.backend(request.param):
        yield request.param


def batch(size: tuple[int, ...], classes: int = 3, width: int = 8, device: str = "cuda") -> tuple[list[Tensor], Tensor]:
    maps = [torch.randn(4, c, *size, device=device).requires_grad_() for c in (classes, classes, width, width)]
    return maps, torch.randint(0, classes, (2, *size), device=device)


def gradients(loss: DualContrastiveLoss, maps: list[Tensor], labels: Tensor) -> list[Tensor]:
    """Of the whole step, of one with a teacher, and of the consistency that other methods add."""
    a, b = (m[2:] for m in maps[:2])
    consistency = masked_consistency(a, b, max_entropy=0.9).loss
    taught = loss(*maps, labels, step=9, teacher=a + b)
    return list(torch.autograd.grad(loss(*maps, labels, step=9).loss + taught.loss + consistency, maps))


def test_a_step_waits_for_nothing(kernels: str) -> None:
    maps, labels = batch((24, 25, 26))
    loss = DualContrastiveLoss(3, ramp_steps=9)
    gradients(loss, maps, labels)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(loss, maps, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_view_waits_for_nothing() -> None:
    networks = [kind(2, width=4, depth=2).cuda() for kind in (VNet, ResVNet)]
    images = torch.randn(2, 1, 16, 12, 8, device="cuda")
    sslfast.taught_view(*networks, images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sslfast.taught_view(*networks, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_step_runs_on_the_current_stream(kernels: str) -> None:
    maps, labels = batch((16, 17, 18))
    loss = DualContrastiveLoss(3, ramp_steps=9)
    expected = gradients(loss, maps, labels)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever ignores the stream reads zeros
        late = [torch.zeros_like(m) for m in maps]
        for to, m in zip(late, maps):
            to.copy_(m.detach())
        found = gradients(loss, [m.requires_grad_() for m in late], labels)
    stream.synchronize()
    for mine, other in zip(found, expected):
        assert torch.equal(mine, other)


def test_a_graph_that_would_repeat_a_step_is_refused(kernels: str) -> None:
    maps, labels = batch((16, 17, 18))
    loss = DualContrastiveLoss(3, ramp_steps=9)
    gradients(loss, maps, labels)
    with pytest.raises(RuntimeError, match="every replay"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        loss(*maps, labels, step=9)


def test_a_captured_graph_replays_an_op(kernels: str) -> None:
    maps, labels = batch((16, 17, 18))
    winner = torch.zeros(
        (), dtype=torch.int64, device="cuda"
    )  # a number would be copied there, which cannot be captured

    def compute() -> list[Tensor]:
        thresholds, state = reliability(maps[0][2:], maps[1][2:], 30.0, winner=winner)
        losses = dual_supervised(maps[0][:2], maps[1][:2], labels)
        total = losses.ce.sum() + losses.dice.sum() + rectified_consistency(maps[0][2:], maps[1][2:], state).cosine
        return [thresholds, state, *torch.autograd.grad(total, maps[:2])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    with torch.no_grad():
        for m in maps:
            m.copy_(torch.randn_like(m))
    graph.replay()
    for mine, other in zip(found, compute()):
        assert torch.equal(mine, other)


def test_threads_may_launch_kernels_of_different_sizes_at_once() -> None:
    reason = unavailable("cuda")
    if reason:
        pytest.skip(reason)
    with sslfast.backend("cuda"):
        each = [
            batch((16, 17, 18), classes=3, width=width) for width in (200, 250)
        ]  # 33 and 41 KB of shared memory in InfoNCE
        loss = DualContrastiveLoss(3, ramp_steps=9)
        expected = [gradients(loss, *one) for one in each]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda i: gradients(loss, *each[i % 2]), range(60)))
    for i, mine in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected[i % 2], strict=True))


def test_cuda_starts_five_kernels_forward_and_two_backward() -> None:
    reason = unavailable("cuda")
    if reason:
        pytest.skip(reason)
    maps, labels = batch((16, 17, 18))
    loss = DualContrastiveLoss(3, ramp_steps=9)
    gradients(loss, maps, labels)
    with sslfast.backend("cuda"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss(*maps, labels, step=9).loss.backward()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "sslfast::cuda" in event.key) == 7


def test_equal_runs_give_equal_bits(kernels: str) -> None:
    maps, labels = batch((40, 41, 42))
    loss = DualContrastiveLoss(3, ramp_steps=9)
    first = gradients(loss, maps, labels)
    for _ in range(5):
        for mine, other in zip(gradients(loss, maps, labels), first):
            assert torch.equal(mine, other)


def test_the_sample_and_the_byte_map_are_the_references(kernels: str) -> None:
    maps, _ = batch((30, 31, 32))
    state = reliability(maps[0], maps[1], 70.0, winner=0).state
    for role in ("anchors", "negatives"):
        ours = sample_voxels(state, [50, 60, 70], 2**63 + 5, 2**32 - 1, role=role)
        with sslfast.backend("reference"):
            theirs = sample_voxels(state, [50, 60, 70], 2**63 + 5, 2**32 - 1, role=role)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.counts, theirs.counts)


def test_the_host_need_not_know_the_loser(kernels: str) -> None:
    maps, _ = batch((9, 10, 11))
    state = torch.randint(0, 256, (4, 9, 10, 11), dtype=torch.uint8, device="cuda") & 0b11100001
    a, b = maps[2].detach(), maps[3].detach()
    for second, chosen in ((0, a), (1, b)):
        found = class_prototypes(a, state, 3, other=b, second=torch.tensor(second, device="cuda"))
        assert torch.equal(found.sums, class_prototypes(chosen, state, 3).sums)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
    reason="needs 60 GB",
)
def test_more_than_two_to_the_31_elements() -> None:
    for name in BACKENDS:  # one after the other, for the memory
        if unavailable(name) is None:
            with sslfast.backend(name):
                check_more_than_two_to_the_31_elements()
            torch.cuda.empty_cache()


def check_more_than_two_to_the_31_elements() -> None:
    size = (2, 2, 1024, 1024, 560)  # 1.2e9 voxels, 2.3e9 logits
    logits = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    state = reliability(logits, logits, 50.0, winner=0).state
    assert abs(float((state & 32).ne(0).float().mean()) - 0.5) < 0.02
    last = logits[1:, :, -8:].contiguous()
    sample = sample_voxels(state, [4, 4], 1, 2)
    assert int(sample.indices.max()) < state.numel()
    chosen = reliability(last, last, 50.0, winner=0).state
    assert torch.equal(chosen & 31, state[1:, -8:] & 31)
    state.zero_()[1:, -8:] = SURE_A | SURE_B
    sure = state[1:, -8:].contiguous()
    found = rectified_consistency(logits, logits.flip(1), state).rectified
    torch.testing.assert_close(found, rectified_consistency(last, last.flip(1), sure).rectified)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device(kernels: str) -> None:
    maps, labels = batch((9, 10, 11))
    loss = DualContrastiveLoss(3, ramp_steps=9)
    expected = gradients(loss, maps, labels)
    there = [m.detach().to("cuda:1").requires_grad_() for m in maps]
    for mine, other in zip(gradients(loss.to("cuda:1"), there, labels.to("cuda:1")), expected):
        assert torch.equal(mine.cpu(), other.cpu())


def test_networks_on_streams_of_their_own_compute_the_same() -> None:
    torch.manual_seed(0)
    networks = VNet(2, width=8, depth=3).cuda(), ResVNet(2, width=8, depth=3).cuda()
    images = torch.randn(4, 1, 32, 32, 32, device="cuda")
    labels = torch.randint(0, 2, (2, 32, 32, 32), device="cuda")
    criterion = DualContrastiveLoss(2, ramp_steps=1)
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
