"""A script that loads a draft's folder as a stranger would: as remote code, where this package cannot be imported.

The script is never imported. Its one argument is JSON: the calling process' import path, the draft's folder, the
target or null, and whether to write with the target. The script prints the faults and the hash of the vocabulary to
standard output, as JSON. A folder that cannot be loaded at all ends the script in an exception, whose last line gives
the reason.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any


class Hidden(importlib.abc.MetaPathFinder):
    """A finder that hides this package: its import raises `ModuleNotFoundError`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("hf_longspec", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(folder: str) -> tuple[Any, Any, list[str]]:
    """Return the draft, its tokenizer and the faults of both."""
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
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if (highest := max(tokenizer.get_vocab().values())) >= draft.config.vocab_size:
        faults.append(f"tokenizer: the draft has {draft.config.vocab_size} tokens, the tokenizer gives {highest}")
    return draft, tokenizer, faults


def fit(draft: Any, name: str) -> list[str]:
    """Return a fault if the draft does not fit the target `name`, of which only the config is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            draft.bind(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)))
    except (OSError, ValueError) as error:
        return [f"target {name}: " + " ".join(str(error).split())]
    return []


def write(draft: Any, tokenizer: Any, name: str) -> list[str]:
    """Write a few tokens by the target `name`, whose weights lie in a folder, without and with the draft.

    Returns a fault if the two texts differ in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    inputs = tokenizer("def main():\n    return", return_tensors="pt").to(device)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = target.generate(**inputs, **options)
    text = target.generate(**inputs, assistant_model=draft, **options)
    # in 16 bits the two texts may part where the target's best tokens tie
    if target.dtype == torch.float32 and text.tolist() != plain.tolist():
        return [f"target {name}: with the draft it writes {text.tolist()}, alone {plain.tolist()}"]
    return []


def has_weights(name: str) -> bool:
    return os.path.isdir(name) and any(entry.endswith(".safetensors") for entry in os.listdir(name))


def main() -> None:
    answer, sys.stdout = sys.stdout, sys.stderr  # for whatever other code prints
    sys.meta_path.insert(0, Hidden())
    asked = json.loads(sys.argv[1])
    sys.path[:] = asked["path"]  # -I leaves out what PYTHONPATH brought to the calling process
    draft, tokenizer, faults = load(asked["folder"])
    target = asked["target"]
    if target is not None:
        misfits = fit(draft, target)
        if not misfits and asked["generate"] and has_weights(target):
            misfits = write(draft, tokenizer, target)
        faults += misfits
    vocabulary = runpy.run_path(str(Path(__file__).parents[1] / "vocabulary.py"))["vocabulary_sha256"]
    print(json.dumps({"faults": faults, "vocabulary": vocabulary(tokenizer)}), file=answer)


if __name__ == "__main__":
    main()
