"""A call before its first token: what only a forward tells of a target is told by a probe that leaves no trace."""

import functools
import threading

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from pairs import assert_same
from texts import prompt_of
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

OPTIONS = {"max_new_tokens": 9, "pad_token_id": 0}


class Heard(BaseStreamer, StoppingCriteria):
    """Notes what a call tells its streamer and its criteria."""

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.told.append("end")

    def __call__(self, input_ids, scores, **kwargs):
        self.told.append("asked")
        return torch.zeros(len(input_ids), dtype=torch.bool)


MISFITS = {
    "diffllama": ({}, "attends once a layer to the keys and values it caches, got DiffLlama"),
    "jetmoe": ({}, "attends once a layer to the keys and values it caches, got JetMoeAttention"),
    "mimo_v2_flash": ({"v_head_dim": 8, "head_dim": 16}, r"cached keys and values of \(heads, dimension\) \(2, 16\)"),
    "gpt2": (
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
        r"cached keys and values of \(heads, dimension\) \(2, 16\), got \(4, 8\) and \(4, 8\)",
    ),
}


@pytest.mark.parametrize("family", MISFITS)
def test_what_only_a_forward_tells_is_refused_before_anything_is_done(family):
    fields, message = MISFITS[family]
    target = tiny_target(family, **fields)
    cache, heard = DynamicCache(), Heard()
    with torch.no_grad():
        target(prompt_of(9)[:, :4], use_cache=True, **{CACHE: cache})
    before = [layer.keys.clone() for layer in cache.layers]
    told, noise = state_of(target), torch.get_rng_state()
    options = OPTIONS | {CACHE: cache, "streamer": heard, "stopping_criteria": [heard], "do_sample": True}
    for _ in range(2):  # a target that was refused is not taken for one that was found good
        with pytest.raises(ValueError, match=message):
            target.generate(prompt_of(9), assistant_model=tiny_draft(target), **options)
    assert heard.told == ["end", "end"]
    assert [layer.keys.tolist() for layer in cache.layers] == [keys.tolist() for keys in before]
    assert state_of(target) == told and torch.equal(torch.get_rng_state(), noise)


def state_of(target):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules()]
    return target.config.to_dict(), target.config._attn_implementation, hooks, sorted(vars(target))


def forwards(target):
    """Count the forwards of a target in a list, without a hook."""
    counted, forward = [], target.model.forward

    @functools.wraps(forward)
    def counting(*args, **kwargs):
        counted.append(None)
        return forward(*args, **kwargs)

    target.model.forward = counting
    return counted


def test_a_target_is_probed_once():
    target = tiny_target("llama")
    draft, counted, rounds = tiny_draft(target), forwards(target), []
    for _ in range(3):
        counted.clear()
        torch.manual_seed(3)
        out = target.generate(
            prompt_of(9), assistant_model=draft, do_sample=True, return_dict_in_generate=True, **OPTIONS
        )
        rounds.append(len(counted) - 1 - len(out.accept_lengths[0]))
    assert rounds == [2, 0, 0]
    target.model.norm.register_forward_hook(lambda module, inputs, output: None)
    for expected in (3, 0):
        counted.clear()
        out = target.generate(prompt_of(9), assistant_model=draft, return_dict_in_generate=True, **OPTIONS)
        assert len(counted) - 1 - len(out.accept_lengths[0]) == expected


# --- what a step sees beyond its inputs ------------------------------------------------------------------------------


