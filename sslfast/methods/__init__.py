"""The methods, one file each: what one training step computes."""

from __future__ import annotations

from importlib import import_module

from sslfast.errors import UserError
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


def find_method(name: str) -> type[Method]:
    """The method of this name, or the class that `module:Class` says, from a module that Python finds.

    Raises:
        UserError: no such method, module or class, or a class that is no `Method`.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(f"--method {name}: choose one of {', '.join(METHODS)}, or your own as module:Class")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--method {name}: {error}. Is the module's folder in PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"--method {name}: {attribute} must be a subclass of sslfast.methods.Method")
    return found


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
    "find_method",
]
