"""`hf-longspec bench text`: the padded prompts, the engines, and what is counted."""

import gc
import json

import pytest
import torch
from helpers import tiny_draft, tiny_target
from transformers import StaticCache

from hf_longspec.benchmark import tables, text
from hf_longspec.benchmark.engines import engines_for


def test_prompts_of_a_batch_are_padded_on_the_left():
    inputs = text.padded_prompts(torch.arange(100, 200), [8, 54, 100], context=8, pad=7)
    assert inputs["input_ids"].tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 107],
        [146, 147, 148, 149, 150, 151, 152, 153],
        [7, 193, 194, 195, 196, 197, 198, 199],
    ]
    assert inputs["attention_mask"].tolist() == [[1] * 8, [1] * 8, [0] + [1] * 7]


def test_a_text_that_is_too_short():
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="at least 101 tokens, got 100"):
        text.measure(target, tiny_draft(target), torch.arange(100) % 13, 101, 2, max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_counted(dtype):
    target = tiny_target("llama").to(dtype)
    draft = tiny_draft(target, window=8, tree_shape=(13, 40), profile=True)
    tokens = torch.randint(2, 13, (200,))
    result = text.measure(target, draft, tokens, 20, 2, max_new_tokens=12, batches=2, repeats=1)
    assert [engine.name for engine in result.engines] == [
        "generate",
        "static cache",
        "LongSpec, no guesses",
        "LongSpec",
    ]
    assert (result.prompts, draft.config.tree_shape) == (4, (13, 40)) and result.sampling == {"do_sample": False}
    idle, ours = result.engines[2:]
    for engine in (idle, ours):
        assert engine.equal + engine.ties == 4 and engine.different == 0
        assert engine.equal == 4 or dtype == torch.bfloat16
        assert set(engine.phases) == {"prefill", "grow", "verify", "accept", "commit"}
    assert idle.accept_length == 1 and 1.2 <= ours.accept_length <= 3
    assert all(engine.seconds > 0 and engine.prefill_seconds > 0 for engine in result.engines)
    json.loads(json.dumps(result.as_dict()))
    assert tables.text_table([result]).row_count == 4 and tables.phases_table([result]).row_count == 2


def test_no_garbage_is_looked_for_while_the_clock_runs(monkeypatch):
    target, seen = tiny_target("llama"), []

    def generate(**options):
        seen.append(gc.isenabled())
        raise ValueError

    monkeypatch.setattr(target, "generate", generate)
    with pytest.raises(ValueError):
        text.timed(target, [{}], {})
    assert seen == [False] and gc.isenabled()


def test_rates_are_of_decoding_alone():
    """4 prompts of 11 tokens each: the prefill writes 1, so 40 are decoded, the fastest stock engine in 2 seconds."""
    stock = [text.Written("generate", True, 9.0, 1.0), text.Written("lookup", True, 6.0, 4.0)]
    engines = [*stock, text.Written("ours", False, 5.5, 5.0)]
    sampling = {"do_sample": False}
    result = text.Comparison(batch=2, context=8, prompts=4, new_tokens=11, sampling=sampling, engines=engines)
    rows = {row["name"]: row for row in result.as_dict()["engines"]}
    assert result.as_dict()["fastest_stock"] == "lookup"
    assert [row["decoded_per_second"] for row in rows.values()] == [5.0, 20.0, 80.0]
    assert [row["speed_up"] for row in rows.values()] == [1.0, 4.0, 16.0]
    assert [row["over_fastest_stock"] for row in rows.values()] == [0.25, 1.0, 4.0]
    assert rows["ours"]["tokens_per_second"] == 8.0


def test_stock_assistants_write_single_prompts():
    target = tiny_target("llama")
    draft, assistant = tiny_draft(target, tree_shape=(2,)), tiny_target("llama", num_hidden_layers=1)
    names = [engine.name for engine in engines_for(target, draft, 1, assistant, 15)]
    cropped = hasattr(StaticCache(target.config, 15).layers[0], "crop")  # since transformers 5.24
    assert names[2:-2] == [
        *(["prompt lookup", "prompt lookup, static cache"] if cropped else ["prompt lookup"]),
        *(["assistant", "assistant, static cache"] if cropped else ["assistant"]),
    ]
    of_two = [engine.name for engine in engines_for(target, draft, 2, assistant, 15)]
    assert of_two == ["generate", "static cache", "LongSpec, no guesses", "LongSpec"]
    tokens = torch.randint(2, 13, (99,))
    result = text.measure(target, draft, tokens, 9, 1, max_new_tokens=6, repeats=1, assistant=assistant)
    assert [engine.name for engine in result.engines] == names
    assert [engine.equal for engine in result.engines if not engine.stock] == [1, 1]


def test_prompt_lookup_has_room_behind_a_static_cache():
    """A text that repeats itself, so that guesses reach past its end; all stock engines write the same."""
    target, tokens = tiny_target("llama"), torch.randint(2, 13, (10,)).repeat(4)
    prompt = text.padded_prompts(tokens, [40], 40, 0)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 30}
    engines = engines_for(target, tiny_draft(target), 1, tiny_target("llama", num_hidden_layers=1), 70)
    texts = [text.write(target, prompt, 0, **options, **engine.options).tolist() for engine in engines]
    assert all(written == texts[0] for written in texts)


