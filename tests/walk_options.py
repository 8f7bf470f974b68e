"""What a step of the random walk can ask `generate` for: options by name, made anew for each run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from contract_rows import allowed
from helpers import VOCAB
from probes import AfterTokens, Counting, Interrupting, Machine, Noisy, Streamed, WhenSure, tiny_tokenizer
from transformers import LogitsProcessorList, StoppingCriteriaList, SynthIDTextWatermarkingConfig, WatermarkingConfig

Options = dict[str, Any]


class Told(NamedTuple):
    """The log of the objects that a step passes; start: tokens of the text before the call."""

    log: list
    start: int


def processor(make: Callable[[Told], Any]) -> Callable[[Told], Options]:
    return lambda told: {"logits_processor": LogitsProcessorList([make(told)])}


def criterion(make: Callable[[Told], Any]) -> Callable[[Told], Options]:
    return lambda told: {"stopping_criteria": StoppingCriteriaList([make(told)])}


SAMPLERS: dict[str, Options] = {
    "plain": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.6},
    "hot": {"do_sample": True, "temperature": 1.7},
    "top_k": {"do_sample": True, "top_k": 4},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "top_h": {"do_sample": True, "top_h": 0.6},
    "typical_p": {"do_sample": True, "typical_p": 0.7},
    "cutoffs": {"do_sample": True, "epsilon_cutoff": 0.03, "eta_cutoff": 0.1, "renormalize_logits": True},
}
PROCESSORS: dict[str, Callable[[Told], Options]] = {
    "repetition_penalty": lambda told: {"repetition_penalty": 1.3},
    "encoder_repetition_penalty": lambda told: {"encoder_repetition_penalty": 1.3},
    "no_repeat_ngram_size": lambda told: {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": lambda told: {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": lambda told: {"bad_words_ids": [[3], [4, 5]]},
    "sequence_bias": lambda told: {"sequence_bias": [[[5], -3.0], [[3, 4], 6.0]]},
    "a cycle": lambda told: {"sequence_bias": [[[token, 2 + (token - 1) % 4], 30.0] for token in range(VOCAB)]},
    "suppress_tokens": lambda told: {"suppress_tokens": [3, 9]},
    "begin_suppress_tokens": lambda told: {"begin_suppress_tokens": [2, 4, 6, 8]},
    "min_new_tokens": lambda told: {"min_new_tokens": 6},
    "forced_eos_token_id": lambda told: {"forced_eos_token_id": 6},
    "exponential_decay_length_penalty": lambda told: {"exponential_decay_length_penalty": (3, 1.3)},
    "guidance_scale": lambda told: {"guidance_scale": 1.5},
    "green list": lambda told: {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "synthid": lambda told: {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400])},
    "prefix_allowed_tokens_fn": lambda told: {"prefix_allowed_tokens_fn": allowed},
    "counting": processor(lambda told: Counting(told.log)),
    "machine": processor(lambda told: Machine(told.log)),
    "noisy": processor(lambda told: Noisy()),
}
STOPS: dict[str, Callable[[Told], Options]] = {
    "stop_strings": lambda told: {"stop_strings": ["aba", "fc", "dd"], "tokenizer": tiny_tokenizer()},
    "after tokens": criterion(lambda told: AfterTokens(told.log, told.start)),
    "when sure": lambda told: criterion(lambda told: WhenSure(told.log, 4.0))(told) | OUTPUTS["scores"],
    "interrupted": criterion(lambda told: Interrupting(told.start + 5)),
}
RECORD = {"return_dict_in_generate": True}
OUTPUTS: dict[str, Options] = {
    "dict": RECORD,
    "scores": {"output_scores": True, **RECORD},
    "logits": {"output_logits": True, **RECORD},
    "hidden states": {"output_hidden_states": True, **RECORD},
}
REFUSED: dict[str, tuple[Options, str]] = {
    "attentions": ({"output_attentions": True, **RECORD}, "makes no attention weights"),
    "beams": ({"num_beams": 2}, "needs num_beams=1, got num_beams=2"),
    "dola": ({"dola_layers": "low"}, "dola_layers, got both"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens, got both"),
    "early exit": ({"assistant_early_exit": 1}, "assistant_early_exit, got both"),
    # where a cache object is passed besides, stock refuses first
    "offloaded cache": ({"cache_implementation": "offloaded"}, "cache_implementation None, .*, got 'offloaded'"),
    "quantized cache": ({"cache_implementation": "quantized"}, "cache_implementation None, .*, got 'quantized'"),
}


def streamer(told: Told) -> Streamed:
    return Streamed(told.log)
