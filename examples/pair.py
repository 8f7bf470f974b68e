"""Shared by the other examples: the options --target and --draft, and the pair of models that they name.

Without them the target is SmolLM2-135M-Instruct, built from a package index (no Hub, no GPU needed), and the draft is
the one for it in hub_configs/.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_longspec  # noqa: F401  so that AutoModelForCausalLM knows drafts without remote code
from hf_longspec.demo import DRAFT
from hf_longspec.demo.weights import smollm2_folder


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--target", help="folder or Hub id of a chat model; default: SmolLM2-135M-Instruct")
    options.add_argument("--draft", help="folder or Hub id of its LongSpec draft; default: SmolLM2's, shipped here")
    options.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; default: the target's own")
    options.add_argument("--tree", type=int, nargs="*", help="nodes of each tree level; default: the draft's")
    return options


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    """Load target, tokenizer and draft, on the GPU if there is one."""
    if (options.target is None) != (options.draft is None):
        raise SystemExit("expected --target and --draft together: a draft fits one target only")
    target_name = options.target or smollm2_folder()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(target_name, dtype=options.dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(target_name, padding_side="left")
    draft = AutoModelForCausalLM.from_pretrained(options.draft or DRAFT)  # moves to the target's device by itself
    if options.tree is not None:
        draft.config.tree_shape = tuple(options.tree)
    return target, tokenizer, draft


def mean(accept_lengths: list[int]) -> float:
    """Return τ, the tokens that one forward of the target brings."""
    return sum(accept_lengths) / max(len(accept_lengths), 1)
