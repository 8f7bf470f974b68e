"""The settings of `hf-longspec bench --sampling`: how they are parsed, and which ones hold in a call."""

import pytest
from helpers import tiny_target

from hf_longspec.benchmark import sampling


@pytest.mark.parametrize(
    "text, options",
    [
        ("own", {}),
        ("temperature=1", {"do_sample": True, "temperature": 1.0}),
        (" top_k=20, top_p = 0.8 ", {"do_sample": True, "top_k": 20, "top_p": 0.8}),
        ("do_sample=false,repetition_penalty=1.1", {"do_sample": False, "repetition_penalty": 1.1}),
        ("do_sample=True", {"do_sample": True}),
    ],
)
def test_settings_are_parsed(text, options):
    found = sampling.parse(text)
    assert found == options and [*map(type, found.values())] == [*map(type, options.values())]


@pytest.mark.parametrize(
    "text, message",
    [
        ("temperature", "expected temperature to be a number above 0, got ''"),
        ("temperature=hot", "expected temperature to be a number above 0, got 'hot'"),
        ("temperature=0", "expected temperature to be a number above 0, got '0'"),
        ("temperature=nan", "expected temperature to be a number above 0, got 'nan'"),
        ("temperature=inf", "expected temperature to be a number above 0, got 'inf'"),
        ("top_k=2.5", "expected top_k to be a whole number of at least 0, got '2.5'"),
        ("top_k=-1", "expected top_k to be a whole number of at least 0, got '-1'"),
        ("top_p=1.5", "expected top_p to be a number above 0 and at most 1, got '1.5'"),
        ("do_sample=maybe", "expected do_sample to be true or false, got 'maybe'"),
        ("", "expected 'own' or settings among do_sample, temperature, .*, as temperature=0.7,.*, got ''"),
        ("top_q=1", "settings among .*, got 'top_q=1'"),
        ("top_k=1,own", "settings among .*, got 'own'"),
        ("top_k=1,top_k=2", "expected each setting once, got top_k twice in 'top_k=1,top_k=2'"),
    ],
)
def test_what_cannot_be_parsed(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        sampling.parse(text)
    assert "\n" not in str(raised.value)


def test_the_settings_that_hold_are_those_of_generate():
    target = tiny_target("llama")
    greedy, warm = {"do_sample": False}, {"do_sample": True, "temperature": 0.7}
    assert sampling.in_effect(target, greedy) == sampling.in_effect(target, {}) == greedy
    assert sampling.in_effect(target, warm) == warm | {"top_k": 50}  # transformers' default
    target.generation_config.update(do_sample=True, top_p=0.9, top_k=0, repetition_penalty=1.1)
    own = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1}
    assert sampling.in_effect(target, {}) == own
    assert sampling.in_effect(target, warm) == own | warm
    assert sampling.in_effect(target, greedy) == greedy | {"repetition_penalty": 1.1}
    assert sampling.in_words(own) == "sampled, top_p=0.9, repetition_penalty=1.1"
    assert sampling.in_words(greedy) == "greedy"


def test_all_settings_are_fields_of_transformers():
    config, _ = sampling.prepared(tiny_target("llama"), {}, {"max_new_tokens": 1})
    assert all(hasattr(config, name) for name in sampling.SETTINGS)
