"""Prefill: the prompt is read as plain `generate` reads it, and what all rounds of the call need is set up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .checks_longspec import check_prefix
from .verification_longspec import Text

HEADROOM = 512  # tokens a call makes room for beyond its prompt before the cache has to grow


def make_cache(
    target: PreTrainedModel,
    draft: Any,
    past: DynamicCache,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    device: torch.device,
) -> SpeculativeCache:
    """An empty cache with room for the prompt, the first `HEADROOM` tokens of the answer and a tree."""
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    prompt = past.get_seq_length() + (input_ids.shape[1] if embeds is None else embeds.shape[1])
    answer = max(generation_config.max_length - input_ids.shape[1], 0)
    tree_size = 1 + sum(draft.config.tree_shape)
    text_config = target.config.get_text_config(decoder=True)
    reserve = prompt + min(answer, HEADROOM) + tree_size
    cache = SpeculativeCache(text_config, past, reserve, tree_size, longest=prompt + answer + tree_size)
    if mask is not None:
        cache.hide_padding(mask.to(device))
    return cache


def prefill(
    target: PreTrainedModel,
    text: Text,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Read the prompt as plain `generate` does, emit its first token, fill the draft's window.

    Returns the position (1,) of that token, the first root, and what every step passes on (see `step_extras`).
    """
    model_kwargs["past_key_values"] = cache
    outputs = target._prefill(
        text.ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
    )
    if outputs.past_key_values is not cache:
        # phi3 drops the cache it is given when a prompt reaches beyond its rope switch
        cache.drop(outputs.past_key_values)
        cache.adopt(outputs.past_key_values)
    bound = generator.target
    check_prefix(cache.layers[bound.layer], generator.draft.config)
    positions = model_kwargs.get("position_ids")
    last = cache.length - cache.start - 1 if positions is None else int(positions[0, -1])
    window = slice(-min(generator.draft.config.window, cache.length - cache.start), None)
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        embeds = bound.scale(embeds[:, window])
    else:
        embeds = bound.embed(text.ids[:, window].to(bound.device))
    generator.prefill(embeds, last)
    text.emit(outputs.logits[:, -1])
    return torch.full((1,), last + 1, device=bound.device), step_extras(target, text.ids, outputs, model_kwargs)


def step_extras(target: PreTrainedModel, ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What plain `generate` passes to every forward of one token beside the token, its place and the cache.

    That is what a user passed for the target's own `forward`, and token types, which go on as the prompt's last.
    """
    cache = model_kwargs["past_key_values"]
    model_kwargs = target._update_model_kwargs_for_generation(outputs, dict(model_kwargs)) | {"past_key_values": cache}
    inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
    own = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "past_key_values"}
    own |= {"use_cache", "logits_to_keep", "return_dict"}
    return {name: value for name, value in inputs.items() if name not in own}
