"""V-Net and its residual partner: shapes, gradients, checkpointing, refusals."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import nn

from benchmarks.eager import plain_network
from sslfast import ResVNet, VNet
from sslfast.networks import NormAct
from sslfast.networks.conv_norms import _has_onednn
from sslfast.ops.linear_logits import materialize
from sslfast.ops.recomputation import recompute_activations
from sslfast.training.memory_budget import Peak

networks = pytest.mark.parametrize("network", [VNet, ResVNet], ids=["VNet", "ResVNet"])
norms = pytest.mark.parametrize("norm", ["batch", "instance"])


@networks
@norms
@pytest.mark.parametrize(("depth", "size"), [(2, (6, 4, 2)), (3, (8, 12, 4)), (5, (16, 16, 48))])
def test_logits_and_features_have_the_images_grid(
    network: type[nn.Module], norm: str, depth: int, size: tuple[int, ...]
) -> None:
    net = network(3, in_channels=2, width=4, depth=depth, norm=norm)
    logits, features = net(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    assert features.shape == (2, 4, *size)


@networks
def test_every_parameter_learns(network: type[nn.Module]) -> None:
    net = network(2, width=4, depth=3, dropout=0.0)
    net(torch.randn(2, 1, 8, 8, 8))[0].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in net.parameters())


@networks
def test_bfloat16_gives_the_same_gradients_whatever_the_memory_held(network: type[nn.Module]) -> None:
    """At a bottom grid of 2x2x2 and 32 channels oneDNN's bfloat16 weight gradients once depended on it."""
    net = network(2, width=8, depth=3, dropout=0.0, norm="instance")
    images = torch.randn(2, 1, 8, 8, 8)
    gradients = []
    for _ in range(3):
        freed = [torch.full((2**n,), torch.nan) for n in range(4, 20) for _ in range(6)]
        del freed
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = net(images)
        gradients.append(torch.autograd.grad(logits.float().square().mean(), tuple(net.parameters())))
    assert all(grad.isfinite().all() for grad in gradients[0])
    for again in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], again, strict=True))


@networks
def test_instance_norm_does_not_see_the_rest_of_the_batch(network: type[nn.Module]) -> None:
    net = network(2, width=4, depth=2, dropout=0.0, norm="instance")
    images = torch.randn(2, 1, 8, 8, 8)
    together = net(images)[0]
    images[1] *= 100
    assert torch.allclose(net(images)[0][0], together[0], atol=1e-5)


@networks
@norms
def test_checkpointing_changes_neither_gradients_nor_statistics(network: type[nn.Module], norm: str) -> None:
    net = network(2, width=4, depth=3, dropout=0.3, norm=norm)
    again = copy.deepcopy(net)
    again.checkpointing = True
    images = torch.randn(2, 1, 16, 24, 16)
    kept = []
    for n in (net, again):
        torch.manual_seed(5)
        with Peak() as memory:
            logits, features = n(images)
        kept.append(memory.now)
        (logits.square().sum() + features.sum()).backward()
    assert kept[1] < kept[0]
    for mine, other in zip(again.parameters(), net.parameters()):
        assert torch.equal(mine.grad, other.grad)
    for (name, mine), other in zip(again.named_buffers(), net.buffers()):
        assert torch.equal(mine, other), name
    net.eval(), again.eval()
    assert torch.equal(again(images)[0], net(images)[0])


@networks
@norms
def test_recomputed_activations_are_not_kept_and_change_no_bit(network: type[nn.Module], norm: str) -> None:
    net = network(2, width=4, depth=3, dropout=0.0, norm=norm)
    images = torch.randn(2, 1, 16, 24, 16)
    kept, gradients = [], []
    for recomputes in (lambda max_depth: nullcontext(), recompute_activations):
        with patch("sslfast.networks.vnet.recompute_activations", recomputes), Peak() as memory:
            logits, features = net(images)
        kept.append(memory.now)
        gradients.append(torch.autograd.grad(logits.square().sum() + features.sum(), list(net.parameters())))
    assert kept[1] < 0.7 * kept[0]
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


