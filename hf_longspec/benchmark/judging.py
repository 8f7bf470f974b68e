"""Whether the texts of a batch are those that plain `generate` writes, and where not, whether rounding explains it.

Where two texts part, the same random numbers have picked another token. That is a tie if plain `generate` picks the
other token too as soon as its logits move by rounding noise. Knows `generate`, no draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..evaluation import side_by_side
from .sampling import prepared

EQUAL, TIE, DIFFERENT = "equal", "tie", "different"


def judged(
    target: PreTrainedModel, inputs: dict[str, Tensor], plain: Tensor, ours: Tensor, options: dict[str, Any], seed: int
) -> list[str]:
    """Judge each row of two batches of sequences (B, L): `EQUAL`, `TIE` or `DIFFERENT`.

    plain: what plain `generate` wrote with `options` and `seed`, all rows to the same length. In float32 nothing is a
    tie.
    """
    prompt = inputs["input_ids"].shape[1]
    texts = plain[:, prompt:].tolist(), ours[:, prompt:].tolist()
    if texts[0] == texts[1]:
        return [EQUAL] * len(plain)
    picking = Picking(*prepared(target, inputs, options), seed)
    logits = plain_logits(target, inputs, seed, **options)
    verdicts = []
    for row, (ids, mask, *pair) in enumerate(zip(*inputs.values(), *texts, strict=True)):
        alone = {"input_ids": ids[mask.bool()][None]}
        verdict = side_by_side.judge(target, alone, *pair, plain_logits=logits[row])
        if verdict.position is None:
            verdicts.append(EQUAL)
            continue
        tie, step = verdict.tie, verdict.position
        if verdict.noise is not None and not picking.by_argmax:  # the gap of the logits alone does not decide
            before = plain[:, : prompt + step], logits[:, step], step
            tie = picking.is_tie(*before, row, (pair[0][step], pair[1][step]), verdict.noise)
        verdicts.append(TIE if tie else DIFFERENT)
    return verdicts


class Picking:
    """How plain `generate` picks the next tokens of a batch."""

    def __init__(self, config: GenerationConfig, processors: LogitsProcessorList, seed: int):
        """Take a call's config and logits processors; seed: set before the call."""
        self.do_sample, self.processors, self.seed = config.do_sample, processors, seed

    @property
    def by_argmax(self) -> bool:
        return not self.do_sample and len(self.processors) == 0

    def picks(self, texts: Tensor, logits: Tensor, step: int) -> Tensor:
        """Return the tokens (B,) picked at a step: texts (B, L) before it, with prompts; logits (B, vocab) there."""
        scores = self.processors(texts, logits.clone())
        if not self.do_sample:
            return scores.argmax(dim=-1)
        torch.manual_seed(self.seed)
        for _ in range(step):  # each draw takes as many random numbers as the draw of that step took
            torch.multinomial(torch.ones_like(scores), 1)
        return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]

    def is_tie(self, texts: Tensor, logits: Tensor, step: int, row: int, pair: tuple[int, int], noise: float) -> bool:
        """Tell whether noise in the logits of a row makes the second token of `pair` the pick instead of the first.

        noise: of the gap between two logits. With noise in both texts, the gap may move by twice as much.
        """
        for moved in nudged(logits[row], *pair, 2 * noise):
            other = logits.clone()
            other[row] = moved
            if int(self.picks(texts, other, step)[row]) == pair[1]:
                return True
        return False


def nudged(logits: Tensor, plain: int, ours: int, by: float) -> Iterator[Tensor]:
    """Yield logits (vocab,) changed in favour of the token `ours` and to the debit of the token `plain`.

    Either `ours` rises or `plain` falls: alone, which moves it past its neighbours, as a top-k cut heeds; or with all
    that are no better, which moves the share of them all, as a top-p cut heeds.
    """
    tokens = torch.arange(len(logits), device=logits.device)
    for token, change in ((ours, by), (plain, -by)):
        for chosen in (tokens == token, logits <= logits[token]):
            yield torch.where(chosen, logits + change, logits)


def plain_logits(target: PreTrainedModel, inputs: dict[str, Tensor], seed: int, **options: Any) -> Tensor:
    """Return the logits (B, new tokens, vocab), in float32, of plain `generate` on this batch."""
    torch.manual_seed(seed)
    output = target.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits, dim=1)