class Restarting(LlamaForCausalLM):
    """Gives every token its own idea of a position."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs | {"position_ids": inputs["position_ids"] % 5}


class Counting(LlamaForCausalLM):
    """Adds what depends on the number of the step."""

    def forward(self, *args, step=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits if step is None else outputs.logits.roll(step, dims=-1)
        return outputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        step = model_kwargs.pop("step", None) or 0
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs) | {"step": step + 1}


class Growing(LlamaForCausalLM):
    """Lets an argument of the user grow with the text."""

    def forward(self, *args, marks=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits if marks is None else outputs.logits.roll(int(marks.sum()), dims=-1)
        return outputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        if (marks := model_kwargs.get("marks")) is not None:
            model_kwargs["marks"] = torch.cat([marks, marks[:, -1:]], dim=1)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


class Rewritten(LlamaForCausalLM):
    """Prepares its inputs in its own words, as code on the Hub does, and passes one thing more to each step."""

    def forward(self, *args, scale=1.0, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * scale
        return outputs

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, use_cache=True, **kwargs):
        past = kwargs[CACHE]
        ids = (
            input_ids[:, past.get_seq_length() :] if past.get_seq_length() < input_ids.shape[1] else input_ids[:, -1:]
        )
        first = past.get_seq_length()
        positions = torch.arange(first, first + ids.shape[1])[None]
        inputs = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "use_cache": use_cache,
        }
        return inputs | {CACHE: past, "scale": 0.5}


def of_class(kind):
    llama = tiny_target("llama")
    target = kind(llama.config).eval()
    target.load_state_dict(llama.state_dict())
    return target


@pytest.mark.parametrize(
    "kind, name", [(Restarting, "position_ids"), (Counting, "step")], ids=["positions", "counter"]
)
def test_inputs_made_anew_each_step_are_refused_by_name(kind, name):
    target, heard = of_class(kind), Heard()
    with pytest.raises(ValueError, match=f"got {kind.__name__}, which prepares {name} anew"):
        target.generate(prompt_of(9), assistant_model=tiny_draft(target), streamer=heard, **OPTIONS)
    assert heard.told == ["end"]


def test_an_argument_that_grows_is_refused_before_the_first_token():
    target, heard = of_class(Growing), Heard()
    draft = tiny_draft(target)
    assert_same(target, draft, prompt_of(9))
    with pytest.raises(ValueError, match="got Growing, which prepares marks anew"):
        target.generate(
            prompt_of(9), assistant_model=draft, streamer=heard, marks=torch.ones_like(prompt_of(9)), **OPTIONS
        )
    assert heard.told == [prompt_of(9).tolist(), "end"]


def test_a_target_that_prepares_its_inputs_in_its_own_words_is_served():
    target = of_class(Rewritten)
    assert_same(target, tiny_draft(target), prompt_of(9))
    assert_same(target, tiny_draft(target), prompt_of(9), do_sample=True)


class Demanding(LlamaForCausalLM):
    """Cannot be probed: it runs with an argument of its own only."""

    def forward(self, *args, gain, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * gain
        return outputs


def test_a_target_that_needs_more_than_a_token_is_served():
    target = of_class(Demanding)
    assert_same(target, tiny_draft(target), prompt_of(9), gain=0.5)
    assert_same(target, tiny_draft(target), prompt_of(9), gain=0.5, do_sample=True)


def test_threads_probe_one_target_once():
    target, counted = tiny_target("llama"), []
    target.model.layers[0].register_forward_hook(lambda module, inputs, output: counted.append(output.shape[1]))
    drafts = [tiny_draft(target, tree_shape=(3,)) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda draft=draft: target.generate(prompt_of(9), assistant_model=draft, **OPTIONS))
        for draft in drafts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.count(9) == 4 and counted.count(1) == counted.count(2) * 2 == 2


def steering(places):
    """A hook that adds to the hidden states of some places of a forward."""

    def hook(module, inputs, output):
        output[:, places] += 2.0

    return hook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_on_the_last_token_are_refused(dtype):
    target, heard = tiny_target("llama").to(dtype), Heard()
    draft = tiny_draft(target)
    target.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    last = target.model.layers[1].register_forward_hook(steering(slice(-1, None)))
    with pytest.raises(ValueError, match="forward hooks that treat all tokens of a forward alike"):
        target.generate(prompt_of(9), assistant_model=draft, streamer=heard, **OPTIONS)
    assert heard.told == ["end"]
    last.remove()
    every = target.model.layers[1].register_forward_hook(steering(slice(None)))
    steered = target.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    if dtype == torch.float32:
        assert_same(target, draft, prompt_of(9))
        every.remove()
        assert steered.tolist() != target.generate(prompt_of(9), **OPTIONS).tolist()


def test_hooks_for_forwards_of_one_token_are_refused():
    """They take such forwards for the steps behind the prompt."""
    target = tiny_target("llama")

    def hook(module, inputs, output):
        return output + 2.0 if output.shape[1] == 1 else None

    target.model.layers[1].register_forward_hook(hook)
    with pytest.raises(ValueError, match="forward hooks that treat all tokens of a forward alike"):
        target.generate(prompt_of(9), assistant_model=tiny_draft(target), **OPTIONS)


def test_hooks_that_draw_at_random_are_refused_and_the_generator_is_left():
    target = tiny_target("llama")
    target.model.layers[1].register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="or at random"):
        target.generate(prompt_of(9), assistant_model=tiny_draft(target), **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


class Scaled(LlamaForCausalLM):
    """Cannot be probed either: without its own argument it fails inside its forward."""

    def forward(self, *args, gain=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * gain.sum()
        return outputs


def test_a_target_that_fails_without_its_own_argument_is_served():
    target = of_class(Scaled)
    assert_same(target, tiny_draft(target), prompt_of(9), gain=torch.tensor([0.5]))


class Wavering(LlamaForCausalLM):
    """Sets its own attention in each forward."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        self.set_attn_implementation("eager")
        return outputs


def test_a_target_that_sets_its_attention_in_each_forward_is_refused():
    target = of_class(Wavering)
    with pytest.raises(ValueError, match="a target that keeps its attention"):
        target.generate(prompt_of(9), assistant_model=tiny_draft(target), **OPTIONS)
