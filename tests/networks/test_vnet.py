"""V-Net and its residual partner: shapes, gradients, checkpointing, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sslfast import ResVNet, VNet

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
    images = torch.randn(2, 1, 8, 12, 8)
    kept = []
    for n in (net, again):
        torch.manual_seed(5)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            logits, features = n(images)
        (logits.square().sum() + features.sum()).backward()
        kept.append(len({t.untyped_storage().data_ptr() for t in saved if t.shape[2:] == images.shape[2:]}))
    assert kept[1] < kept[0]
    for mine, other in zip(again.parameters(), net.parameters()):
        assert torch.equal(mine.grad, other.grad)
    for (name, mine), other in zip(again.named_buffers(), net.buffers()):
        assert torch.equal(mine, other), name
    net.eval(), again.eval()
    assert torch.equal(again(images)[0], net(images)[0])


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