def test_a_window_cannot_be_cropped_in_a_static_cache():
    target = tiny_target("mistral")  # a window of 6
    names = [engine.name for engine in engines_for(target, tiny_draft(target), 1, None, 15)]
    assert "static cache" in names and "prompt lookup, static cache" not in names


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 9},
        {"do_sample": True, "repetition_penalty": 1.1},
        {},
    ],
    ids=str,
)
def test_sampled_texts_are_those_of_the_same_seeds(sampling):
    target = tiny_target("llama")
    target.generation_config.update(do_sample=True, temperature=1.5, top_k=11)
    draft = tiny_draft(target, tree_shape=(13, 40))
    tokens = torch.randint(2, 13, (200,))
    result = text.measure(target, draft, tokens, 20, 2, max_new_tokens=12, batches=2, repeats=1, sampling=sampling)
    assert [(engine.equal, engine.different) for engine in result.engines[2:]] == [(4, 0), (4, 0)]
    assert result.sampling == {"do_sample": True, "temperature": 1.5, "top_k": 11} | sampling
    assert result.engines[-1].accept_length > 1


def test_an_engine_leaves_target_and_draft_as_they_were():
    target = tiny_target("llama")
    draft = tiny_draft(target, tree_shape=(2, 3))
    own = target.config._attn_implementation
    *_, idle, ours = engines_for(target, draft, 1, None, 15)
    assert ours.options["assistant_model"] is draft and draft.config.tree_shape == (2, 3)
    assert idle.options["assistant_model"].config.tree_shape == ()
    with pytest.raises(KeyError, match="any"), ours._replace(attention="eager").chosen(target):
        assert target.config._attn_implementation == "eager" != own
        raise KeyError("any")
    assert target.config._attn_implementation == own


def test_a_row_that_differs_is_told():
    """A draft whose texts are changed behind its back."""
    target = tiny_target("llama")
    draft = tiny_draft(target, tree_shape=(2,))
    honest = draft.assisted_decoding

    def lying(*args, **kwargs):
        output = honest(*args, **kwargs)
        texts = getattr(output, "sequences", output)
        texts[1, -1] = (texts[1, -1] + 1) % 13
        return output

    draft.assisted_decoding = lying
    result = text.measure(target, draft, torch.randint(2, 13, (99,)), 9, 3, max_new_tokens=6, repeats=1)
    ours = result.engines[-1]
    assert (ours.equal, ours.ties, ours.different) == (2, 0, 1)
