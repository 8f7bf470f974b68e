"""What `from_pretrained` raises for a folder or Hub repository that cannot be had, as one line that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .writing import MachineError, blames_machine, first_line


@contextmanager
def loading(role: str, name: str) -> Iterator[None]:
    """Raises `OSError` with the role of what could not be loaded, its name, and the first line of the reason.

    `MachineError` where the system says why and it is not the name: a full disk under the cache of downloads, say.
    """
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise OSError(f"{role} {name}: no such folder")
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        told = MachineError if blames_machine(error) else OSError
        raise told(f"{role} {name} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):  # transformers' word for weights of another shape, which it lists in a warning
        return "its weights have other shapes than its config tells"
    if isinstance(error, StrictDataclassError):  # the first line names the field only
        return " ".join(str(error).split())
    return first_line(error)
