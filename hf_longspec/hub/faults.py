"""Faults that keep a folder from being pushed: missing or strange files, gaps in the card, code that does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_imports
from yaml import YAMLError

from .card import card_faults

_SCRIPT = Path(__file__).with_name("clean_process.py")
_CODE = "modeling_longspec.py"
_NEEDED = ("README.md", "config.json", "model.safetensors", "tokenizer_config.json", _CODE)
_LICENSES = ("LICENSE", "LICENSE.code")
# all files that a tokenizer of transformers may write; each tokenizer writes some of them
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_NO_REPOSITORY = "path/of/this/repository"


def hub_faults(folder: str | Path, *, target: str | None = None, generate: bool = True) -> list[str]:
    """Return what is wrong with a draft's folder, a line each; the list is empty if it may go to the Hub.

    target: Hub id or folder of the target, which the draft must fit. generate: whether to write a few tokens with the
    target too, if it is a folder with weights; the weights are loaded whole. Raises `ValueError` if there is no such
    folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    missing = [f"{name} is missing" for name in _NEEDED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _LICENSES):
        missing.append(f"a license is missing: one of {', '.join(_LICENSES)}")
    if missing:
        return missing
    try:
        card = ModelCard.load(folder / "README.md")
    except (ValueError, YAMLError) as error:
        return [f"README.md: its metadata cannot be read: {' '.join(str(error).split())}"]
    faults = [f"README.md: {fault}" for fault in card_faults(card)]
    if _NO_REPOSITORY in card.text:
        faults.append("README.md: the lines of use name no repository; export with --repo-id")
    return faults + file_faults(folder, card.text) + load_faults(folder, card.text, target, generate)


def file_faults(folder: Path, text: str) -> list[str]:
    """Return a fault for each missing code file that the draft's code imports, and for each file of no use.

    text: the card's text; a picture that the card shows is of use.
    """
    code = imported(folder)
    known = {*_NEEDED, *_LICENSES, *_TOKENIZER, *code, ".gitattributes"}
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    strange = [name for name in found if name not in known and not name.startswith("additional_chat_templates/")]
    return [f"{name} is missing: the draft's code imports it" for name in sorted(code) if name not in found] + [
        f"{name}: nothing of a draft; take it out of the folder"
        for name in strange
        if not (name.endswith((".png", ".svg")) and name in text)
    ]


def imported(folder: Path) -> set[str]:
    """Return the names of the code files that the draft needs, whether they exist or not."""
    needed = {_CODE, "configuration_longspec.py"}
    waiting = set(needed)
    while waiting:
        path = folder / waiting.pop()
        if path.is_file():
            new = {f"{name}.py" for name in get_relative_imports(path)} - needed
            needed |= new
            waiting |= new
    return needed


def load_faults(folder: Path, text: str, target: str | None, generate: bool) -> list[str]:
    """Return the faults that `clean_process.py` finds in a process of its own; text: the card's text."""
    asked = {"path": sys.path, "folder": str(folder.resolve()), "target": target, "generate": generate}
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, "-I", str(_SCRIPT), json.dumps(asked)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | {"HF_MODULES_CACHE": modules},
        )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return [f"does not load as remote code: {lines[-1].strip()}"]
    told = json.loads(done.stdout)
    if told["vocabulary"] not in text:
        told["faults"].append("README.md: it tells another vocabulary than that of the folder's tokenizer")
    return told["faults"]
