"""The weights of a checkpoint's folder: safetensors or PyTorch's `.bin`, whole or in shards.

A `.bin` is a pickle, which could run code. It is read weights-only: a pickle that holds more than tensors is refused.
Knows files and tensors, nothing of drafts.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from pathlib import Path

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The errors of torch.load for a damaged file, found by thousands of cuts and flipped bits: torch.load checks little of
# what it reads.
DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder in reading order, safetensors before `.bin`.

    Raises `ValueError` if there are none, or if an index names a file that does not exist.
    """
    for name in (*SAFETENSORS, *PICKLES):
        path = folder / name
        if path.is_file():
            return [path] if path.suffix != ".json" else shards(path)
    raise ValueError(f"{folder} holds no weights: expected one of {', '.join((*SAFETENSORS, *PICKLES))}")


def shards(index: Path) -> list[Path]:
    """Return the files that an index of shards names; raise `ValueError` for a damaged index or missing files."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: expected JSON with a 'weight_map' of file names") from error
    # a name with a folder in it could point anywhere
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    missing = [name for name in names if name not in strange and not (index.parent / name).is_file()]
    if strange or missing:
        raise ValueError(f"{index} names files that are not beside it: {', '.join(map(str, strange + missing))}")
    return [index.parent / name for name in sorted(names)]


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Read all tensors of these files, on the CPU.

    Raises `ValueError` for a file that is damaged or could run code.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        part = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        if twice := sorted(weights.keys() & part.keys()):
            raise ValueError(f"{path} holds again what another shard does: {', '.join(twice)}")
        weights |= part
    return weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path} is refused: it holds more than tensors and would run code ({asked[1]}) to be read; "
                "ask for the checkpoint as safetensors"
            ) from error
        raise ValueError(f"{path} is damaged or no file of torch.save") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} is no checkpoint: expected a dict of tensors, got {type(weights).__name__}")
    return weights


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
