"""What users pass to `generate`: streamers, processors and criteria that note what they are told, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from helpers import VOCAB
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, distributed
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria, TextStreamer
from transformers.generation import stopping_criteria
from transformers.generation.streamers import BaseStreamer

PIECES = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e", "f", "ab", "bc", "de", "ba"]
END = PIECES.index("</s>")
MERGES = [("a", "b"), ("b", "c"), ("d", "e"), ("b", "a")]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of thirteen tokens of one and two characters, so that a text has several spellings."""
    assert len(PIECES) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=MERGES))
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


class Streamed(BaseStreamer):
    """A streamer that notes the tokens it is given, and the end."""

    def __init__(self, log: list):
        self.log = log

    def put(self, value: Tensor) -> None:
        self.log.append(["streamed", value.clone()])

    def end(self) -> None:
        self.log.append(["end"])


class Stops(BaseStreamer):
    """A streamer that raises at its `at`-th token."""

    def __init__(self, at: int):
        self.at = at

    def put(self, value: Tensor) -> None:
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt("stop")

    def end(self) -> None:
        pass


class Written(TextStreamer):
    """A `TextStreamer` that writes into the log."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, log: list):
        super().__init__(tokenizer)
        self.log = log

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.log.append(["written", text, stream_end])


class Counting(LogitsProcessor):
    """A processor with state: scores depend on how often it was called, and on the text."""

    def __init__(self, log: list):
        self.log, self.calls = log, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(["processed", input_ids.clone(), scores.clone()])
        return scores - (self.calls % 3) * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])


class Machine(LogitsProcessor):
    """A grammar: allows `state + 1 … state + 6`, where the state is the last token it was shown, row by row.

    Like the processors of grammar libraries it takes over one token a call and writes into the scores it is given.
    """

    def __init__(self, log: list):
        self.log, self.length = log, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self.length in (None, input_ids.shape[1] - 1), "expected one call for each token, in order"
        self.length = input_ids.shape[1]
        steps = (torch.arange(scores.shape[1]) - input_ids[:, -1:]) % scores.shape[1]
        return scores.masked_fill_((steps < 1) | (steps > 6), -torch.inf)


class Noisy(LogitsProcessor):
    """A processor that draws from the random generator, as some samplers do."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.rand(scores.shape)


class AfterTokens(StoppingCriteria):
    """A criterion that stops each row at its own time: at `count` tokens of at least `least`, counted from `start`."""

    def __init__(self, log: list, start: int, least: int = 7, count: int = 7):
        self.log, self.start, self.least, self.count = log, start, least, count

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        done = (input_ids[:, self.start :] >= self.least).sum(dim=1) >= self.count
        self.log.append(["asked", input_ids.clone(), done])
        return done


class WhenSure(StoppingCriteria):
    """A criterion that stops a row whose newest token had a high score; needs `output_scores`."""

    def __init__(self, log: list, least: float):
        self.log, self.least = log, least

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **kwargs: object) -> Tensor:
        best = scores[-1].max(dim=-1).values
        self.log.append(["asked", len(scores), best])
        return best > self.least


class Interrupting(StoppingCriteria):
    """A user who presses a key when the text has `length` tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if input_ids.shape[1] == self.length:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def ticking() -> Iterator[None]:
    """Let `max_time` see the clock a second later at every look, within the context."""
    seconds = iter(range(10_000))
    with mock.patch.object(stopping_criteria, "time", SimpleNamespace(time=lambda: next(seconds))):
        yield


@contextmanager
def process_group() -> Iterator[None]:
    """Run a job of one process, as `synced_gpus` needs it, within the context."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
