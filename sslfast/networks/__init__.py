"""Networks that return (logits, features): two different ones are trained together."""

from sslfast.networks.vnet import ResVNet, VNet
from sslfast.networks.with_features import WithFeatures

__all__ = ["ResVNet", "VNet", "WithFeatures"]
