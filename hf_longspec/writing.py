"""What goes wrong while something is written, as one line that names it: the machine's fault, or the place's."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

# They say that the place which a command names is wrong. Any other, such as a full disk, is the machine's.
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
    """The disk or the network failed a command that was right; the message is one line for the user."""


class writing:  # a context manager, named as those of contextlib are
    """What cannot be written inside raises `MachineError` that names `path` and the reason, or `OSError` where nothing
    can be written at all. Other errors rise as they are.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None or isinstance(error, MachineError):  # which has named what it was about
            return
        number = number_of(error)
        if number is None and not isinstance(error, OSError):
            return
        reason = getattr(error, "strerror", None) or first_line(error)
        told = OSError if number in WRONG_PLACE else MachineError
        raise told(f"{self.path} cannot be written: {reason}") from error


def number_of(error: BaseException) -> int | None:
    """The system's number of an error, also of one of safetensors or tokenizers, whose messages end in it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def blames_machine(error: BaseException) -> bool:
    """Whether the system says what went wrong, and it is not the place that was named."""
    return number_of(error) not in {None, *WRONG_PLACE}


def first_line(error: BaseException) -> str:
    """Of the message; where there is none, the error's kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`, which keeps what it held if that fails. Raises what `writing` does."""
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")  # other processes may write the same
    with writing(path):
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
