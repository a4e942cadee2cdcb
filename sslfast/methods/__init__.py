"""The methods, one file each: what one training step computes."""

from sslfast.methods.as_released import AsReleased
from sslfast.methods.method import Method
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.methods.supervised import Supervised
from sslfast.options import MethodName

METHODS: dict[MethodName, type[Method]] = {
    "supervised": Supervised,
    "ssl-contrastive": SSLContrastive,
    "as-released": AsReleased,
}

__all__ = ["METHODS", "AsReleased", "Method", "SSLContrastive", "Supervised"]
