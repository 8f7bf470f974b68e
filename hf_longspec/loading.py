"""Errors of `from_pretrained` as one line that names the folder or Hub repository that cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .writing import MachineError, blames_machine, first_line


@contextmanager
def loading(role: str, name: str) -> Iterator[None]:
    """Raise `OSError` with the role and name of what cannot be loaded, and the first line of the reason.

    Raises `MachineError` instead where the system gives a reason and the name is not at fault: a full disk under the
    download cache, say.
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
    if isinstance(error, RuntimeError):  # transformers' error for weights of another shape; a warning lists them
        return "its weights have other shapes than its config tells"
    if isinstance(error, StrictDataclassError):  # the first line names the field only
        return " ".join(str(error).split())
    return first_line(error)
