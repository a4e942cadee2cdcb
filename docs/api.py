"""Writes api.md from the docstrings: python docs/api.py"""

from __future__ import annotations

import inspect
import re
from enum import Enum
from pathlib import Path
from typing import Any

import sslfast
import sslfast.methods
import sslfast.networks
import sslfast.ops

PAGE = Path(__file__).parent / "api.md"
PARTS = (
    ("The loss and the head", sslfast, ("DualContrastiveLoss", "DualContrastiveHead", "DualLoss")),
    ("Networks", sslfast, ("VNet", "ResVNet", "WithFeatures")),
    ("Operations", sslfast.ops, tuple(name for name in sslfast.ops.__all__ if name[0].islower())),
    ("Results of the operations", sslfast.ops, tuple(name for name in sslfast.ops.__all__ if name[0].isupper())),
    ("A method of one's own", sslfast.methods, ("Method",)),
    ("Backends and errors", sslfast, ("backend", "UserError")),
)


def render() -> str:
    """The page."""
    lines = ["# API reference", "", "From the docstrings, by `python docs/api.py`.", ""]
    for title, module, names in PARTS:
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(f"{module.__name__}.{name}", getattr(module, name))
    return "\n".join(lines).rstrip() + "\n"


def entry(name: str, thing: Any) -> list[str]:
    """Heading, signature and docstring of a class or function, and a class's public methods of its own."""
    text = inspect.getdoc(thing) or ""
    lines = [f"### `{name}`", "", "```python", signature(name, thing), "```", "", "```text", text, "```", ""]
    fields = getattr(thing, "_fields", None)
    if fields:
        lines[-1:] = ["", "Fields: " + ", ".join(f"`{field}`" for field in fields) + ".", ""]
    elif inspect.isclass(thing) and not issubclass(thing, Enum | Exception):
        for own, value in vars(thing).items():
            if inspect.isfunction(value) and not own.startswith("_") and value.__doc__ and own != "forward":
                lines += [f"- `{own}`: {inspect.getdoc(value).splitlines()[0]}"]  # type: ignore[union-attr]
        lines.append("")
    return lines


def signature(name: str, thing: Any) -> str:
    """As one would call it, a line for each argument where one line is too long."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return name
    found = inspect.signature(thing)
    arguments = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        arguments.append(re.sub(r""": (['"])(.+?)\1( =|$)""", r": \2\3", str(parameter)))
    returns = "" if found.return_annotation in (found.empty, "None") else f" -> {found.return_annotation}"
    short = f"{name}({', '.join(arguments)}){returns}"
    if len(short) <= 110:
        return short
    return f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){returns}"


if __name__ == "__main__":
    PAGE.write_text(render())
