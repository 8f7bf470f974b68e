"""Whether the texts of a batch are those that plain `generate` writes, and where not, whether rounding explains it.

Where two texts part, the same random numbers have picked another token. That is a tie if plain `generate` picks the
other token too as soon as its logits move by rounding noise. Knows `generate`, no draft.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..evaluation import side_by_side
from .sampling import prepared

TRIES = 60  # random changes of the logits, to see whether rounding noise explains another pick
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
    by_argmax = Picking(*prepared(target, inputs, options)).by_argmax
    logits = plain_logits(target, inputs, seed, **options)
    verdicts = []
    for row, (ids, mask, *pair) in enumerate(zip(*inputs.values(), *texts, strict=True)):
        alone = {"input_ids": ids[mask.bool()][None]}
        verdict = side_by_side.judge(target, alone, *pair, plain_logits=logits[row])
        if verdict.position is None:
            verdicts.append(EQUAL)
            continue
        tie, step = verdict.tie, verdict.position
        if verdict.noise is not None and not by_argmax:  # the gap of the logits alone does not decide
            place = plain[row, : prompt + step], logits[row, step], draws(logits[:, step], step, seed)[row]
            tokens = pair[0][step], pair[1][step]
            tie = Picking.of_row(target, ids, mask, options).is_tie(*place, tokens, verdict.noise)
        verdicts.append(TIE if tie else DIFFERENT)
    return verdicts


class Picking(NamedTuple):
    """How plain `generate` picks the next tokens of a batch: a call's config and logits processors."""

    config: GenerationConfig
    processors: LogitsProcessorList

    @classmethod
    def of_row(cls, target: PreTrainedModel, ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Picking:
        """Return the picking for all of `nudged` as one batch, behind a prompt (L,) of another batch."""
        rows = {"input_ids": ids.expand(TRIES + 4, -1), "attention_mask": mask.expand(TRIES + 4, -1)}
        return cls(*prepared(target, rows, options))

    @property
    def by_argmax(self) -> bool:
        return not self.config.do_sample and len(self.processors) == 0

    def picks(self, texts: Tensor, logits: Tensor, draws: Tensor) -> Tensor:
        """Return the token of each row: texts (R, L) before it, with prompts; logits and random numbers (R, vocab)."""
        scores = self.processors(texts, logits.clone())
        return (scores.softmax(dim=-1) / draws if self.config.do_sample else scores).argmax(dim=-1)

    def is_tie(self, text: Tensor, logits: Tensor, draws: Tensor, pair: tuple[int, int], noise: float) -> bool:
        """Tell whether noise in the logits can make the second token of `pair` the pick instead of the first.

        text: (L,) before it, with its prompt; logits and random numbers: (vocab,). noise: of the gap between two
        logits. With noise in both texts, the gap may move by twice as much.
        """
        moved = nudged(logits, *pair, noise)
        found = self.picks(text.expand(len(moved), -1), moved, draws.expand_as(moved))
        return bool((found == pair[1]).any())


def draws(logits: Tensor, step: int, seed: int) -> Tensor:
    """Return the random numbers (B, vocab) behind the picks of a step under a seed; logits (B, vocab) of any step.

    `torch.multinomial(p, 1)` is argmax(p / q) with q ~ Exp(1), of the shape of p.
    """
    torch.manual_seed(seed)
    for _ in range(step + 1):
        draw = torch.empty_like(logits).exponential_()
    return draw


def nudged(logits: Tensor, plain: int, ours: int, noise: float) -> Tensor:
    """Return logits (vocab,) changed in `TRIES` + 4 ways (ways, vocab) that move no gap by more than twice the noise.

    First all logits move at random. In the last four ways the token `ours` rises or the token `plain` falls: alone,
    past its neighbours, as a top-k cut heeds; or with all that are no better, as a top-p cut heeds.
    """
    chance = torch.Generator(logits.device).manual_seed(0)
    ways = [logits + noise * (2 * torch.rand(TRIES, len(logits), device=logits.device, generator=chance) - 1)]
    tokens = torch.arange(len(logits), device=logits.device)
    for token, change in ((ours, 2 * noise), (plain, -2 * noise)):
        for chosen in (tokens == token, logits <= logits[token]):
            ways.append(torch.where(chosen, logits + change, logits)[None])
    return torch.cat(ways)


def plain_logits(target: PreTrainedModel, inputs: dict[str, Tensor], seed: int, **options: Any) -> Tensor:
    """Return the logits (B, new tokens, vocab), in float32, of plain `generate` on this batch."""
    torch.manual_seed(seed)
    output = target.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits, dim=1)
