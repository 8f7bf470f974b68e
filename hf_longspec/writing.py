"""Errors of writing as one line with the path and the reason, by whether the machine or the path is at fault."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

# Errors that lie in the path which a command names. Any other error, such as a full disk, is the machine's.
WRONG_PLACE = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}


class MachineError(OSError):
    """The error for a disk or network that failed a correct command; the message is one line for the user."""


class writing:  # a context manager, with a name in lower case as in contextlib
    """Turn an error of writing inside the context into one line with `path` and the reason.

    Raises `OSError` where nothing can be written at this path at all, else `MachineError`. Errors of other kinds pass
    unchanged.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None or isinstance(error, MachineError):  # a MachineError already names what failed
            return
        number = number_of(error)
        if number is None and not isinstance(error, OSError):
            return
        reason = getattr(error, "strerror", None) or first_line(error)
        told = OSError if number in WRONG_PLACE else MachineError
        raise told(f"{self.path} cannot be written: {reason}") from error


def number_of(error: BaseException) -> int | None:
    """Return the system's number of an error; None if there is none.

    Errors of safetensors and tokenizers give the number at the end of their message.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def blames_machine(error: BaseException) -> bool:
    """Tell whether the system gives a reason for the error that does not lie in the path."""
    return number_of(error) not in {None, *WRONG_PLACE}


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of an unfinished file, which replaces `path` at the end.

    After an error `path` keeps what it held. Raises what `writing` raises.
    """
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")  # other processes may write the same file
    with writing(path):
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
