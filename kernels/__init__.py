"""Triton kernels, installed as `sslfast.kernels`, one file per op. The function that implements an op has its name."""

from importlib import import_module
from pkgutil import iter_modules

from sslfast.ops.registry import OPS

_functions = {
    name: value
    for module in iter_modules(__path__)
    for name, value in vars(import_module(f"{__name__}.{module.name}")).items()
}
IMPLEMENTATIONS = {name: _functions[name] for name in OPS}
"""The function of each op, by name."""
