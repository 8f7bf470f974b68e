"""Rows of the contract that change no scores: stops, streamers, outputs, refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from contract_cell import Case, Options, Row, group
from helpers import CACHE
from probes import (
    AfterTokens,
    Counting,
    Interrupting,
    Streamed,
    WhenSure,
    Written,
    process_group,
    ticking,
    tiny_tokenizer,
)
from transformers import DynamicCache, TextIteratorStreamer


def stops() -> list[Row]:
    def stop_strings(case: Case) -> dict[str, Any]:
        return {"stop_strings": ["aba", "fcb", "dd"], "tokenizer": tiny_tokenizer()}

    def own(case: Case) -> dict[str, Any]:
        return {"stopping_criteria": [AfterTokens(case.log, case.ids.shape[1])], "eos_token_id": None}

    def own_and_eos(case: Case) -> dict[str, Any]:
        return {"stopping_criteria": [AfterTokens(case.log, case.ids.shape[1])], "eos_token_id": 3}

    def sure(case: Case) -> dict[str, Any]:
        return {"stopping_criteria": [WhenSure(case.log, 4.0)], "output_scores": True}

    def all_reasons(case: Case) -> dict[str, Any]:
        late = AfterTokens(case.log, case.ids.shape[1], least=10, count=3)
        return {"stopping_criteria": [late], "eos_token_id": [3, 8], "do_sample": True} | stop_strings(case)

    def max_time(generate: Callable, case: Case) -> None:
        with ticking():
            generate(**case.defaults(), max_time=9.5)

    options: dict[str, Options] = {
        "max_length": {"max_length": 20, "max_new_tokens": None},
        "eos_token_id": {"eos_token_id": 3},
        "several eos_token_id": {"eos_token_id": [2, 3, 7]},
        "no eos_token_id": {"eos_token_id": None},
        "stop_strings": stop_strings,
        "a criterion that stops rows at their own time": own,
        "… beside an eos_token_id": own_and_eos,
        "a criterion that reads scores": sure,
    }
    return [
        *group("stops", {"max_new_tokens=1": {"max_new_tokens": 1}}, long_paths=False),
        *group("stops", options),
        *group("stops", {"every reason at once, sampled": all_reasons}, draws=True),
        Row("stops", "max_time", max_time, batches=(1,)),  # each row of a batch looks at the clock at its own time
    ]


def streamers() -> list[Row]:
    def iterated(generate: Callable, case: Case) -> None:
        streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=5)
        generate(**case.defaults(), streamer=streamer)
        case.log.append(list(streamer))

    return [
        *group("streamers", {"any streamer": lambda case: {"streamer": Streamed(case.log)}}),
        *group(
            "streamers",
            {
                "beside criteria and processors": lambda case: {
                    "streamer": Streamed(case.log),
                    "stopping_criteria": [AfterTokens(case.log, case.ids.shape[1])],
                    "logits_processor": [Counting(case.log)],
                }
            },
        ),
        *group(
            "streamers", {"TextStreamer": lambda case: {"streamer": Written(tiny_tokenizer(), case.log)}}, batches=(1,)
        ),
        Row("streamers", "TextIteratorStreamer", iterated, batches=(1,)),
    ]


def outputs() -> list[Row]:
    def transition_scores(generate: Callable, case: Case) -> None:
        out = generate(**case.defaults(), output_scores=True, do_sample=True, temperature=0.8)
        case.log.append(case.target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True))

    everything = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    options: dict[str, Options] = {
        "output_scores": {"output_scores": True, "repetition_penalty": 1.2},
        "output_logits": {"output_logits": True, "repetition_penalty": 1.2},
        "output_scores, output_logits": everything,
    }
    hidden = {"output_hidden_states": True}
    sampled = {"do_sample": True, **everything}
    return [
        *group("outputs", options),
        *group("outputs", {"output_scores, output_logits, sampled": sampled}, draws=True),
        Row("outputs", "compute_transition_scores", transition_scores, draws=True),
        *group("outputs", {"output_hidden_states": hidden}),
        *group("outputs", {"output_hidden_states, sampled": hidden | sampled}, draws=True),
        *group("outputs", {"output_attentions": {"output_attentions": True}}, refused="makes no attention weights"),
    ]


def calls_that_end_otherwise() -> list[Row]:
    def interrupted(generate: Callable, case: Case) -> None:
        stop = Interrupting(case.ids.shape[1] + 11)
        past = DynamicCache(config=case.target.config)
        own = {CACHE: past, "stopping_criteria": [stop], "do_sample": True, "streamer": Streamed(case.log)}
        with contextlib.suppress(KeyboardInterrupt):
            generate(**case.defaults() | own)

    def synced(generate: Callable, case: Case) -> None:
        with process_group():
            generate(**case.defaults(), synced_gpus=True)

    return [
        Row("calls", "interrupted by the user", interrupted, draws=True, long_paths=False),
        Row("calls", "synced_gpus", synced),
    ]


def refusals() -> list[Row]:
    options: dict[str, tuple[dict[str, Any], str]] = {
        "num_beams": ({"num_beams": 3}, "needs num_beams=1, got num_beams=3"),
        "num_beams, sampled": ({"num_beams": 3, "do_sample": True}, "needs num_beams=1, got num_beams=3"),
        "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens, got both"),
        "assistant_early_exit": ({"assistant_early_exit": 2}, "assistant_early_exit, got both"),
        "use_mtp": ({"use_mtp": True}, "use_mtp, got both"),
        "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires"),
        "force_words_ids": ({"force_words_ids": [[3]]}, "Constrained Beam Search requires"),
        "dola_layers": ({"dola_layers": "high"}, "dola_layers, got both"),
        "assistant_tokenizer": (
            {"tokenizer": tiny_tokenizer(), "assistant_tokenizer": tiny_tokenizer()},
            "shares the target's tokenizer, got assistant_tokenizer",
        ),
    }
    of_others = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.4, "assistant_ensemble_weight": 0.5}
    refused = [
        row for name, (own, said) in options.items() for row in group("beside a draft", {name: own}, refused=said)
    ]
    return [*group("beside a draft", {"num_assistant_tokens and the like": of_others}), *refused]