@networks
@norms
@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_patch_by_patch_computes_the_same(network: type[nn.Module], norm: str, checkpointing: bool) -> None:
    """In float64: in float32, one ReLU in some hundred networks is open in one way and shut in the other."""
    net = network(2, width=4, depth=3, norm=norm, checkpointing=checkpointing).eval().double()
    images = torch.randn(3, 1, 8, 12, 8).double()
    found = []
    for large in (1, 2**60):
        with patch("sslfast.networks.vnet.LARGE", large):
            assert net.goes_patch_by_patch(images) == (large == 1)
            logits, features = net(images, linear=True)
            plain = net(images)[0]
        loss = materialize(logits).square().sum() + features.sum()
        found.append([plain, materialize(logits), features, *torch.autograd.grad(loss, list(net.parameters()))])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * float(other.detach().abs().max()))


@networks
def test_training_takes_all_patches_at_once(network: type[nn.Module]) -> None:
    net = network(2, width=4, depth=3, norm="instance")
    with patch("sslfast.networks.vnet.LARGE", 1):
        assert not net.goes_patch_by_patch(torch.randn(3, 1, 8, 12, 8))


folded = pytest.mark.parametrize("onednn", [False, True])
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels last"])


@networks
@folded
@layouts
def test_folded_batch_norm_computes_the_same_and_follows_the_weights(
    network: type[nn.Module], onednn: bool, layout: torch.memory_format
) -> None:
    net = network(2, width=4, depth=3).to(memory_format=layout)
    images = torch.randn(2, 1, 8, 12, 8)
    available = _has_onednn
    with patch("sslfast.networks.conv_norms._has_onednn", lambda x: onednn and available(x)):
        for _ in range(2):  # weights and statistics change in between
            net.train()(images)[0].square().sum().backward()
            for p in net.parameters():
                p.data.sub_(1e-3 * p.grad.sign())  # without a trace in its version
            net.eval()
            expected = net(images)[0].detach()
            for _ in range(2):
                with torch.no_grad():
                    torch.testing.assert_close(net(images)[0], expected, rtol=1e-4, atol=1e-4)
                with torch.inference_mode():
                    torch.testing.assert_close(net(images)[0], expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert float((net(images)[0] - expected).abs().max()) < 0.05 * float(expected.abs().max())


@networks
@folded
@layouts
@pytest.mark.parametrize("autocast", [False, True])
def test_folded_batch_norm_keeps_nan(
    network: type[nn.Module], onednn: bool, layout: torch.memory_format, autocast: bool
) -> None:
    net = network(2, width=4, depth=3, norm="batch").to(memory_format=layout).eval()
    images = torch.randn(2, 1, 8, 12, 8)
    images[0, 0, 2, 3, 4] = torch.nan
    available = _has_onednn
    with (
        patch("sslfast.networks.conv_norms._has_onednn", lambda x: onednn and available(x)),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        logits = net(images)[0]
        assert logits[0].isnan().any()
        assert logits[1].isfinite().all()
        net.decoder.blocks[-1][1].running_var[0] = torch.nan
        assert net(images)[0][1].isnan().all()


@networks
@norms
def test_checkpoints_of_torchs_norm_layers_load(network: type[nn.Module], norm: str) -> None:
    """Until version 0.2 these were the networks' layers."""
    plain = plain_network(network(2, width=4, depth=3, norm=norm))
    images = torch.randn(2, 1, 8, 12, 8)
    plain(images)  # changes the running statistics
    state = {name.replace(".norm.", "."): value for name, value in plain.state_dict().items()}
    assert any(name.endswith("num_batches_tracked") for name in state) == (norm == "batch")
    assert "decoder.blocks.0.4.weight" in state
    net = network(2, width=4, depth=3, norm=norm)
    net.load_state_dict(state)
    torch.testing.assert_close(net.eval()(images)[0], plain.eval()(images)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "sync-batch"])
def test_running_statistics_are_those_of_torchs_batch_norm(norm: str) -> None:
    ours, theirs = NormAct(3, norm, relu=False), nn.BatchNorm3d(3)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5, 6) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_layer_shows_what_it_does() -> None:
    assert [str(NormAct(4, "batch")), str(NormAct(8, "instance", relu=False))] == [
        "NormAct(4, batch)",
        "NormAct(8, instance, no ReLU)",
    ]


