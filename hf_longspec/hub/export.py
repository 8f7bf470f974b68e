"""A draft as a folder that is ready for the Hub: weights, config, code, the target's tokenizer, card and license.

The folder appears whole or not at all. `faults.py` tells whether the folder is fit to be pushed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..loading import loading
from ..modeling.modeling_longspec import LongSpecForCausalLM
from ..vocabulary import vocabulary_sha256
from .card import About, draft_card
from .whole_folder import check_new, whole_folder

CODE_LICENSE = "apache-2.0"  # the license of the code files in the folder
_LICENSE_TEXT = Path(__file__).with_name("LICENSE")


def load_draft(name: str) -> LongSpecForCausalLM:
    """Load the draft of a folder or Hub repository in the format that it was saved in.

    Raises `ValueError` if `name` is no draft, or its weights do not match its config; `OSError` if it cannot be
    loaded.
    """
    with loading("draft", name):
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind != "longspec":
        raise ValueError(f"{name} is no LongSpec draft, its model type is {kind!r}")
    with loading("draft", name):
        draft, told = LongSpecForCausalLM.from_pretrained(
            name, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    wrong = {kind: sorted(map(str, told[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {name} are not those that its config.json tells: {listed}")
    return draft


def export(
    draft: LongSpecForCausalLM,
    folder: str | Path,
    *,
    target_folder_or_id: str,
    about: About,
    results: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> list[Path]:
    """Write `draft` for the Hub and return the files, in order.

    target_folder_or_id: the target, whose config the draft must fit and whose tokenizer goes along. about, results,
    recipe, repo_id: for the card, see `draft_card`. Raises `ValueError` if the draft does not fit, if `about` gives
    another vocabulary, or if `folder` exists and is not empty; `OSError` if the target cannot be loaded,
    `MachineError` if the disk is full.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    folder = Path(folder)
    check_new(folder)
    with loading("target", target_folder_or_id):
        target, tokenizer = target_shape(target_folder_or_id), AutoTokenizer.from_pretrained(target_folder_or_id)
    draft.bind(target)
    about = with_vocabulary(about, tokenizer, target_folder_or_id)
    card = draft_card(draft.config, about, results, recipe=recipe, repo_id=repo_id)
    with whole_folder(folder) as unfinished:
        draft.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        card.save(unfinished / "README.md")
        shutil.copyfile(_LICENSE_TEXT, unfinished / license_name(about.license))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def target_shape(name: str) -> Any:
    """Return the target on the meta device: its shape, without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))


def with_vocabulary(about: About, tokenizer: PreTrainedTokenizerBase, target: str) -> About:
    """Return `about` with the hash of this tokenizer's vocabulary.

    Raises `ValueError` if `about` gives another hash.
    """
    found = vocabulary_sha256(tokenizer)
    if about.vocabulary_sha256 not in (None, found):
        raise ValueError(
            f"vocabulary: card.json tells {about.vocabulary_sha256}, the tokenizer of {target} has {found}"
        )
    return dataclasses.replace(about, vocabulary_sha256=found)


def license_name(of_weights: str) -> str:
    """Name the code's license file: `LICENSE` if the weights have the same license, else `LICENSE.code`."""
    return "LICENSE" if of_weights == CODE_LICENSE else "LICENSE.code"
