"""Other people's networks behind the adapter that gives their features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet, UNet, VNet
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast import WithFeatures


def test_monai_networks_give_logits_and_features() -> None:
    images = torch.randn(1, 1, 16, 16, 16)
    unet = WithFeatures(UNet(3, 1, 2, (4, 8, 16), (2, 2)))
    logits, features = unet(images)
    assert logits.shape == (1, 2, 16, 16, 16)
    assert features.shape[2:] == logits.shape[2:]
    segresnet = WithFeatures(SegResNet(3, 8, 1, 2)).eval()
    logits, features = segresnet(images)
    assert features.shape == (1, 8, 16, 16, 16)
    classifier = dict(segresnet.network.named_modules())["conv_final.2.conv"]
    assert torch.allclose(classifier(features), logits)


def input_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """What this module of the network is called with."""
    kept: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    network(images)
    hook.remove()
    return kept[-1]


@pytest.mark.parametrize(
    ("network", "classifier", "width"),
    [
        pytest.param(lambda: UNet(3, 1, 2, (4, 8, 16), (2, 2)), "model.2.conv", 8, id="UNet"),
        pytest.param(lambda: UNet(3, 1, 2, (4, 8), (2,), num_res_units=2), "model.2.0.conv", 12, id="residual UNet"),
        pytest.param(lambda: VNet(3, 1, 2), "out_tr.conv_block.conv", 32, id="VNet"),
        pytest.param(
            lambda: DynUNet(
                3, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], [4, 8, 16, 32], deep_supervision=True, deep_supr_num=2
            ),
            *("output_block.conv.conv", 4),
            id="DynUNet",
        ),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_classifier_is_what_makes_the_logits(network: Any, classifier: str, width: int, training: bool) -> None:
    images, inner = torch.randn(1, 1, 32, 32, 32), network().train(training)
    wrapped = WithFeatures(inner)
    for _ in range(2):  # the first call finds it
        logits, features = wrapped(images)
        assert wrapped.classifier == classifier
        assert logits.shape == (1, 2, 32, 32, 32)
        assert features.shape == (1, width, 32, 32, 32)
    inner.eval()
    logits, features = wrapped(images)
    expected = input_of(inner, classifier, images)
    if expected.shape[2:] != (32, 32, 32):
        expected = F.interpolate(expected, (32, 32, 32), mode="trilinear", align_corners=False)
    assert torch.equal(features, expected)
    assert torch.equal(logits, inner(images))


class Heads(nn.Module):
    """Returns its logits first, or in a dict; an auxiliary head is defined, and called, after the classifier."""

    def __init__(self, wrap: Any = lambda *outputs: outputs) -> None:
        super().__init__()
        self.body, self.classify, self.auxiliary = nn.Conv3d(1, 5, 3, padding=1), nn.Conv3d(5, 2, 1), nn.Conv3d(5, 2, 1)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        return self.wrap(self.classify(features), self.auxiliary(features.relu()))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda *outputs: outputs, id="a tuple"),
        pytest.param(lambda logits, auxiliary: {"out": logits, "aux": auxiliary}, id="a dict"),
        pytest.param(lambda *outputs: torch.stack(outputs, 1), id="stacked"),
        pytest.param(lambda logits, auxiliary: logits.double(), id="in another dtype"),
        pytest.param(lambda logits, auxiliary: F.dropout(logits, 0.5, False).contiguous(), id="after an identity"),
    ],
)
def test_an_auxiliary_head_is_not_the_classifier(wrap: Any) -> None:
    network = WithFeatures(Heads(wrap))
    images = torch.randn(2, 1, 4, 4, 4)
    logits, features = network(images)
    assert network.classifier == "classify"
    assert torch.equal(features, network.network.body(images))
    assert torch.equal(logits, network.network.classify(features).to(logits.dtype))


def test_a_head_that_is_used_twice_gives_the_features_of_the_logits() -> None:
    class Shared(Heads):
        def forward(self, images: Tensor) -> Any:
            features = self.body(images)
            return self.classify(features), self.classify(features.relu())

    network = WithFeatures(Shared())
    images = torch.randn(1, 1, 4, 4, 4)
    for _ in range(2):
        assert torch.equal(network(images)[1], network.network.body(images))


@pytest.mark.parametrize("inplace", [True, False])
def test_an_activation_that_is_used_twice_belongs_to_the_classifier_where_it_follows(inplace: bool) -> None:
    class Shared(Heads):
        def forward(self, images: Tensor) -> Any:
            features = self.act(self.body(images))
            return self.last(self.act(self.classify(features)))

    inner = Shared()
    inner.act, inner.last = nn.ELU(inplace=inplace), nn.Conv3d(2, 2, 1)
    network, images = WithFeatures(inner), torch.randn(1, 1, 4, 4, 4)
    for _ in range(2):
        assert torch.equal(network(images)[1], F.elu(inner.body(images)))
        assert network.classifier == "classify"


def test_a_linear_layer_over_the_last_dimension_may_be_the_classifier() -> None:
    class Tokens(Heads):
        def forward(self, images: Tensor) -> Any:
            return self.head(self.body(images).movedim(1, -1)).movedim(-1, 1)

    inner = Tokens()
    inner.head = nn.Linear(5, 2)
    network, images = WithFeatures(inner), torch.randn(1, 1, 4, 4, 4)
    for _ in range(2):
        assert torch.equal(network(images)[1], inner.body(images))


def test_logits_that_no_layer_makes_name_the_remedy() -> None:
    doubled = WithFeatures(Heads(lambda logits, auxiliary: 2 * logits))
    with pytest.raises(
        RuntimeError,
        match=r"Name it, as WithFeatures\(network, classifier=\.\.\.\); layers with 2 .*"
        "are classify, auxiliary",
    ):
        doubled(torch.randn(1, 1, 4, 4, 4))
    assert not any(module._forward_hooks for module in doubled.modules())
    named = WithFeatures(Heads(lambda logits, auxiliary: 2 * logits), classifier="classify")
    assert named(torch.randn(1, 1, 4, 4, 4))[1].shape == (1, 5, 4, 4, 4)


def test_once_called_it_compiles_to_one_graph_and_can_be_copied() -> None:
    network, images = WithFeatures(Heads()), torch.randn(1, 1, 4, 4, 4)
    expected = network(images)
    for one in (copy.deepcopy(network), torch.compile(network, fullgraph=True, backend="eager")):
        assert all(map(torch.equal, one(images), expected))


def test_to_be_compiled_before_it_is_called_it_needs_the_classifiers_name() -> None:
    images = torch.randn(1, 1, 4, 4, 4)
    with pytest.raises(Exception, match="the classifier is not known yet; call the network once before it is compiled"):
        torch.compile(WithFeatures(Heads()), fullgraph=True, backend="eager")(images)
    named = WithFeatures(Heads(), classifier="classify")
    logits, features = torch.compile(named, fullgraph=True, backend="eager")(images)
    assert torch.equal(logits, named.network.classify(features))


def test_features_of_a_named_classifier_carry_gradients() -> None:
    body = nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 2, 1), nn.Conv3d(2, 2, 1))
    _, features = WithFeatures(body, classifier="2")(torch.randn(1, 1, 4, 4, 4))
    assert features.shape == (1, 5, 4, 4, 4)
    features.sum().backward()
    assert body[0].weight.grad.any()


def test_a_named_layer_that_gives_no_features_is_refused() -> None:
    images = torch.randn(1, 1, 4, 4, 4)
    idle = Ends(lambda classifier, features: features)
    with pytest.raises(RuntimeError, match="the classifier 'classifier' did not run in the forward pass; name another"):
        WithFeatures(idle, classifier="classifier")(images)
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Flatten(2), nn.Unflatten(2, (4, 4, 4)))
    with pytest.raises(RuntimeError, match=r"'2' has shape \(1, 2, 64\); .* must be \[1, K, D, H, W\]. Name another"):
        WithFeatures(network, classifier="2")(images)


def test_a_wrong_classifier_is_named() -> None:
    with pytest.raises(ValueError, match="no module 'head'; its convolutions are 0"):
        WithFeatures(nn.Sequential(nn.Conv3d(1, 2, 1)), classifier="head")
    with pytest.raises(ValueError, match="no 3D convolution"):
        WithFeatures(nn.Linear(1, 1))


class Ends(nn.Module):
    """A network whose last step is `end`, given its classifier and features."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body, self.classifier, self.end = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 3, 1), end

    def forward(self, images: Tensor) -> Any:
        return self.end(self.classifier, self.body(images))


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda classifier, features: classifier(input=features), id="its input by name"),
        pytest.param(
            lambda classifier, features: (
                classifier(-features) * 0 + classifier(features) + 0 * classifier(2 * features)
            ),
            id="the second of three calls",
        ),
    ],
)
def test_a_classifier_is_found_however_it_is_called(end: Any) -> None:
    network = Ends(end)
    wrapped, images = WithFeatures(network), torch.randn(1, 1, 8, 8, 8)
    for _ in range(2):
        logits, features = wrapped(images)
        assert wrapped.classifier == "classifier"
        assert torch.equal(features, network.body(images))
        assert torch.equal(logits, network(images))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "None"),
        ("x", "'x'"),
        ([], "a list"),
        ({}, "a dict"),
        (((torch.zeros(1, 2, 4, 4, 4),),), "a tuple"),
        (torch.zeros(2), r"a tensor of shape \(2,\)"),
    ],
)
def test_what_is_no_logits_is_named(returned: Any, said: str) -> None:
    network = WithFeatures(Ends(lambda classifier, features: returned))
    with pytest.raises(TypeError, match=f"^Ends returns {said}; it must return logits"):
        network(torch.randn(1, 1, 4, 4, 4))


def test_what_is_no_network_is_named() -> None:
    function: Any = torch.relu
    with pytest.raises(TypeError, match=r"^network is a builtin_function_or_method; it must be an nn\.Module$"):
        WithFeatures(function)
    with pytest.raises(ValueError, match="Ends has no module ''"):
        WithFeatures(Ends(None), classifier="")


def test_an_activation_in_place_makes_no_logits_of_what_no_layer_made() -> None:
    network = Ends(None)
    network.end = lambda classifier, features: (network.act(2 * classifier(features)),)
    network.act = nn.ELU(inplace=True)
    with pytest.raises(RuntimeError, match="no layer of Ends makes the logits"):
        WithFeatures(network)(torch.randn(1, 1, 4, 4, 4))


def test_the_images_are_no_features() -> None:
    network = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 3, 1))
    with pytest.raises(RuntimeError, match="Name it, as WithFeatures"):
        WithFeatures(network)(torch.randn(1, 1, 4, 4, 4))
