"""`sslfast COMMAND`: all commands under one name. `sslfast train` is short for `python -m sslfast.train`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

import sslfast

COMMANDS = {
    "train": "train two networks on labelled and unlabelled volumes",
    "plan": "choose the settings of a run by its data and this machine",
    "predict": "segment volumes with a trained pair of networks",
    "rank": "say which unlabelled volumes to label next",
    "report": "show the cases of a run, or segmentations, in a page for a browser",
    "export": "write the networks as TorchScript, ONNX or a MONAI bundle",
    "evaluate": "compare segmentations with reference label maps",
    "prepare": "check and decode a dataset, or convert a public one",
    "doctor": "report what is installed and which backend runs, and check bf16",
    "build": "compile the kernels before their first use",
}
HELP = "\n".join(
    [
        "usage: sslfast COMMAND [flags]\n",
        *(f"  {name:<10} {summary}" for name, summary in COMMANDS.items()),
        "\nsslfast COMMAND --help explains a command. `sslfast COMMAND` is short for `python -m sslfast.COMMAND`.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command named by the first argument with the others. Returns its exit status; 2: no such command."""
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
