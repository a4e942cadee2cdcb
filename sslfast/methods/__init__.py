"""The methods, one file each: what one training step computes."""

from sslfast.methods.as_released import AsReleased
from sslfast.methods.bcp import BCP
from sslfast.methods.cps import CPS
from sslfast.methods.dual_networks import DualNetworks
from sslfast.methods.mcf import MCF
from sslfast.methods.mean_teacher import MeanTeacher
from sslfast.methods.method import Method
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.methods.supervised import Supervised
from sslfast.methods.u2pl import U2PL
from sslfast.methods.ua_mt import UAMT
from sslfast.options import MethodName

METHODS: dict[MethodName, type[Method]] = {
    "supervised": Supervised,
    "ssl-contrastive": SSLContrastive,
    "as-released": AsReleased,
    "dual-networks": DualNetworks,
    "mcf": MCF,
    "cps": CPS,
    "mean-teacher": MeanTeacher,
    "ua-mt": UAMT,
    "u2pl": U2PL,
    "bcp": BCP,
}

__all__ = [
    "BCP",
    "CPS",
    "MCF",
    "METHODS",
    "U2PL",
    "UAMT",
    "AsReleased",
    "DualNetworks",
    "MeanTeacher",
    "Method",
    "SSLContrastive",
    "Supervised",
]
