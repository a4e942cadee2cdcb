"""The exception that the commands print as a message instead of a traceback."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class UserError(ValueError):
    """An error that the user can fix. The message names the file or argument, what it was and what it must be."""


class Stopped(Exception):
    """The end of a command that a signal asked for, once its work so far is kept. The message says how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send, as an exception: worker processes and parts of files are cleared away."""


MAX_CLASSES = 32  # the flags of a voxel have five bits for the class


def too_many_classes(count: int) -> str:
    """The message, without a full stop, where there are more classes than the kernels take."""
    return (
        f"there are {count} classes, and sslfast takes at most {MAX_CLASSES}, background included; "
        "merge classes in the label maps, or leave some of them out; the commands do both by --classes"
    )


def shortened(value: object) -> str:
    """A value as Python shows it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def plural(count: int, noun: str) -> str:
    """A count and its noun: 1 case, 2 cases."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def exit_status(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit status.

    0: success. 2: an argument or a file is wrong; a message on stderr names it and the remedy. 130: interrupted by
    Ctrl-C; 143: by SIGTERM.
    """
    try:
        with _sigterm_raises():
            command()
        return 0
    except UserError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        if error.filename is None:  # no file's fault
            raise
        status, message = 2, f"error: {error.filename} cannot be used: {error.strerror}"
    except UnicodeEncodeError as error:
        status, message = 2, f"error: {error.object!a} has a character that {error.encoding} cannot write; rename it"
    except Terminated:
        status, message = 143, "terminated"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Stopped as stopped:
        status, message = 128 + stopped.signal, str(stopped)
    if message:  # printed here, where the exception is gone and with it the progress bars that it kept open
        print(message, file=sys.stderr)
    return status


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """In the main thread, SIGTERM raises `Terminated`, unless the program has its own way with it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
