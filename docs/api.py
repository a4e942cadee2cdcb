"""Writes api.md from the docstrings: python docs/api.py"""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import sslfast
import sslfast.methods
import sslfast.networks
import sslfast.ops

FIELD = re.compile(r"^    (\w+): [^\n]+?  # (.+)$", re.MULTILINE)  # of a class that holds values, with its comment
PAGE = Path(__file__).parent / "api.md"
PARTS = (
    ("The loss and the head", sslfast, ("DualContrastiveLoss", "DualContrastiveHead", "DualLoss", "LinearLogits")),
    ("Views", sslfast, ("teacher_view", "TeacherView")),
    ("Segmentation", sslfast, ("load", "Segmenter", "Segmentation")),
    ("Networks", sslfast, ("VNet", "ResVNet", "WithFeatures", "forward_apart")),
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
    """Heading, signature and docstring of a class or function, and a class's fields and public methods of its own."""
    text = inspect.getdoc(thing) or ""
    lines = [f"### `{name}`", "", "```python", signature(name, thing), "```", "", "```text", text, "```", ""]
    if inspect.isclass(thing) and not issubclass(thing, Enum | Exception):
        if issubclass(thing, tuple) or is_dataclass(thing):
            lines += [f"- `{field}`: {comment}" for field, comment in FIELD.findall(inspect.getsource(thing))]
        for member, value in vars(thing).items():
            if inspect.isfunction(value) and not member.startswith("_") and value.__doc__:
                said = inspect.getdoc(value) or ""
                if "\n\n" in said:
                    lines += ["", f"`{member}`:", "", "```text", said, "```"]
                else:
                    lines.append(f"- `{member}`: {' '.join(said.split())}")
        lines.append("")
    return lines


def signature(name: str, thing: Any) -> str:
    """The call, with one argument a line if it is too long."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return name
    of_thing = inspect.signature(thing)
    arguments = []
    for parameter in of_thing.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        said = re.sub(r"""ForwardRef\((['"])(.+?)\1\)""", r"\2", str(parameter))
        arguments.append(re.sub(r""": (['"])(.+?)\1( =|$)""", r": \2\3", said))
    returns = "" if of_thing.return_annotation in (of_thing.empty, "None") else f" -> {of_thing.return_annotation}"
    short = f"{name}({', '.join(arguments)}){returns}"
    if len(short) <= 110:
        return short
    return f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){returns}"


if __name__ == "__main__":
    PAGE.write_text(render())
