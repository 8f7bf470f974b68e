"""The tokenizer of a draft's folder that holds none: its target's, which `card.json` names.

A draft writes its target's tokens and has no tokenizer of its own. `hf-longspec export` and `push_to_hub` put the
target's into the folder; the folders of hub_configs/ name the target only, so as not to carry megabytes that the
target's repository has.
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from .writing import first_line

_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_OF_THE_HUB = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class DraftTokenizer(PreTrainedTokenizerFast):
    """What AutoTokenizer asks for a draft's tokenizer where the folder names no class; there are no objects of it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *inputs: Any, **kwargs: Any) -> Any:
        """Return the tokenizer that a draft's folder or repository holds, else that of its target.

        Raises `OSError` that says where to take the tokenizer from, if neither can be loaded.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if any(_find(name, file, kwargs) for file in _FILES):
            return PreTrainedTokenizerFast.from_pretrained(name, *inputs, **kwargs)
        card, target, reason = _find(name, "card.json", kwargs), None, ""
        if card is not None:
            with open(card, encoding="utf-8") as file:
                target = json.load(file).get("base_model")
        if target is not None:
            try:
                return AutoTokenizer.from_pretrained(target, *inputs, **_of_target(kwargs))
            except (OSError, ValueError) as error:
                reason = f"; {target} cannot be loaded: {first_line(error)}"
        raise OSError(
            f"{name} holds no tokenizer, since a draft has its target's: AutoTokenizer.from_pretrained(TARGET){reason}"
        )


def _find(name: str, file: str, kwargs: dict[str, Any]) -> str | None:
    """Return the path of a file of a folder or repository; None if there is no such file."""
    of_the_hub = {key: kwargs[key] for key in _OF_THE_HUB if kwargs.get(key) is not None}
    return cached_file(name, file, **of_the_hub, _raise_exceptions_for_missing_entries=False)


def _of_target(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that hold for the target too: a commit of the draft's repository does not."""
    return {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder", "_commit_hash")}
