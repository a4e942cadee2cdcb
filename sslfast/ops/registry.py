"""Declaration of ops. Every list of ops, in Python or for the dispatcher, comes from the calls of `define`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Two sets of ops: C++ and CUDA kernels implement those of `sslfast`, Triton kernels those of `sslfast_triton`
LIBRARIES = {name: torch.library.Library(name, "DEF") for name in ("sslfast", "sslfast_triton")}

OPS: list[str] = []
"""The names of all declared ops."""


def define(schema: str, result: Callable[..., Any]) -> None:
    """Declares an op that the kernels implement.

    Args:
        schema: the schema, as torch.library takes it.
        result: the fake implementation: takes the same arguments, returns results of the right shape, dtype and layout.
    """
    name = schema.partition("(")[0]
    for namespace, library in LIBRARIES.items():
        library.define(schema)
        torch.library.register_fake(f"{namespace}::{name}", result, lib=library)
    OPS.append(name)


def no_result(*_: Any) -> None:
    """The fake implementation of an op that writes into its arguments."""
