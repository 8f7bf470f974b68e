"""Prefill: the prompt is read as plain `generate` reads it, and what all rounds of the call need is set up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .checks_longspec import check_prefix
from .hidden_state_longspec import catching
from .text_longspec import Text

# What a target takes with one value for each token, beside the usual inputs.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
HEADROOM = 512  # tokens a call makes room for beyond its prompt before the cache has to grow


def make_cache(
    target: PreTrainedModel,
    draft: Any,
    past: DynamicCache,
    text: Text,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    device: torch.device,
) -> SpeculativeCache:
    """An empty cache with room for the prompt, the first `HEADROOM` tokens of the answer and a tree.

    device: that of most layers.
    """
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    prompt = past.get_seq_length() + (text.prompt if embeds is None else embeds.shape[1])
    answer = max(generation_config.max_length - text.prompt, 0)
    tree_size = 1 + sum(draft.config.tree_shape)
    text_config = target.config.get_text_config(decoder=True)
    reserve = prompt + min(answer, HEADROOM) + tree_size
    longest = prompt + answer + tree_size
    lead = 0 if text.together else text.lead
    cache = SpeculativeCache(text_config, past, reserve, tree_size, longest, batch=text.batch, lead=lead)
    if mask is not None:
        cache.hide_padding(mask.to(device))
    return cache


class Start(NamedTuple):
    """Where decoding starts: the positions (B,) of the first roots, and what every forward of the target gets.

    axes: (axes, B), how far each axis of a target's positions (mrope) is from the last one; None with one axis.
    hidden: (B, hidden), the target's last hidden state at the prompt's last token; None if the draft does not read it.
    extras: see `step_inputs`.
    """

    root_positions: Tensor
    axes: Tensor | None
    hidden: Tensor | None
    extras: dict[str, Any]


def prefill(
    target: PreTrainedModel,
    text: Text,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Start:
    """Read the prompt as plain `generate` does, emit its first token, fill the draft's window."""
    model_kwargs["past_key_values"] = cache
    prompt = text.sequences
    reads_hidden = bool(generator.shape) and generator.draft.config.target_hidden_state
    with catching(target, reads_hidden) as caught:
        outputs = target._prefill(
            prompt, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
        )
    if outputs.past_key_values is not cache:
        # phi3 drops the cache it is given when a prompt reaches beyond its rope switch
        cache.drop(outputs.past_key_values)
        cache.adopt(outputs.past_key_values)
    bound = generator.target
    check_prefix(cache.layers[bound.layer], generator.draft.config)
    text.emit(list(range(text.batch)), outputs.logits[:, -1], outputs.hidden_states)
    positions, extras = step_inputs(target, text.sequences, outputs, model_kwargs)
    starts = torch.tensor(cache.starts, device=bound.device)
    # a target that counts for itself counts what the cache holds, padding too
    positions = torch.full_like(starts, cache.length) if positions is None else positions.to(bound.device)
    positions = positions.expand(*positions.shape[:-1], text.batch)
    root_positions = (positions if positions.dim() == 1 else positions[-1]).long()  # one family has them in float
    window = slice(-generator.draft.config.window, None)
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        embeds = bound.scale(embeds[:, window]).to(bound.device)
    else:
        ids, vocab = prompt[:, window].to(bound.device), generator.draft.config.vocab_size
        embeds = bound.embed(ids.masked_fill(ids >= vocab, 0))  # some targets have no embedding for an image's tokens
    index = torch.arange(cache.length - embeds.shape[1], cache.length, device=bound.device)
    generator.prefill(embeds, root_positions - 1, index >= starts[:, None])
    hidden = None if caught is None else caught.of_last_token().to(bound.device)
    return Start(root_positions, None if positions.dim() == 1 else positions - root_positions, hidden, extras)


def step_inputs(
    target: PreTrainedModel, ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """What plain `generate` passes to its first forward of one token: its position, and all but the usual inputs.

    The position is (B,), or (axes, B) where a target has several, and None where the target counts for itself. The
    rest is what a user passed for the target's own `forward`, and token types, which go on as the prompt's last; that
    is the same in every step.
    """
    cache = model_kwargs["past_key_values"]
    model_kwargs = target._update_model_kwargs_for_generation(outputs, dict(model_kwargs)) | {"past_key_values": cache}
    inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
    own = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "past_key_values"}
    own |= {"use_cache", "logits_to_keep", "return_dict"}
    positions = inputs.get("position_ids")
    extras = {name: value for name, value in inputs.items() if name not in own and value is not None}
    # before transformers 5.23 the types of the whole text come along with the one token
    extras |= {name: extras[name][:, -1:] for name in PER_TOKEN if name in extras}
    return None if positions is None else positions[..., -1], extras
