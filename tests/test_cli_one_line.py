"""How the commands tell what went wrong: one line, and whose fault it was."""

import mmap
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import typer

from hf_longspec.cli.one_line import in_one_line

MORE = 1 << 32


@contextmanager
def little_memory():
    """This process gets no more than 256 MiB beyond what it has."""
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 28), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mapped(folder):
    path = folder / "weights"
    with path.open("wb") as file:
        file.truncate(MORE)  # takes no room
    return torch.from_file(str(path), size=MORE, dtype=torch.uint8)


WANTS = {
    "a tensor": lambda _: torch.empty(MORE, dtype=torch.uint8),
    "a tensor of more bytes than can be counted": lambda _: torch.empty(1 << 62),
    "weights that are mapped": mapped,
    "an array": lambda _: np.empty(MORE, dtype=np.uint8),
    "Python": lambda _: bytearray(MORE),
}


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
def test_more_memory_than_there_is(want, tmp_path, capsys):
    with pytest.raises(typer.Exit) as end, in_one_line("take less"), little_memory():
        want(tmp_path)
    assert end.value.exit_code == 1
    told = capsys.readouterr().err
    assert told.startswith("hf-longspec: out of memory") and told.endswith(": take less\n") and told.count("\n") == 1


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ],
)
def test_what_a_gpu_and_its_libraries_say(message, capsys):
    with pytest.raises(typer.Exit), in_one_line():
        raise RuntimeError(message)
    assert capsys.readouterr().err == "hf-longspec: out of memory\n"


def test_what_the_system_lacks_is_the_machines_fault(capsys):
    with pytest.raises(typer.Exit) as end, in_one_line(), little_memory():
        mmap.mmap(-1, MORE)
    assert end.value.exit_code == 1 and "Cannot allocate memory" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_the_users(tmp_path, capsys):
    with pytest.raises(typer.Exit) as end, in_one_line():
        (tmp_path / "missing").read_text()
    assert end.value.exit_code == 2 and "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("expected a tensor"), KeyError("key"), TypeError("two"), typer.Exit(5)]
)
def test_mistakes_of_the_program_pass(error):
    with pytest.raises(type(error)) as passed, in_one_line():
        raise error
    assert passed.value is error
