"""`sslfast COMMAND`: the commands under one name. `sslfast train` is `python -m sslfast.train`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

import sslfast

COMMANDS = {
    "train": "train two networks on labelled and unlabelled volumes",
    "predict": "segment scans with a trained pair of networks",
    "evaluate": "compare segmentations with their references",
    "prepare": "check a dataset, convert a public one, decode it once",
    "doctor": "report what is installed and which backend runs",
    "build": "compile the kernels ahead of their first use",
}
HELP = "\n".join(
    [
        "usage: sslfast COMMAND [flags]\n",
        *(f"  {name:<10} {summary}" for name, summary in COMMANDS.items()),
        "\nsslfast COMMAND --help explains a command; each is also `python -m sslfast.COMMAND`.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names with the others; returns its exit status, 2 if there is none."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name == "--version":
        print(f"sslfast {sslfast.__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" Did you mean {close[0]}?" if close else ""
        print(f"error: there is no command {name!r}.{meant}\n\n{HELP}" if name else HELP, file=sys.stderr)
        return 2
    try:
        command = import_module(f"sslfast.{name}").main
    except ModuleNotFoundError as error:
        print(f"error: sslfast {name}: {error}", file=sys.stderr)
        return 2
    return int(command(rest))


if __name__ == "__main__":
    sys.exit(main())
