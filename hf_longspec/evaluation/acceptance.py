"""How well a draft guesses, and how much faster it makes its target, by length of context.

Prompts end at evenly spaced places of a held-out text, the same ones for every context length, so that lengths are
compared on the same continuations. Knows tokens and runs; does not load models and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import side_by_side

SUFFIXES = (".py", ".txt", ".md", ".rst")


@dataclass(frozen=True)
class Bucket:
    """The prompts of one context length.

    accept_length: τ, tokens per round over all prompts; lowest, highest: the same of a single prompt.
    speed_up: median over prompts of decoding time without the draft over decoding time with it; with `equal`, `ties`
    and `different` texts only where plain `generate` was run too.
    """

    context: int
    prompts: int
    accept_length: float
    lowest: float
    highest: float
    draft_state_bytes: int
    plain_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    speed_up: float | None = None
    equal: int = 0
    ties: int = 0
    different: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_tokens(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokens (N,) of files and of the text files below folders, in the order of their paths.

    Raises `ValueError` if nothing is found.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    tokens: list[int] = []
    for file in files:
        if file.is_file() and (file in paths or file.suffix in SUFFIXES):
            tokens += tokenizer(file.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
    if not tokens:
        raise ValueError(f"expected files, or folders with {', '.join(SUFFIXES)} files, got {[str(p) for p in paths]}")
    return torch.tensor(tokens)


def places(tokens: Tensor, longest: int, count: int) -> list[int]:
    """`count` places in tokens (N,) with at least `longest` tokens before them; `ValueError` if N < longest."""
    if len(tokens) < longest:
        raise ValueError(f"expected a text of at least {longest} tokens, got {len(tokens)}")
    return torch.linspace(longest, len(tokens), count, dtype=torch.float64).long().tolist()


def measure(
    target: PreTrainedModel,
    draft: Any,
    tokens: Tensor,
    contexts: Sequence[int],
    prompts: int,
    *,
    compare: bool = False,
    **options: Any,
) -> Iterator[Bucket]:
    """One bucket per context length, as it is finished. `compare` runs plain `generate` too; `options` go to both."""
    ends = places(tokens, max(contexts), prompts)
    for context in contexts:
        speculative, plain, verdicts = [], [], []
        for end in ends:
            ids = tokens[end - context : end][None]
            inputs = {"input_ids": ids.to(target.device), "attention_mask": torch.ones_like(ids).to(target.device)}
            speculative.append(side_by_side.run(target, inputs, draft, **options))
            if compare:
                plain.append(side_by_side.run(target, inputs, None, **options))
                texts = plain[-1].tokens, speculative[-1].tokens
                verdicts.append(side_by_side.judge(target, inputs, *texts, sampled=options.get("do_sample", False)))
        lengths = [run.accept_length for run in speculative]
        rounds = [length for run in speculative for length in run.accept_lengths]
        bucket = {
            "context": context,
            "prompts": prompts,
            "accept_length": sum(rounds) / max(len(rounds), 1),
            "lowest": min(lengths),
            "highest": max(lengths),
            "draft_state_bytes": draft.state_bytes,
        }
        if compare:
            pairs = list(zip(plain, speculative, strict=True))
            bucket |= {
                "plain_tokens_per_second": median(run.tokens_per_second for run in plain),
                "tokens_per_second": median(run.tokens_per_second for run in speculative),
                "speed_up": median(ours.tokens_per_second / theirs.tokens_per_second for theirs, ours in pairs),
                "equal": sum(verdict.equal for verdict in verdicts),
                "ties": sum(not verdict.equal and verdict.tie for verdict in verdicts),
                "different": sum(not verdict.equal and not verdict.tie for verdict in verdicts),
            }
        yield Bucket(**bucket)
