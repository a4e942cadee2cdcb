"""Networks that return (logits, features)."""

from importlib import import_module

from torch import nn

from sslfast.networks.norm_act import NormAct, normalise_over_processes
from sslfast.networks.vnet import ResVNet, VNet
from sslfast.networks.with_features import WithFeatures
from sslfast.options import FROM_MONAI, NetworkName, NetworkOptions

NETWORKS: dict[NetworkName, type[nn.Module]] = {"vnet": VNet, "resvnet": ResVNet}

__all__ = ["NETWORKS", "NormAct", "ResVNet", "VNet", "WithFeatures", "build_networks", "normalise_over_processes"]


def build_networks(options: NetworkOptions, num_classes: int, in_channels: int = 1) -> tuple[nn.Module, nn.Module]:
    """The two networks, freshly initialised.

    Raises:
        UserError: the settings do not go together, see `NetworkOptions.check`.
    """
    options.check()
    a, b = (_build(name, options, num_classes, in_channels) for name in (options.network_a, options.network_b))
    return a, b


def _build(name: NetworkName, options: NetworkOptions, num_classes: int, in_channels: int) -> nn.Module:
    if name in FROM_MONAI:
        module = import_module("sslfast.networks.monai_networks")  # only here, for the ops do not need MONAI
        network: nn.Module = module.build(name, options, num_classes, in_channels)
        return network
    return NETWORKS[name](
        num_classes,
        in_channels=in_channels,
        width=options.width,
        depth=options.depth,
        strides=options.strides,
        dropout=options.dropout,
        norm=options.norm,
        checkpointing=options.checkpointing,
    )
