"""The training methods, one file each. This list of them does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from sslfast.errors import UserError

if TYPE_CHECKING:
    from sslfast.methods.method import Method


class Entry(NamedTuple):
    """Where a method is, and what it is."""

    path: str  # module:Class
    summary: str


METHODS = {
    "supervised": Entry("sslfast.methods.supervised:Supervised", "the baseline, labelled volumes only"),
    "ssl-contrastive": Entry("sslfast.methods.ssl_contrastive:SSLContrastive", "the default (arXiv 2311.12617)"),
    "as-released": Entry(
        "sslfast.methods.as_released:AsReleased", "what the code published with arXiv 2311.12617 does"
    ),
    "dual-networks": Entry("sslfast.methods.dual_networks:DualNetworks", "arXiv 2505.17690"),
    "mcf": Entry("sslfast.methods.mcf:MCF", "mutual correction, CVPR 2023"),
    "cps": Entry("sslfast.methods.cps:CPS", "cross pseudo supervision, CVPR 2021"),
    "mean-teacher": Entry("sslfast.methods.mean_teacher:MeanTeacher", "NeurIPS 2017"),
    "ua-mt": Entry("sslfast.methods.ua_mt:UAMT", "uncertainty-aware mean teacher, MICCAI 2019"),
    "u2pl": Entry("sslfast.methods.u2pl:U2PL", "unreliable pseudo-labels as negatives, CVPR 2022"),
    "bcp": Entry("sslfast.methods.bcp:BCP", "bidirectional copy-paste, CVPR 2023"),
}


def find_method(name: str) -> type[Method]:
    """The class of a method, by its name in `METHODS` or as module:Class from an importable module.

    Raises:
        UserError: no such method, module or class, or the class is not a subclass of `Method`.
    """
    module, _, attribute = (METHODS[name].path if name in METHODS else name).partition(":")
    if not attribute or not module or module.startswith("."):
        raise UserError(f"--method {name}: choose one of {', '.join(METHODS)}, or your own as module:Class")
    try:
        method_class = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"--method {name}: {error}. Is the module's folder in PYTHONPATH?") from error
    base = import_module("sslfast.methods.method").Method
    if not (isinstance(method_class, type) and issubclass(method_class, base)):
        raise UserError(f"--method {name}: {attribute} must be a subclass of sslfast.methods.Method")
    return method_class


def __getattr__(name: str) -> Any:
    """`Method` and the classes of `METHODS`, imported when they are first used."""
    modules = {attribute: module for module, attribute in (entry.path.split(":") for entry in METHODS.values())}
    modules["Method"] = "sslfast.methods.method"
    if name not in modules:
        raise AttributeError(f"module 'sslfast.methods' has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)
