"""What goes wrong while something is written, as one line that names it: the machine's fault, or the place's."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `MachineError` that names `path` and the reason, or `OSError` where nothing can be written at all."""
    try:
        yield
    except MachineError:  # has named what it was about
        raise
    except Exception as error:  # safetensors and tokenizers have classes of their own, or none
        number = number_of(error)
        if number is None and not isinstance(error, OSError):
            raise
        kind = OSError if number in WRONG_PLACE else MachineError
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise kind(f"{path} cannot be written: {reason}") from error


def number_of(error: Exception) -> int | None:
    """The system's number of an error, also of one that comes from Rust, which ends its messages in it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`, which keeps what it held if that fails. Raises what `writing` does."""
    unfinished = path.with_name(f".{path.name}")
    with writing(path):
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
