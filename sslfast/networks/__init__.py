"""Networks that return (logits, features)."""

from torch import nn

from sslfast.networks.norm_act import NormAct, normalise_over_processes
from sslfast.networks.vnet import ResVNet, VNet
from sslfast.networks.with_features import WithFeatures
from sslfast.options import NetworkName, NetworkOptions

NETWORKS: dict[NetworkName, type[nn.Module]] = {"vnet": VNet, "resvnet": ResVNet}

__all__ = ["NETWORKS", "NormAct", "ResVNet", "VNet", "WithFeatures", "build_networks", "normalise_over_processes"]


def build_networks(options: NetworkOptions, num_classes: int, in_channels: int = 1) -> tuple[nn.Module, nn.Module]:
    """The two networks, freshly initialised."""
    a, b = (
        NETWORKS[name](
            num_classes,
            in_channels=in_channels,
            width=options.width,
            depth=options.depth,
            strides=options.strides,
            dropout=options.dropout,
            norm=options.norm,
            checkpointing=options.checkpointing,
        )
        for name in (options.network_a, options.network_b)
    )
    return a, b
