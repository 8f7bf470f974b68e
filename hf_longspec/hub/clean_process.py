"""Loads a draft's folder as a stranger would: as remote code, in a process that cannot import this package.

A script, never imported: `python -I clean_process.py FOLDER [TARGET]`. What it finds wrong goes to standard output as
one line of JSON, a list. What it cannot load at all ends in an exception, whose last line tells why.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys
from typing import Any


class Hidden(importlib.abc.MetaPathFinder):
    """There is no such package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("hf_longspec", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(folder: str) -> tuple[Any, Any, list[str]]:
    """The draft, its tokenizer and what is wrong with them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draft, told = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    faults = []
    if not type(draft).__module__.startswith("transformers_modules."):
        faults.append(f"expected the class to come from the folder's own code, got {type(draft).__module__}")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[kind]:
            faults.append(f"weights and config: {kind.replace('_', ' ')}: {', '.join(sorted(map(str, told[kind])))}")
    if broken := [name for name, weight in draft.named_parameters() if not torch.isfinite(weight).all()]:
        faults.append(f"weights that are not finite: {', '.join(broken)}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (highest := max(tokenizer.get_vocab().values())) >= draft.config.vocab_size:
        faults.append(f"tokenizer: the draft has {draft.config.vocab_size} tokens, the tokenizer gives {highest}")
    return draft, tokenizer, faults


def fit(draft: Any, tokenizer: Any, name: str) -> list[str]:
    """Whether the draft fits the target `name`; where its weights lie in a folder, by writing a few tokens with it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            draft.bind(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)))
    except (OSError, ValueError) as error:
        return [f"target {name}: " + " ".join(str(error).split())]
    if not os.path.isdir(name) or not any(entry.endswith(".safetensors") for entry in os.listdir(name)):
        return []
    target = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    inputs = tokenizer("def main():\n    return", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = target.generate(**inputs, **options)
    text = target.generate(**inputs, assistant_model=draft, **options)
    # in 16 bits the two may part where the target's best tokens tie
    if target.dtype == torch.float32 and text.tolist() != plain.tolist():
        return [f"target {name}: with the draft it writes {text.tolist()}, alone {plain.tolist()}"]
    return []


def main() -> None:
    sys.meta_path.insert(0, Hidden())
    sys.path[:] = json.loads(sys.argv[1])  # -I leaves out what PYTHONPATH brought to the calling process
    folder, *target = sys.argv[2:]
    draft, tokenizer, faults = load(folder)
    for name in target:
        faults += fit(draft, tokenizer, name)
    print(json.dumps(faults))


if __name__ == "__main__":
    main()
