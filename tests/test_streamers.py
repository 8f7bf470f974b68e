"""Streamers hear from a draft what they hear from plain `generate`, and are always told that it is over."""

import asyncio
import sys
import threading
from queue import Empty

import pytest
import torch
from helpers import tiny_draft, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AsyncTextIteratorStreamer,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

IDS = torch.tensor([[3, 7, 2, 9, 11]])
OPTIONS = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
SECONDS = 60  # how long an iterator waits before the test fails instead of hanging


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def draft(target):
    return tiny_draft(target, window=8, tree_shape=(4, 16, 16))


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token; 0 is special, so that it can be skipped, and some words end a line."""
    words = ["<pad>", *"bcdefghijkl", "m\n"]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", clean_up_tokenization_spaces=False)


class Recorder:
    """Everything a streamer is told, in order; raises when it is told the token at `fails_at`."""

    def __init__(self, fails_at=None):
        self.heard, self.fails_at = [], fails_at

    def put(self, value):
        if len(self.heard) == self.fails_at:
            raise OSError("the reader has gone")
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


def test_text_streamer_prints_the_same(target, draft, tokenizer, capsys):
    printed = []
    for assistant in ({}, {"assistant_model": draft}):
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        target.generate(IDS, streamer=streamer, **OPTIONS, **assistant)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0].split()) > 5


def pieces_in_a_thread(target, tokenizer, **assistant):
    streamer = TextIteratorStreamer(tokenizer, timeout=SECONDS)
    thread = threading.Thread(
        target=target.generate, args=(IDS,), kwargs={"streamer": streamer, **OPTIONS, **assistant}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    return pieces


def test_text_iterator_streamer_gives_the_same_pieces(target, draft, tokenizer):
    plain = pieces_in_a_thread(target, tokenizer)
    assert pieces_in_a_thread(target, tokenizer, assistant_model=draft) == plain
    assert len(plain) > 5


async def pieces_in_a_loop(target, tokenizer, **assistant):
    streamer = AsyncTextIteratorStreamer(tokenizer, timeout=SECONDS)
    call = asyncio.to_thread(target.generate, IDS, streamer=streamer, **OPTIONS, **assistant)
    task = asyncio.create_task(call)
    pieces = [piece async for piece in streamer]
    await task
    return pieces


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers' async streamer needs asyncio.timeout")
def test_async_text_iterator_streamer_gives_the_same_pieces(target, draft, tokenizer):
    plain = asyncio.run(pieces_in_a_loop(target, tokenizer))
    assert asyncio.run(pieces_in_a_loop(target, tokenizer, assistant_model=draft)) == plain
    assert len(plain) > 5


@pytest.mark.parametrize("options", [{"max_new_tokens": 1}, {}, {"eos_token_id": list(range(13))}], ids=str)
def test_prompt_tokens_and_one_end_in_the_same_order(target, draft, options):
    heard = []
    for assistant in ({}, {"assistant_model": draft}):
        recorder = Recorder()
        target.generate(IDS, streamer=recorder, **(OPTIONS | options), **assistant)
        heard.append(recorder.heard)
    assert heard[0] == heard[1] and heard[1].count("end") == 1


class FailingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 12:
            raise RuntimeError("no such grammar")
        return scores


class FailingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == 12:
            raise KeyboardInterrupt("enough")
        return torch.zeros(1, dtype=torch.bool)


FAILURES = {
    "processor": ({"logits_processor": [FailingProcessor()]}, RuntimeError, "no such grammar"),
    "criterion": ({"stopping_criteria": [FailingCriterion()]}, KeyboardInterrupt, "enough"),
    "streamer": ({"fails_at": 8}, OSError, "the reader has gone"),
    "streamer, first token": ({"fails_at": 1}, OSError, "the reader has gone"),
    "refused option": ({"num_beams": 1, "dola_layers": "high"}, ValueError, "dola_layers"),
    "refused input": ({"use_cache": False, "prefill_chunk_size": 4}, ValueError, "use_cache=False"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_call_that_raises_ends_its_streamer_once(target, draft, case):
    options, error, message = FAILURES[case]
    options = OPTIONS | options
    recorder = Recorder(options.pop("fails_at", None))
    with pytest.raises(error, match=message):
        target.generate(IDS, assistant_model=draft, streamer=recorder, **options)
    assert recorder.heard.count("end") == 1 and recorder.heard[-1] == "end"


def test_a_draft_that_does_not_fit_ends_its_streamer(target):
    recorder = Recorder()
    with pytest.raises(ValueError, match="hidden_size: draft has 64, target has 32"):
        target.generate(IDS, assistant_model=tiny_draft(tiny_target("llama", hidden_size=64)), streamer=recorder)
    assert recorder.heard == ["end"]


def test_an_iterator_gets_the_text_up_to_the_error_and_stops(target, draft, tokenizer):
    """Plain `generate` leaves such a reader waiting for ever."""
    read = {}
    for name, assistant in (("plain", {}), ("ours", {"assistant_model": draft})):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0.1)
        with pytest.raises(RuntimeError, match="no such grammar"):
            target.generate(IDS, streamer=streamer, logits_processor=[FailingProcessor()], **OPTIONS, **assistant)
        read[name] = ""
        try:
            for piece in streamer:
                read[name] += piece
        except Empty:
            read[name] += " and so on"
    assert read["plain"].endswith(" and so on") and len(read["ours"].split()) == 7
