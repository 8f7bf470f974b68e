"""Records: what a call returns besides its text, shaped as plain `generate` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput


@dataclass
class LongSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and besides:

    accept_lengths: for each row, the number of tokens each round emitted; the prefill's own token is in none of them.
    phase_seconds: the seconds of prefill, and of each round's grow, verify, accept and commit, one list a phase, if
        `draft.config.profile` is set.
    """

    accept_lengths: list[list[int]] | None = None
    phase_seconds: dict[str, list[float]] | None = None


class Steps:
    """Tensors, one for each step, whose dimension `dim` is that of the rows, and which are filled row by row.

    `values` is what plain `generate` collects.
    """

    def __init__(self, batch: int, dim: int = 0):
        self.batch, self.dim = batch, dim
        self.values: tuple[Tensor, ...] = ()

    def put(self, rows: list[int], steps: list[int], values: Tensor) -> None:
        """values: of R `rows`, each at its step."""
        if len(rows) == self.batch and set(steps) == {len(self.values)}:
            self.values += (values,)
            return
        while len(self.values) <= max(steps):
            shape = list(values.shape)
            shape[self.dim] = self.batch
            self.values += (values.new_zeros(shape),)
        for row, step, value in zip(rows, steps, values.unbind(self.dim), strict=True):
            self.values[step].select(self.dim, row).copy_(value)


class Records:
    """Scores, logits and hidden states of each step, as far as they are asked for: None where they are not."""

    def __init__(self, batch: int, generation_config: GenerationConfig):
        self.batch = batch
        asked = generation_config.return_dict_in_generate
        self.scores = Steps(batch) if asked and generation_config.output_scores else None
        self.logits = Steps(batch) if asked and generation_config.output_logits else None
        self.hidden_states: list[Steps] | None = [] if asked and generation_config.output_hidden_states else None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return self.scores is None and self.logits is None and self.hidden_states is None

    def put_hidden_states(self, rows: list[int], steps: list[int], layers: tuple[Tensor, ...]) -> None:
        """layers: (…, R, length, hidden) of each layer; the length is 1, but for what is read at once."""
        if self.hidden_states is not None:
            self.hidden_states = self.hidden_states or [Steps(self.batch, dim=-3) for _ in layers]
            for record, states in zip(self.hidden_states, layers, strict=True):
                record.put(rows, steps, states)

    def as_dict(self) -> dict[str, Any]:
        layers = None if self.hidden_states is None else [record.values for record in self.hidden_states]
        return {
            "scores": None if self.scores is None else self.scores.values,
            "logits": None if self.logits is None else self.logits.values,
            "hidden_states": None if layers is None else tuple(zip(*layers, strict=True)),
        }
