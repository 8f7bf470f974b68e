"""A tiny target and a published draft for it as folders, and the conversions that tests run on them."""

from pathlib import Path

import pytest
from published_format import TARGETS, random_weights, tiny, write_checkpoint, write_config
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.hub import convert as conversion

NAME = "vicuna-7b-v1.5-16k"
CONFIG = tiny(TARGETS[NAME])


def published_folders(folder: Path, *, pickled: bool = False) -> Path:
    """Write the folders `target` and `published`, the latter in float16."""
    write_config(folder / "target", CONFIG)
    write_checkpoint(folder / "published", CONFIG, random_weights(CONFIG), pickled=pickled)
    return folder


def convert(folder: Path, source="published", target="target", out="draft", dtype="float16"):
    return conversion.convert(str(folder / source), str(folder / target), folder / out, dtype)


def command(folder: Path, *options: str, source="published", target="target", out="draft"):
    arguments = ["convert", str(folder / source), "--target", str(folder / target), "--out", str(folder / out)]
    return CliRunner().invoke(cli.app, [*arguments, *options])


def assert_refused(folder: Path, match: str, **names: str) -> None:
    """Assert that a conversion fails with one clear error and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError), match=match):
        convert(folder, **names)
    assert sorted(folder.rglob("*")) == before
