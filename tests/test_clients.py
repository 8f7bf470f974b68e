"""Programs that call `generate` for their users, as docs/CLIENTS.md tells how to give them a draft."""

import functools
import subprocess
import sys

import pytest
import torch
from helpers import tiny_draft, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextStreamer, pipeline

from hf_longspec import LongSpecForCausalLM

TEXT = "b d f h"
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def draft(target):
    return tiny_draft(target, window=8)


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token."""
    words = {word: token for token, word in enumerate(["<pad>", *"bcdefghijklm"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", chat_template=template
    )


@pytest.fixture(scope="module")
def folders(target, draft, tokenizer, tmp_path_factory):
    """Folders of a target and of its draft; a draft's holds the target's tokenizer, as `pipeline` expects it."""
    folder = tmp_path_factory.mktemp("hub")
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The drafts that were asked to decode, one entry a call."""
    made, original = [], LongSpecForCausalLM.assisted_decoding

    def recorded(self, *args, **kwargs):
        made.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LongSpecForCausalLM, "assisted_decoding", recorded)
    return made


@pytest.mark.parametrize("given", ["object", "folder", "in the call"])
def test_pipeline(target, draft, tokenizer, folders, calls, given, capsys):
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assistant = str(folders / "draft") if given == "folder" else draft
    if given == "in the call":
        ours = functools.partial(plain, assistant_model=draft)
    else:
        ours = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=assistant)
    chat = [{"role": "user", "content": TEXT}]
    for count, prompt in enumerate((TEXT, chat, [TEXT, "c e g"]), start=1):
        expected = plain(prompt, **OPTIONS)
        assert calls == [] and ours(prompt, **OPTIONS) == expected
        assert len(calls) == max(1, count - 1)
        calls.clear()
    printed = []
    for pipe in (plain, ours):
        pipe(TEXT, streamer=TextStreamer(tokenizer), **OPTIONS)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and TEXT in printed[0]


def test_pipeline_in_batches(target, draft, tokenizer, calls):
    prompts = [TEXT, "c e g", "m", "b b d k l"]
    plain, ours = (
        pipeline("text-generation", model=target, tokenizer=tokenizer, batch_size=2, **assistant)
        for assistant in ({}, {"assistant_model": draft})
    )
    for sampling in ({}, {"do_sample": True, "num_return_sequences": 3}):
        texts = []
        for pipe in (plain, ours):
            torch.manual_seed(0)
            texts.append(pipe(prompts, **OPTIONS | sampling))
        assert texts[0] == texts[1]
    assert calls == [draft] * 4


def test_pipeline_from_folders_alone(folders):
    """In a fresh process: nothing but `import hf_longspec` makes drafts known."""
    code = f"""
import hf_longspec
from transformers import pipeline
options = dict(max_new_tokens=12, do_sample=False)
plain = pipeline("text-generation", model={str(folders / "target")!r})
ours = pipeline("text-generation", model={str(folders / "target")!r}, assistant_model={str(folders / "draft")!r})
assert type(ours.assistant_model) is hf_longspec.LongSpecForCausalLM
assert ours({TEXT!r}, **options) == plain({TEXT!r}, **options)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_client_that_takes_no_assistant(folders, draft, calls):
    """The recipe for TRL, `transformers serve` and other callers of `model.generate`."""
    target = AutoModelForCausalLM.from_pretrained(folders / "target")
    ids = torch.arange(2, 9)[None]
    plain = target.generate(ids, pad_token_id=0, **OPTIONS)
    target.generate = functools.partial(target.generate, assistant_model=draft)
    assert target.generate(ids, pad_token_id=0, **OPTIONS).tolist() == plain.tolist()
    assert calls == [draft]


@pytest.mark.parametrize("given, batch", [("gen_kwargs", 1), ("generate", 1), ("generate", 2)])
def test_lm_evaluation_harness(folders, tokenizer, draft, calls, given, batch):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    target = AutoModelForCausalLM.from_pretrained(folders / "target")

    def answers(**options):
        asked = {"until": ["m"], "max_gen_toks": 12} | options
        instances = [Instance("generate_until", {}, (text, dict(asked)), i) for i, text in enumerate(("b d", "c e g"))]
        return HFLM(pretrained=target, tokenizer=tokenizer, batch_size=batch).generate_until(
            instances, disable_tqdm=True
        )

    plain = answers()
    if given == "generate":
        target.generate = functools.partial(target.generate, assistant_model=draft)
    assert answers(**({"assistant_model": draft} if given == "gen_kwargs" else {})) == plain
    assert len(calls) == 2 // batch  # of copies, where the harness is given the draft itself: it copies its options


def test_langchain(target, tokenizer, draft, calls):
    langchain = pytest.importorskip("langchain_huggingface")
    plain, ours = (
        langchain.HuggingFacePipeline(
            pipeline=pipeline(
                "text-generation", model=target, tokenizer=tokenizer, return_full_text=False, **OPTIONS, **assistant
            )
        )
        for assistant in ({}, {"assistant_model": draft})
    )
    assert ours.invoke(TEXT) == plain.invoke(TEXT)
    assert "".join(ours.stream(TEXT)) == "".join(plain.stream(TEXT))
    assert ours.batch([TEXT, TEXT]) == plain.batch([TEXT, TEXT])
    assert set(calls) == {draft}
