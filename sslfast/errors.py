"""The exception that the commands print as a message instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """An error that the user can fix. The message names the file or argument, what it was and what it must be."""


class Stopped(Exception):
    """The end of a command that a signal asked for, once its work so far is kept. The message says how to go on."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


MAX_CLASSES = 32  # the flags of a voxel have five bits for the class


def too_many_classes(count: int) -> str:
    """The message, without a full stop, where there are more classes than the kernels take."""
    return (
        f"there are {count} classes, and sslfast takes at most {MAX_CLASSES}, background included; "
        "merge classes in the label maps, or leave some of them out"
    )


def exit_status(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit status.

    0: success. 2: an argument or a file is wrong; a message on stderr names it and the remedy. 130: interrupted by
    Ctrl-C; 143: by SIGTERM.
    """
    try:
        command()
        return 0
    except UserError as error:
        status, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Stopped as stopped:
        status, message = 128 + stopped.signal, str(stopped)
    if message:  # printed here, where the exception is gone and with it the progress bars that it kept open
        print(message, file=sys.stderr)
    return status
