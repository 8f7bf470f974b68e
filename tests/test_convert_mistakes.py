"""`hf-longspec convert` with damaged or dangerous files, and where a user is wrong: one error, nothing left behind."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from conversions import CONFIG, assert_refused, command, published_folders
from full_disk import full_disk
from helpers import is_one_line
from published_format import random_weights, write_checkpoint, write_config
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_longspec import cli


@pytest.fixture
def folders(tmp_path):
    return published_folders(tmp_path)


# files that are damaged or dangerous


class Code:
    """Unpickled by the usual way, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    source = published_folders(tmp_path, pickled=True) / "published"
    torch.save(random_weights(CONFIG) | {"x": Code(tmp_path / "trap")}, source / "pytorch_model.bin")
    assert_refused(tmp_path, r"is refused: it holds more than tensors and would run code \(posix.mkdir\)")
    torch.save({"args": argparse.Namespace(lr=1)} | random_weights(CONFIG), source / "pytorch_model.bin")
    assert_refused(tmp_path, r"would run code \(argparse.Namespace\)")


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: data[:5], lambda data: b"", lambda _: GIT_LFS]
)
@pytest.mark.parametrize("pickled", [False, True])
def test_damaged_files(tmp_path, pickled, damage):
    source = published_folders(tmp_path, pickled=pickled) / "published"
    file = source / ("pytorch_model.bin" if pickled else "model.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(tmp_path, f"{file.name} is damaged")


def test_a_pickle_of_something_else(tmp_path):
    source = published_folders(tmp_path, pickled=True) / "published"
    torch.save({"model": random_weights(CONFIG)}, source / "pytorch_model.bin")
    assert_refused(tmp_path, "is no checkpoint: expected a dict of tensors")


@pytest.mark.parametrize(
    "index, match",
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "names files that are not beside it: gone.safetensors"),
        ({"weight_map": {"a": "../target/config.json"}}, r"not beside it: \.\./target/config.json"),
        ({"weight_map": {"a": 3}}, "not beside it: 3"),
        ({}, "is no index of shards"),
        ([], "is no index of shards"),
    ],
)
def test_wrong_indices(folders, index, match):
    (folders / "published" / "model.safetensors").unlink()
    (folders / "published" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folders, match)


def test_shards_that_hold_the_same(tmp_path):
    source = write_checkpoint(tmp_path / "published", CONFIG, random_weights(CONFIG), shards=2)
    write_config(tmp_path / "target", CONFIG)
    save_file(random_weights(CONFIG), source / "model-00002-of-00002.safetensors")
    assert_refused(tmp_path, "holds again what another shard does: ")


# what a user can get wrong


def test_folders_that_are_not_there(folders):
    (folders / "empty").mkdir()
    assert_refused(folders, "draft .*missing: no such folder", source="missing")
    assert_refused(folders, "target .*missing: no such folder", target="missing")
    assert_refused(folders, "draft .*config.json is a file; expected its folder", source="published/config.json")
    assert_refused(folders, "draft .*empty has no config that can be read: ", source="empty")
    assert_refused(folders, "target .*empty has no config that can be read: ", target="empty")
    assert_refused(folders, "holds no weights: expected one of", source="target")


def test_folders_that_are_in_use(folders):
    assert_refused(folders, "expected a new or empty folder to write to, got .*target", out="target")
    (folders / "file").write_text("")
    for out in ("file", "file/draft"):
        assert_refused(folders, f"expected a new or empty folder to write to, got .*{out}", out=out)


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "is not a valid JSON file"),
        ("{}", "Unrecognized model"),
        (json.dumps(CONFIG | {"hidden_size": "wide"}), "'hidden_size' expected int, got str"),
    ],
)
def test_configs_that_are_broken(folders, text, match):
    (folders / "published" / "config.json").write_text(text)
    assert_refused(folders, f"draft .* has no config that can be read: .*{match}")


def test_hub_while_offline(folders, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = ["convert", "sail/longspec-vicuna-7b-v1.5-16k", "--target", "lmsys/vicuna-7b-v1.5-16k"]
    result = CliRunner().invoke(cli.app, [*names, "--out", str(folders / "draft")])
    assert result.exit_code == 2 and is_one_line(result.stderr)
    assert "target lmsys/vicuna-7b-v1.5-16k is no folder here, nor a repository on the Hub" in result.stderr
    assert "We couldn't connect to" in result.stderr


def test_mistakes_are_told_without_a_traceback(folders):
    for options in (
        {"source": "missing"},
        {"target": "missing"},
        {"out": "target/config.json/draft"},
        {"out": "target"},
    ):
        result = command(folders, **options)
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
        assert result.stderr.startswith("hf-longspec: ") and is_one_line(result.stderr)


def test_a_disk_that_is_full(folders):
    before = sorted(folders.rglob("*"))
    with full_disk(20_000):
        result = command(folders, out="new/draft")
    assert result.exit_code == 1 and is_one_line(result.stderr)
    assert f"{folders / 'new' / 'draft'} cannot be written: " in result.stderr and "File too large" in result.stderr
    assert sorted(folders.rglob("*")) == before
    assert command(folders, out="new/draft").exit_code == 0
