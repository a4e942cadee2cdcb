"""How an op is declared. Every list of ops, in Python or for the dispatcher, is made from what `define` has seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Schemas and fakes, twice: the C++ and CUDA kernels implement the ops of `sslfast`, kernels/ those of `sslfast_triton`
LIBRARIES = {name: torch.library.Library(name, "DEF") for name in ("sslfast", "sslfast_triton")}

OPS: list[str] = []
"""The names of all ops that kernels implement."""


def define(schema: str, result: Callable[..., Any]) -> None:
    """Declares an op that the kernels implement.

    Args:
        schema: as torch.library takes it.
        result: the op's fake; makes results of the right shapes, dtypes and layouts from the same arguments.
    """
    name = schema.partition("(")[0]
    for namespace, library in LIBRARIES.items():
        library.define(schema)
        torch.library.register_fake(f"{namespace}::{name}", result, lib=library)
    OPS.append(name)


def no_result(*_: Any) -> None:
    """The fake of an op that writes into its arguments."""
