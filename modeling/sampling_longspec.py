"""Sampling: how the target's next token is picked from its logits, exactly as plain `generate` picks it.

Which way fits depends on the logits processors, and is decided once a call. Knows logits and texts, no models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Processors of transformers that look at the logits alone, and those that look at one row's ids and no other's.
_WITHOUT_HISTORY = {
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}
_BY_ROW = _WITHOUT_HISTORY | {
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
}
IMPOSSIBLE = -1  # no token: what is picked from scores that are no distribution
# Elements. The logits of a whole batch of trees in float32 are processed at once up to here (256 MB).
LARGEST_TREE_LOGITS = 2**26


def are_without_history(processors: list) -> bool:
    return all(is_of(processor, "logits_process", _WITHOUT_HISTORY) for processor in processors)


def are_by_row(processors: list) -> bool:
    """Whether the processors treat each row of a batch by itself and keep nothing between calls; unknown: no."""
    return all(
        is_of(processor, "logits_process", _BY_ROW)
        # given as a tensor, one length a row
        and not isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)
        for processor in processors
    )


def are_criteria_by_row(criteria: list) -> bool:
    """The same for stopping criteria."""
    known = {"EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria"}
    return all(is_of(criterion, "stopping_criteria", known) for criterion in criteria)


def pays_by_tree(device: torch.device, elements: int) -> bool:
    """Whether to process the logits of all nodes, so many `elements`, rather than those of the path.

    A CPU pays for every node; elsewhere a round trip to the host for every token of the path is dearer.
    """
    return device.type != "cpu" and elements <= LARGEST_TREE_LOGITS


def is_of(instance: Any, module: str, names: set[str]) -> bool:
    # the very class: a subclass may keep a state
    kind = type(instance)
    return kind.__module__ == f"transformers.generation.{module}" and kind.__name__ in names


class Noise:
    """The random numbers of `torch.multinomial`, one draw of (B, vocab) for each step of plain `generate`.

    `multinomial(p, 1)` is argmax(p / q) with q ~ Exp(1), of the shape of p. Rows of different lengths, and nodes of
    one tree, need the draws of different steps: each is drawn in order, when the first row needs it.
    """

    def __init__(self, batch: int, device: torch.device):
        self.batch, self.device = batch, device
        self.first = 0  # the step of the earliest draw still held
        self.draws: list[Tensor] = []
        self.states: list[Tensor] = []  # of the generator, before each draw

    def at(self, rows: list[int], steps: list[int], vocab: int) -> Tensor:
        """(R, vocab): what `rows` need at their `steps`."""
        self._draw_until(max(steps), vocab)
        return torch.stack([self.draws[step - self.first][row] for row, step in zip(rows, steps, strict=True)])

    def ahead(self, steps: list[int], count: int, vocab: int) -> Tensor:
        """(B, count, vocab): what each row needs from its step on."""
        self._draw_until(max(max(steps), self.first) + count - 1, vocab)
        rows = [
            torch.stack([draw[row] for draw in self.draws[index : index + count]])
            for row, index in enumerate(max(step - self.first, 0) for step in steps)  # a row that rests needs none
        ]
        return torch.stack(rows)

    def _draw_until(self, step: int, vocab: int) -> None:
        while self.first + len(self.draws) <= step:
            self.states.append(_generator_state(self.device))
            self.draws.append(torch.empty(self.batch, vocab, device=self.device).exponential_(1))

    def forget(self, step: int) -> None:
        """Drop the draws before `step`: no row needs them any more."""
        del self.draws[: step - self.first], self.states[: step - self.first]
        self.first = max(self.first, step)

    def rewind(self, step: int) -> None:
        """Leave the generator as plain `generate` would after `step` steps: unused draws are undone."""
        if step < self.first + len(self.draws):
            state = self.states[step - self.first]
            torch.cuda.set_rng_state(state, self.device) if self.device.type == "cuda" else torch.set_rng_state(state)


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class Picks(NamedTuple):
    """tokens (…) picked from scores (…, vocab); `IMPOSSIBLE` where the scores are no distribution."""

    tokens: Tensor
    scores: Tensor


class Sampler:
    """Picks the next token from logits: `pick` for some rows, `pick_tree` for all nodes at once."""

    def __init__(self, processors: Any, do_sample: bool, noise: Noise | None):
        """noise: None if all rows are always at the same step, as in plain `generate`, and only `pick` is asked."""
        self.processors, self.do_sample, self.noise = processors, do_sample, noise

    def pick(self, ids: Callable[[list[int]], Tensor], rows: list[int], steps: list[int], logits: Tensor) -> Picks:
        """logits: (R, vocab) float32 of `rows`, each at its step; ids(rows): (R, L) of rows of one length."""
        if len(set(steps)) == 1:
            scores = self.processors(ids(rows), logits)
        else:
            scores = torch.cat([self.processors(ids([row]), logits[i : i + 1]) for i, row in enumerate(rows)])
        if not self.do_sample:
            return Picks(scores.argmax(dim=-1), scores)
        probabilities = scores.softmax(dim=-1)
        if self.noise is None:
            return Picks(torch.multinomial(probabilities, num_samples=1).squeeze(1), scores)
        return Picks(_largest(probabilities, self.noise.at(rows, steps, logits.shape[-1])), scores)

    def pick_tree(self, ids: Tensor, steps: list[int], logits: Tensor, depths: Tensor, levels: int) -> Picks:
        """logits: (B, T, vocab) of nodes at depths (B, T) up to `levels`; steps: the one that each row's root is at.

        For processors without history only. ids: (1, L), of no use to them.
        """
        flat = logits.float().flatten(0, 1)
        scores = self.processors(ids.expand(len(flat), -1), flat).view(logits.shape)
        if not self.do_sample:
            return Picks(scores.argmax(dim=-1), scores)
        probabilities = scores.softmax(dim=-1)
        assert self.noise is not None, "nodes of one tree need the noise of different steps"
        ahead = self.noise.ahead(steps, levels + 1, logits.shape[-1])
        noise = ahead[torch.arange(len(steps), device=depths.device)[:, None], depths]
        return Picks(_largest(probabilities, noise), scores)


def _largest(probabilities: Tensor, noise: Tensor) -> Tensor:
    """What `multinomial` draws from probabilities (…, vocab) with that noise; see `Noise`."""
    possible = probabilities.sum(dim=-1).isfinite()
    return (probabilities / noise).argmax(dim=-1).masked_fill(~possible, IMPOSSIBLE)