def test_an_empty_batch_leaves_the_running_statistics() -> None:
    layer = NormAct(3)
    layer.running_mean.fill_(5)
    layer(torch.zeros(0, 3, 4, 5, 6))
    assert torch.equal(layer.running_mean, torch.full((3,), 5.0))
    assert torch.equal(layer.running_var, torch.ones(3))


@norms
def test_one_number_a_channel_is_refused(norm: str) -> None:
    with pytest.raises(ValueError, match="one number a channel"):
        NormAct(3, norm)(torch.ones(1, 3, 1, 1, 1))


@networks
def test_features_are_those_before_dropout(network: type[nn.Module]) -> None:
    net = network(2, width=4, depth=2, dropout=0.5)
    net.eval()
    logits, features = net(torch.randn(1, 1, 4, 4, 4))
    assert torch.allclose(net.classifier(features), logits)


def test_the_published_pair_has_the_published_size() -> None:
    sizes = [sum(p.numel() for p in net(2).parameters()) / 1e6 for net in (VNet, ResVNet)]
    assert sizes[0] == pytest.approx(9.4, abs=0.1)
    assert sum(isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3) for m in ResVNet(2).encoder.modules()) == 33


@networks
def test_sizes_that_do_not_halve_are_refused(network: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        network(2, width=2, depth=3)(torch.zeros(1, 1, 8, 8, 6))
    with pytest.raises(ValueError, match="depth 7"):
        network(2, depth=7)


@pytest.mark.parametrize("network", [VNet, ResVNet])
def test_axes_are_halved_and_convolved_as_the_strides_say(network: type[VNet]) -> None:
    strides = [(2, 2, 1), (2, 2, 1), (2, 2, 2)]
    built = network(2, width=2, depth=4, strides=strides, norm="batch").eval()
    assert built.factors == (8, 8, 2)
    logits, features = built(torch.rand(1, 1, 16, 24, 6))
    assert (logits.shape, features.shape) == ((1, 2, 16, 24, 6), (1, 2, 16, 24, 6))
    kernels = {
        stage: {tuple(m.kernel_size) for m in layers.modules() if isinstance(m, nn.Conv3d) and max(m.kernel_size) == 3}
        for stage, layers in enumerate(built.encoder.stages)
    }
    # along the third axis, kernels of size 3 begin at the stage before the one that halves it
    assert kernels == {0: {(3, 3, 1)}, 1: {(3, 3, 1)}, 2: {(3, 3, 3)}, 3: {(3, 3, 3)}}
    with pytest.raises(ValueError, match=r"D, H and W must be multiples of 8, 8, 2$"):
        built(torch.rand(1, 1, 16, 24, 5))


@pytest.mark.parametrize("network", [VNet, ResVNet])
def test_slices_stay_apart_until_their_axis_is_halved(network: type[VNet]) -> None:
    """Without the deeper stages, what a slice becomes does not depend on its neighbours."""
    built = network(2, width=2, depth=3, strides=[(2, 2, 1), (2, 2, 2)], norm="batch").eval()
    first, other = torch.rand(2, 1, 1, 8, 8, 4)
    mixed = torch.cat((first[..., :2], other[..., 2:]), -1)
    stem = built.encoder.stages[0]
    torch.testing.assert_close(stem(mixed)[..., :2], stem(first)[..., :2], rtol=0, atol=0)


def test_strides_of_another_length_or_size_are_refused() -> None:
    for strides in ([(2, 2, 2)], [(2, 2, 2), (3, 2, 2)]):
        with pytest.raises(ValueError, match="with depth 3 it must be 2 triples of 1 or 2"):
            VNet(2, width=2, depth=3, strides=strides)
