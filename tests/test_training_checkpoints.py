"""Which folders count as checkpoints."""

import os

import pytest

from hf_longspec.training.checkpoints import (
    COMPLETE,
    is_complete,
    last_complete,
    mark_complete,
    mark_unfinished,
)


def write(run, steps, complete=True):
    folder = run / f"checkpoint-{steps}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * steps)
    (folder / "shards" / "rank0.pt").write_bytes(b"state")
    if complete:
        mark_complete(folder)
    return folder


def test_the_last_whole_one_counts_by_its_steps(tmp_path):
    assert last_complete(tmp_path) is None and last_complete(tmp_path / "nowhere") is None
    write(tmp_path, 90)
    newest = write(tmp_path, 100)
    write(tmp_path, 8)
    write(tmp_path, 110, complete=False)
    assert last_complete(tmp_path) == newest


@pytest.mark.parametrize("file", ["model.safetensors", "shards/rank0.pt"])
def test_a_file_that_is_cut_or_missing_makes_no_checkpoint(tmp_path, file):
    folder = write(tmp_path, 10)
    assert is_complete(folder)
    with open(folder / file, "r+b") as opened:
        opened.truncate(2)
    assert not is_complete(folder)
    (folder / file).unlink()
    assert not is_complete(folder) and last_complete(tmp_path) is None


def test_a_folder_that_is_written_again_is_unfinished_until_the_end(tmp_path):
    folder = write(tmp_path, 10)
    mark_unfinished(folder)
    assert not is_complete(folder)
    mark_unfinished(folder)
    mark_complete(folder)
    assert is_complete(folder)


def test_a_kill_before_the_list_is_in_place_leaves_no_checkpoint(tmp_path, monkeypatch):
    folder = write(tmp_path, 10, complete=False)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        mark_complete(folder)
    assert not is_complete(folder) and not (folder / COMPLETE).exists()
