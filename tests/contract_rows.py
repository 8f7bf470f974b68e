"""The rows of the contract, of which the rows that change scores stand here.

The others stand in `contract_rows_calls.py` and `contract_rows_inputs.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from contract_cell import PAD, Case, Options, Row, group
from contract_rows_calls import calls_that_end_otherwise, outputs, refusals, stops, streamers
from contract_rows_inputs import caches, inputs
from probes import END, Counting, Machine, Noisy, tiny_tokenizer
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig


def samplers() -> list[Row]:
    options: dict[str, Options] = {
        "do_sample": {},
        "temperature": {"temperature": 0.7},
        "top_k": {"top_k": 5},
        "top_p": {"top_p": 0.8},
        "min_p": {"min_p": 0.1},
        "top_h": {"top_h": 0.6},
        "typical_p": {"typical_p": 0.7},
        "epsilon_cutoff": {"epsilon_cutoff": 0.05},
        "eta_cutoff": {"eta_cutoff": 0.1},
        "several samplers": {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
        "renormalize_logits": {"top_k": 6, "renormalize_logits": True, "output_scores": True},
        "generation_config object": {"generation_config": GenerationConfig(top_k=4, num_return_sequences=1)},
    }
    sampled = {name: {"do_sample": True} | own for name, own in options.items() if isinstance(own, dict)}
    several = {"num_return_sequences": {"do_sample": True, "num_return_sequences": 3}}
    return [
        *group("greedy", {"no option": {}}),
        *group("greedy", {"scores with a cap": {}}, family="gemma2"),
        *group("greedy", {"no return_dict_in_generate": {"return_dict_in_generate": None}}, long_paths=False),
        *group("sampling", sampled, draws=True),
        *group("sampling", several, draws=True),
    ]


def built_in_processors() -> list[Row]:
    negative = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8], [0, 2, 2, 9], [0, 0, 0, 3]])

    def guided(case: Case) -> dict[str, Any]:
        ids = negative[: len(case.ids)]
        return {
            "guidance_scale": 1.7,
            "negative_prompt_ids": ids,
            "negative_prompt_attention_mask": (ids != PAD).long(),
        }

    greenlist = {"watermarking_config": WatermarkingConfig(bias=2.5)}
    synthid = {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836])}
    invalid = [[[5], -torch.inf], [[7, 3], torch.inf]]
    options: dict[str, Options] = {
        "repetition_penalty": {"repetition_penalty": 1.4},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
        "bad_words_ids": {"bad_words_ids": [[3], [4, 5], [6, 7, 8]]},
        "min_length": {"min_length": 20, "eos_token_id": [3, 4, 5, 12]},
        "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [3, 4, 5, 12]},
        "suppress_tokens": {"suppress_tokens": [3, 9]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [2, 4, 6, 8]},
        "forced_bos_token_id": lambda case: {
            "forced_bos_token_id": 7,
            "input_ids": case.ids[:, -1:],
            "attention_mask": None,
        },
        "forced_eos_token_id": {"forced_eos_token_id": [6], "max_new_tokens": 13},
        "sequence_bias": {"sequence_bias": [[[5], -3.0], [[3, 4], 6.0], [[9], 1.5]]},
        "exponential_decay_length_penalty": {
            "exponential_decay_length_penalty": (4, 1.2),
            "eos_token_id": 9,
            "output_scores": True,
        },
        "remove_invalid_values": {"sequence_bias": invalid, "remove_invalid_values": True, "output_scores": True},
        "guidance_scale": {"guidance_scale": 1.5},
        "guidance_scale, negative_prompt_ids": guided,
        "watermarking_config (green list)": greenlist,
        "token_healing": {"token_healing": True, "tokenizer": tiny_tokenizer()},
        "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    }
    sampled: dict[str, Options] = {
        "repetition_penalty, no_repeat_ngram_size, sampled": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        "watermarking_config (green list), sampled": greenlist,
        "watermarking_config (SynthID)": synthid,
        "guidance_scale, sampled": {"guidance_scale": 1.5, "top_k": 8},
    }
    drawn = {name: {"do_sample": True} | own for name, own in sampled.items() if isinstance(own, dict)}
    return group("processors", options) + group("processors", drawn, draws=True)


def allowed(batch_id: int, text: torch.Tensor) -> list[int]:
    return [(int(text[-1]) + step + batch_id) % 13 for step in (1, 2, 5, 7)]


def custom_processors() -> list[Row]:
    def counting(case: Case) -> dict[str, Any]:
        return {"logits_processor": [Counting(case.log)], "repetition_penalty": 1.1}

    def machine(case: Case) -> dict[str, Any]:
        return {"logits_processor": [Machine(case.log)], "output_scores": True, "output_logits": True}

    def noisy(case: Case) -> dict[str, Any]:
        return {"logits_processor": [Noisy()], "do_sample": True}

    return [
        *group("custom processors", {"one that counts its calls": counting, "one that holds a grammar": machine}),
        *group("custom processors", {"one that draws at random": noisy}, draws=True),
        *group("custom processors", {"xgrammar": xgrammar}, module="xgrammar"),
        *group("custom processors", {"outlines": outlines}, module="outlines"),
        *group("custom processors", {"lm-format-enforcer": format_enforcer}, module="lmformatenforcer"),
    ]


PATTERN = "[abc]{4,14}([de]{1,3}f){2,3}[ab]{0,9}"


def xgrammar(case: Case) -> dict[str, Any]:
    import xgrammar as xgr
    from xgrammar.contrib.hf import LogitsProcessor

    tokens = xgr.TokenizerInfo.from_huggingface(tiny_tokenizer(), vocab_size=13, stop_token_ids=[END])
    compiled = xgr.GrammarCompiler(tokens).compile_regex(PATTERN)
    return {"logits_processor": [LogitsProcessor(compiled)], "eos_token_id": END, "output_scores": True}


def outlines(case: Case) -> dict[str, Any]:
    from outlines.backends.outlines_core import OutlinesCoreLogitsProcessor
    from outlines_core import Index, Vocabulary

    pieces = {piece: [index] for piece, index in tiny_tokenizer().get_vocab().items() if index > END}
    index = Index(PATTERN, Vocabulary(END, pieces))
    return {"logits_processor": [OutlinesCoreLogitsProcessor(index, "torch")], "eos_token_id": END}


def format_enforcer(case: Case) -> dict[str, Any]:
    from lmformatenforcer import RegexParser, TokenEnforcer, TokenEnforcerTokenizerData

    tokenizer = tiny_tokenizer()
    pieces = [(index, piece, False) for piece, index in tokenizer.get_vocab().items() if index > END]
    data = TokenEnforcerTokenizerData(pieces, tokenizer.decode, END, False, 13)
    enforcer = TokenEnforcer(data, RegexParser(PATTERN))
    return {
        "prefix_allowed_tokens_fn": lambda batch_id, text: enforcer.get_allowed_tokens(text.tolist()).allowed_tokens,
        "eos_token_id": END,
    }


def all_rows() -> list[Row]:
    groups = [samplers, built_in_processors, custom_processors, stops, streamers, outputs, caches, inputs]
    return [row for make in [*groups, calls_that_end_otherwise, refusals] for row in make()]
