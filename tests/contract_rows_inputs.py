"""Rows of the contract about what a caller passes in for the target to read: caches and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from contract_cell import OLD, PAD, Case, Options, Row, group
from helpers import CACHE
from transformers import DynamicCache, StaticCache


def caches() -> list[Row]:
    def no_config(case: Case) -> dict[str, Any]:
        return {CACHE: DynamicCache()}

    def with_config(case: Case) -> dict[str, Any]:
        return {CACHE: DynamicCache(config=case.target.config)}

    def one_prefix(generate: Callable, case: Case) -> None:
        """Write several answers over one prefilled prefix."""
        prefix = prefilled(case, 1)
        for token in (3, 5, 7):
            ids = torch.cat([case.ids, torch.full_like(case.ids[:, :1], token)], dim=1)
            mask = {} if case.mask is None else {"attention_mask": (ids != PAD).long()}
            own = {"input_ids": ids, **mask, CACHE: copy.deepcopy(prefix)}
            generate(**case.defaults() | own)

    def only_new_tokens(case: Case) -> dict[str, Any]:
        mask = torch.ones_like(case.ids) if case.mask is None else case.mask
        return {"input_ids": case.ids[:, 4:], "attention_mask": mask, CACHE: prefilled(case, 5)}

    def whole_prompt(case: Case) -> dict[str, Any]:
        ids = torch.nn.functional.pad(case.ids, (2, 0), value=PAD)
        mask = (ids != PAD).long()
        past = prefilled(case._replace(ids=ids, mask=mask), 0)
        return {"input_ids": ids, "attention_mask": mask, CACHE: past}

    def long_prompt(case: Case) -> dict[str, Any]:
        return {"input_ids": case.ids.repeat(1, 2), "attention_mask": None, CACHE: DynamicCache()}

    def static(case: Case) -> dict[str, Any]:
        return {CACHE: StaticCache(config=case.target.config, max_cache_len=64)}

    shared: dict[str, Options] = {
        "DynamicCache() passed": no_config,
        "DynamicCache(config) passed": with_config,
        "prefill_chunk_size": {"prefill_chunk_size": 4},
        "prefill_chunk_size and a prefilled prefix": lambda case: {
            "prefill_chunk_size": 2,
            CACHE: prefilled(case, 4),
        },
        "a prefilled prefix, only the new tokens passed": only_new_tokens,
    }
    kept: dict[str, Options] = {
        "use_cache=False": {"use_cache": False},
        "cache_implementation static": {"cache_implementation": "static"},
    }
    without = kept | {
        "use_cache=False, the hidden states": {"use_cache": False, "output_hidden_states": True},
        "cache_implementation hybrid": {"cache_implementation": "hybrid"},
        "cache_implementation sliding_window": {"cache_implementation": "sliding_window"},
        "cache_implementation static and prefill_chunk_size": {
            "cache_implementation": "static",
            "prefill_chunk_size": 4,
        },
    }
    chunked = "prefill_chunk_size and a prefilled prefix"
    twice = "prefill_chunk_size" if OLD else None  # in those versions stock reads the prompt twice
    rows = [
        *group("caches", shared),
        *group("caches", {f"{name}, sliding windows": own for name, own in shared.items()}, family="gemma3_text"),
        *group(
            "caches",
            {"longrope beyond its switch, DynamicCache() passed": long_prompt},
            family="phi3 with longrope",
        ),
        *group("caches", {"the whole prompt in the cache, padded": whole_prompt}, refused="hold less than the prompt"),
        *group("caches", {"cache_implementation dynamic": {"cache_implementation": "dynamic"}}),
        Row("caches", "one prefilled prefix for several answers", one_prefix),
        Row("caches", "one prefilled prefix for several answers, sliding windows", one_prefix, family="mistral"),
        Row("caches", "five turns of a chat with one cache", chat),
        Row("caches", "five turns of a chat with one cache, sliding windows", chat, family="mistral"),
        *group("caches", {"StaticCache passed": static}, refused="got a StaticCache"),
        *group("caches", without),
        *group("caches", {f"{name}, sliding windows": own for name, own in kept.items()}, family="gemma3_text"),
        *group(
            "caches",
            {"use_cache=False and prefill_chunk_size": {"use_cache": False, "prefill_chunk_size": 4}},
            refused="expected use_cache=True",
        ),
    ]
    for kind in ("offloaded", "offloaded_static", "quantized"):
        own = {f"cache_implementation {kind}": {"cache_implementation": kind}}
        rows += group("caches", own, refused=f"'static', .*got '{kind}'")
    return [row._replace(refused=twice) if row.name.startswith(chunked) else row for row in rows]


def prefilled(case: Case, short_of: int) -> DynamicCache:
    """Return a cache that holds the prompts without their last `short_of` tokens."""
    past = DynamicCache(config=case.target.config)
    held = case.ids.shape[1] - short_of
    mask = case.mask if case.mask is None else case.mask[:, :held]
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        case.target(case.ids[:, :held], **{CACHE: past}, attention_mask=mask, position_ids=positions)
    return past


def chat(generate: Callable, case: Case) -> None:
    past, ids, mask = DynamicCache(config=case.target.config), case.ids, case.mask
    for turn in range(5):
        own = {"input_ids": ids, CACHE: past, "max_new_tokens": 8, "do_sample": turn % 2 == 1}
        mask_of_turn = {} if mask is None else {"attention_mask": mask}
        out = generate(**case.defaults() | own | mask_of_turn)
        question = torch.tensor([[2 + turn, 11 - turn, 5]]).expand(len(ids), -1)
        written = torch.cat([out.sequences[:, ids.shape[1] :], question], dim=1)
        ids = torch.cat([ids, written], dim=1)
        if mask is not None:  # tokens behind the end of a row stay hidden
            mask = torch.cat([mask, (written != PAD).long()], dim=1)


def inputs() -> list[Row]:
    def embeds(case: Case) -> dict[str, Any]:
        return {"input_ids": None, "inputs_embeds": case.target.get_input_embeddings()(case.ids).detach()}

    def ids_and_embeds(case: Case) -> dict[str, Any]:
        return embeds(case) | {"input_ids": case.ids, "repetition_penalty": 1.3}

    def positions(case: Case) -> dict[str, Any]:
        return {"position_ids": torch.arange(case.ids.shape[1]).expand_as(case.ids) + 5}

    def holes(case: Case) -> dict[str, Any]:
        mask = torch.ones_like(case.ids) if case.mask is None else case.mask.clone()
        mask[:, 3:5] = mask[0, 1] = 0
        return {"attention_mask": mask}

    def padded(case: Case) -> dict[str, Any]:
        wider = torch.nn.functional.pad(case.ids, (4, 0), value=PAD)
        return {"input_ids": wider, "attention_mask": (wider != PAD).long()}

    def pads_unsaid(case: Case) -> dict[str, Any]:
        return {"input_ids": padded(case)["input_ids"], "attention_mask": None}

    def chunked_embeds(case: Case) -> dict[str, Any]:
        return padded(case) | {
            "inputs_embeds": case.target.get_input_embeddings()(padded(case)["input_ids"]).detach(),
            "prefill_chunk_size": 1,
        }

    both = {"inputs_embeds and prefill_chunk_size, padded": chunked_embeds}
    options: dict[str, Options] = {
        "inputs by position": lambda case: {"inputs": case.ids, "input_ids": None},
        "one token": lambda case: {"input_ids": case.ids[:, -1:], "attention_mask": None},
        "inputs_embeds": embeds,
        "inputs_embeds and input_ids": ids_and_embeds,
        "position_ids": positions,
        "padding on the left": padded,
        "padding without a mask": pads_unsaid,
        "padding inside": holes,
        "padding inside, prefill_chunk_size": lambda case: holes(case) | {"prefill_chunk_size": 4},
    }
    return [
        *group("inputs", options),
        *group("inputs", both, refused="inputs_embeds beside prefill_chunk_size"),
        *group("inputs", {"padding on the left, sliding windows": padded}, family="mistral"),
        *group("inputs", {"padding inside, sliding windows": holes}, family="gemma3_text"),
        *group("inputs", {"none: the text starts with BOS": {"input_ids": None}}, batches=(1,)),
    ]
