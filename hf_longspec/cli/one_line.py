"""The commands' error messages: one line on standard error, and an exit code that says whose fault it was."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from ..writing import MachineError, blames_machine

# Words of torch's messages about memory for tensors and for mapped files, and of messages from C++ and CUDA.
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
    """Turn an error by the user or the machine within the context into one line that ends the command, no traceback.

    of_memory: what the line adds if memory runs out. The exit code is 1 for the machine, else 2: see `fail`.
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
    """Return whether a GPU's memory ran out, or this machine's own memory, which torch's message alone tells."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with one line on standard error; code 2 blames the command, code 1 the machine."""
    from tqdm import tqdm

    tqdm.write(f"hf-longspec: {message}", file=sys.stderr)  # not into the line of a progress bar
    raise typer.Exit(code)
