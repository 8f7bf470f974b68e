"""`python -m hf_longspec.training pack | train | agreement`: from files to a trained draft."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_longspec.modeling.configuration_longspec import LongSpecConfig
from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM

from .agreement import measure_agreement
from .config import TrainingConfig
from .data import PackedTokens, concatenate, find_files, is_held_out, pack, read_documents
from .trainer import Trainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_longspec.training", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("pack", help="tokenize folders of text files into one packed array")
    command.add_argument("roots", nargs="+", type=Path)
    command.add_argument("--tokenizer", required=True)
    command.add_argument("--suffix", nargs="+", default=[".py"])
    command.add_argument("--separator", default="<|endoftext|>", help="token that ends each document")
    command.add_argument("--held-out", nargs="*", default=[], help="names of folders or files to leave out")
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=pack_files)

    command = commands.add_parser("train", help="train a draft, or go on with the run in --out")
    command.add_argument("--target", required=True)
    command.add_argument("--tokens", required=True, nargs="+", type=Path, help="folders written by `pack`")
    command.add_argument(
        "--recipe", required=True, type=Path, help="JSON: {draft: LongSpecConfig, training: TrainingConfig}"
    )
    command.add_argument("--max-seconds", type=float, help="stop with a checkpoint after so long")
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=train)

    command = commands.add_parser("agreement", help="teacher-forced agreement of a draft on held-out text")
    command.add_argument("--target", required=True)
    command.add_argument("--draft", required=True)
    command.add_argument("--tokens", required=True, type=Path)
    command.add_argument("--length", type=int, default=8192)
    command.add_argument("--windows", type=int, default=16)
    command.set_defaults(run=agreement)

    options = parser.parse_args(arguments)
    options.run(options)


def pack_files(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    if options.separator not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no token {options.separator!r}")
    separator = tokenizer.convert_tokens_to_ids(options.separator)
    seen: set[bytes] = set()
    skipped: Counter[str] = Counter()
    parts = []
    for root in options.roots:
        files = find_files(root, options.suffix)
        kept = [file for file in files if not is_held_out(str(file.relative_to(root)), options.held_out)]
        skipped["held out"] += len(files) - len(kept)
        parts.append(pack(read_documents(root, kept, seen, skipped), tokenizer, separator, len(tokenizer)))
    packed = concatenate(parts)
    packed.save(options.out)
    print(json.dumps({"documents": len(packed.names), "tokens": len(packed.tokens), "skipped": dict(skipped)}))


def train(options: argparse.Namespace) -> None:
    recipe = json.loads(options.recipe.read_text())
    config = TrainingConfig.from_dict(recipe["training"] | _given(max_seconds=options.max_seconds))
    target = load_target(options.target)
    torch.manual_seed(config.seed)
    draft = LongSpecForCausalLM(LongSpecConfig.from_target(target.config, **recipe.get("draft", {})))
    tokens = concatenate([PackedTokens.load(folder) for folder in options.tokens]).tokens
    trainer = Trainer(target, draft, tokens, config, options.out)
    complete = trainer.train()
    draft.to(torch.bfloat16).save_pretrained(options.out / "draft")
    print(json.dumps({"complete": complete, "step": trainer.step, "steps": config.steps}))


def agreement(options: argparse.Namespace) -> None:
    target = load_target(options.target)
    draft = LongSpecForCausalLM.from_pretrained(options.draft, dtype=target.dtype).to(target.device)
    tokens = PackedTokens.load(options.tokens).tokens
    lags = range(1, max(1, len(draft.config.tree_shape)) + 1)
    for record in measure_agreement(target, draft, tokens, options.length, options.windows, lags):
        print(json.dumps(record))


def load_target(name: str) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
