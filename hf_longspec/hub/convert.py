"""The conversion of a published LongSpec draft to this project's format: read, checked against its target, written.

All is checked before anything is written, and the folder appears under its name only when it is complete.
`published.py` knows the format, `weight_files.py` the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, StrictDataclassError
from torch import Tensor
from transformers import AutoConfig

from ..modeling.configuration_longspec import LongSpecConfig
from ..modeling.modeling_longspec import LongSpecForCausalLM
from ..provenance import versions
from ..writing import MachineError
from .published import UNUSED, WINDOW, config_mismatches, draft_config, weight_mismatches
from .weight_files import read_weights, sha256, weight_files
from .whole_folder import check_new, whole_folder

RECORD = "conversion.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Conversion:
    """The record of a conversion, as `conversion.json` in the folder holds it.

    source, target: the names as given, with the commits of those on the Hub. files: SHA-256 of each file read. dtype:
    the format of the written weights; source_dtypes: the formats of the weights read. unused: names that were left
    out.
    """

    source: str
    source_revision: str | None
    files: dict[str, str]
    target: str
    target_revision: str | None
    dtype: str
    source_dtypes: list[str]
    unused: list[str]
    parameters: int
    versions: dict[str, Any]


def convert(source: str, target: str, out: Path, dtype: str = "float16") -> Conversion:
    """Convert the published draft `source`, for `target`, to our format in the new folder `out`.

    source, target: folders or Hub ids. Raises `ValueError` for a checkpoint that is damaged, could run code, or is no
    draft for this target, with each mismatch listed; `OSError` for what cannot be read or written, `MachineError`
    where disk or network fail. An error leaves `out` as it was.
    """
    check_new(out)
    ours = config_for("target", target, read_config("target", target))
    check_config(source, target, ours)
    folder = local_folder(source)
    files = weight_files(folder)
    weights = read_weights(files)
    draft = build(ours, weights, DTYPES[dtype], f"{source} is no published draft for {target}")
    record = Conversion(
        source=source,
        source_revision=revision(source),
        files={path.name: sha256(path) for path in files},
        target=target,
        target_revision=revision(target),
        dtype=dtype,
        source_dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}),
        unused=sorted(weights.keys() & UNUSED),
        parameters=draft.num_parameters(),
        versions=versions(),
    )
    with whole_folder(out) as unfinished:
        draft.save_pretrained(unfinished)
        (unfinished / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    return record


def read_config(role: str, name: str) -> Any:
    """Return the config of a folder or Hub id; raise `ValueError` in one line that says why there is none."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{role} {name} is a file; expected its folder")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{role} {name}: no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError, HTTPError) as error:
        place = "has no config" if folder.is_dir() else "is no folder here, nor a repository on the Hub with a config"
        raise ValueError(f"{role} {name} {place} that can be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return the first two lines of an error's message as one line.

    transformers says in the second line what is wrong with a field, or what to do.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])


def config_for(role: str, name: str, config: Any) -> LongSpecConfig:
    """Return `draft_config(config)`; the message of its `ValueError` then names the folder or Hub id."""
    try:
        return draft_config(config)
    except ValueError as error:
        raise ValueError(f"{role} {name}: {error}") from error


def check_config(source: str, target: str, ours: LongSpecConfig) -> None:
    """Raise `ValueError` where the config beside the checkpoint does not fit this target."""
    published = read_config("draft", source)
    if published.model_type == "longspec":
        earlier = published.window < WINDOW and (Path(source) / RECORD).is_file()  # converted before 2026-12
        mend = f'; set "window": {WINDOW} in its config.json, where it has {published.window}' if earlier else ""
        raise ValueError(f"draft {source} is in our format already, there is nothing to convert{mend}")
    theirs = config_for("draft", source, published)
    if mismatches := config_mismatches(theirs, ours):
        raise ValueError(f"{source} is no draft for {target}:\n  " + "\n  ".join(mismatches))


def revision(name: str) -> str | None:
    """Return the commit that the config of a Hub id was read from; None for a folder."""
    cached = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def local_folder(source: str) -> Path:
    """Return the folder of a source: the source itself, or its download from the Hub.

    Where the Hub has two formats of weights, only safetensors are downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    commit = revision(source)
    for patterns in (["model*.safetensors*"], ["pytorch_model*.bin*"]):
        try:
            folder = Path(snapshot_download(source, revision=commit, allow_patterns=["config.json", *patterns]))
        except (HTTPError, OSError) as error:
            raise MachineError(f"cannot download {source}: {one_line(error)}; try again") from error
        if any(path for pattern in patterns for path in folder.glob(pattern)):
            break
    return folder


def build(
    config: LongSpecConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, refusal: str
) -> LongSpecForCausalLM:
    """Return a draft of this config with these weights, in `dtype`.

    Raises `ValueError` that starts with `refusal`: for weights of another layer, with each mismatch listed, for packed
    weights, and for numbers that `dtype` cannot hold.
    """
    with torch.device("meta"):
        draft = LongSpecForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if mismatches := weight_mismatches(found, expected):
        raise ValueError(f"{refusal}:\n  " + "\n  ".join(mismatches))
    formats = {str(weights[name].dtype) for name in expected if weights[name].dtype not in DTYPES.values()}
    if formats:
        raise ValueError(f"{refusal}: expected weights in {', '.join(DTYPES)}, got {', '.join(sorted(formats))}")
    # copied, since tensors of a pickle may share memory
    cast = {name: weights[name].to(dtype, copy=True).contiguous() for name in expected}
    if broken := [name for name, tensor in cast.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{refusal}: numbers that are not finite in {dtype}, in {', '.join(broken)}")
    draft.load_state_dict(cast, assign=True)
    return draft
