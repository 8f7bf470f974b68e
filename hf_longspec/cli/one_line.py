"""How the commands tell what went wrong: one line on standard error, and whose fault it was."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from ..writing import MachineError, blames_machine

# How torch says it of tensors, of files that it maps, of what C++ and CUDA want beside.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "Storage size calculation overflowed",
    os.strerror(errno.ENOMEM),
    "std::bad_alloc",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
)


@contextmanager
def in_one_line(of_memory: str = "") -> Iterator[None]:
    """What a user or a machine gets wrong ends the command with one line, no traceback.

    of_memory: what to say when that runs out. The code is 1 for the machine, else 2: see `fail`.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        of_machine = isinstance(error, MachineError) or blames_machine(error)
        fail(str(error).strip(), code=1 if of_machine else 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        wanted = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        amount = f" ({wanted[1]} more were wanted)" if wanted else ""
        fail(f"out of memory{amount}{of_memory and f': {of_memory}'}", code=1)


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of this machine's own memory, which torch tells by the message alone."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on standard error, no traceback; code 2 says that the command was at fault, 1 that the machine was."""
    typer.echo(f"hf-longspec: {message}", err=True)
    raise typer.Exit(code)
