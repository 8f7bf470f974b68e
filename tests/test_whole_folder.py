"""A folder that appears whole or not at all, and whose fault it is when it does not."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from full_disk import full_disk
from safetensors.torch import save_file

from hf_longspec.hub.whole_folder import check_new, whole_folder
from hf_longspec.loading import loading
from hf_longspec.writing import MachineError, writing


def test_it_appears_in_the_end(tmp_path):
    folder = tmp_path / "new" / "deep" / "whole"
    with whole_folder(folder) as unfinished:
        (unfinished / "file").write_text("all of it")
        assert not (tmp_path / "new").exists()
    assert (folder / "file").read_text() == "all of it"
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and os.listdir(folder.parent) == ["whole"]


@pytest.mark.parametrize("linked", [False, True])
def test_an_empty_folder_gives_way(tmp_path, linked):
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    with whole_folder(tmp_path / "link" if linked else folder) as unfinished:
        (unfinished / "file").write_text("")
    assert os.listdir(folder) == ["file"] and (tmp_path / "link").is_symlink()


def test_a_link_to_itself(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="link cannot be written: Not a directory"), whole_folder(tmp_path / "link"):
        pass
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.parametrize("context", [writing(Path("place")), loading("target", "place")], ids=["writing", "loading"])
def test_errors_without_a_message(context):
    with pytest.raises(OSError, match="place cannot be (written|loaded): TimeoutError"), context:
        raise TimeoutError


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyError, match="not about a file"), whole_folder(tmp_path / "new" / "whole") as unfinished:
        (unfinished / "file").write_text("half")
        raise KeyError("not about a file")
    assert not any(tmp_path.iterdir())


def test_where_no_folder_can_go(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(ValueError, match=f"expected a new or empty folder to write to, got {folder}"):
            check_new(folder)
    check_new(tmp_path / "new" / "deep")


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(2000)),
    "numpy": lambda path: np.save(path, np.zeros(1000)),
    "safetensors": lambda path: save_file({"x": torch.zeros(500)}, path),
    "tokenizers": lambda path: byte_tokenizer().backend_tokenizer.save(str(path)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_the_machines_fault(tmp_path, write):
    """Each library has an error of its own for it."""
    folder = tmp_path / "whole"
    with (
        full_disk(1000),
        pytest.raises(MachineError, match=f"^{folder} cannot be written: .*(File too large|written)"),
    ):
        with whole_folder(folder) as unfinished:
            write(unfinished / "file")
    assert not any(tmp_path.iterdir())


def test_a_wrong_place_is_not(tmp_path):
    with pytest.raises(OSError, match="aaa cannot be written: File name too long") as caught:
        with whole_folder(tmp_path / ("a" * 300)):
            raise AssertionError("there is no such place")
    assert not isinstance(caught.value, MachineError) and caught.value.__cause__.errno == errno.ENAMETOOLONG


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^shapes do not fit$"), writing("x"):
        raise RuntimeError("shapes do not fit")


def test_the_first_name_stays():
    with pytest.raises(MachineError, match="^tokens.npy cannot be written"), writing("x"), writing("tokens.npy"):
        raise OSError(errno.ENOSPC, "No space left on device")
