"""What `from_pretrained` raises for a folder or Hub repository that cannot be had, as one line that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .writing import WRONG_PLACE, MachineError, number_of


@contextmanager
def loading(role: str, name: str) -> Iterator[None]:
    """Raises `OSError` with the role of what could not be loaded, its name, and the first line of the reason.

    `MachineError` where the system says why and it is not the name: a full disk under the cache of downloads, say.
    """
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise OSError(f"{role} {name}: no such folder")
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        blamed = {number_of(error)} - {None, *WRONG_PLACE}
        told = MachineError if blamed else OSError
        raise told(f"{role} {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
