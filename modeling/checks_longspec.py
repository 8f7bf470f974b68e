"""What LongSpec cannot serve is refused here: one clear `ValueError` before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerationMode


@contextmanager
def ended_on_error(streamer: Any) -> Iterator[None]:
    """If what runs within it raises, `streamer.end()` is called, or the reader of an iterator would wait for ever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


def check_inputs(input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for inputs of a call that LongSpec cannot serve."""
    if input_ids.shape[0] != 1:
        raise ValueError(f"LongSpec decodes one sequence at a time, got a batch of {input_ids.shape[0]}")
    if not model_kwargs.get("use_cache", True):
        raise ValueError("LongSpec needs the target's cache, got use_cache=False")
    past = model_kwargs.get("past_key_values")
    if isinstance(past, StaticCache):
        raise ValueError(
            "LongSpec keeps its own cache in place; expected past_key_values=DynamicCache, got a StaticCache"
        )
    if not isinstance(past, DynamicCache) or type(past) is not DynamicCache or past.offloading:
        raise ValueError(f"LongSpec needs a plain DynamicCache, got {past!r}")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(f"LongSpec needs position_ids of shape (batch, length), got {tuple(positions.shape)}")
    if generation_config.output_attentions or generation_config.output_hidden_states:
        raise ValueError(
            "LongSpec cannot return attentions or hidden states, got output_attentions or output_hidden_states"
        )


def check_generation(
    draft: Any,
    target: PreTrainedModel,
    mode: GenerationMode,
    generation_config: GenerationConfig,
    mode_kwargs: dict[str, Any],
) -> None:
    """Raises `ValueError`, before anything is allocated, for what plain `generate` serves and LongSpec cannot."""
    with ended_on_error(mode_kwargs.get("streamer")):
        check_options(draft, target, mode, generation_config, mode_kwargs)
        draft.bind(target)


def check_options(
    draft: Any,
    target: PreTrainedModel,
    mode: GenerationMode,
    generation_config: GenerationConfig,
    mode_kwargs: dict[str, Any],
) -> None:
    """Raises `ValueError` for a target or an option that LongSpec cannot serve."""
    draft.config.check()
    if target.config.is_encoder_decoder:
        raise ValueError(f"LongSpec needs a decoder-only target, got the encoder–decoder {type(target).__name__}")
    if target._is_stateful:
        raise ValueError(f"LongSpec needs a target with key/value caches, got the stateful {type(target).__name__}")
    if (getattr(target, "tp_size", None) or 1) > 1:
        raise ValueError(f"LongSpec does not serve tensor-parallel targets, got tp_size={target.tp_size}")
    check_steadiness(target)
    if generation_config.num_beams != 1:
        raise ValueError(f"LongSpec needs num_beams=1, got num_beams={generation_config.num_beams}")
    if generation_config.num_return_sequences not in (None, 1):
        raise ValueError(
            "LongSpec decodes one sequence at a time, got "
            f"num_return_sequences={generation_config.num_return_sequences}"
        )
    if generation_config.prompt_lookup_num_tokens is not None:
        raise ValueError("expected a LongSpec draft or prompt_lookup_num_tokens, got both")
    if generation_config.assistant_early_exit is not None:
        raise ValueError("expected a LongSpec draft or assistant_early_exit, got both")
    if generation_config.dola_layers is not None:
        raise ValueError(
            f"expected a LongSpec draft or dola_layers, got both, dola_layers={generation_config.dola_layers!r}"
        )
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            "LongSpec keeps its own cache in place; expected cache_implementation None or 'dynamic', got "
            f"{generation_config.cache_implementation!r}"
        )
    if mode is not GenerationMode.ASSISTED_GENERATION:
        raise ValueError(f"LongSpec serves greedy decoding and sampling, got generation mode {mode.value!r}")
    if mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError("a LongSpec draft shares the target's tokenizer, got assistant_tokenizer")


def check_steadiness(target: PreTrainedModel) -> None:
    """Raises `ValueError` for a target that draws at random, works without its cache or sees tokens that we do not."""
    for name, module in target.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise ValueError("LongSpec needs the target's cache, got a target that trains with gradient checkpointing")
        dropout = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if module.training and isinstance(dropout, float) and dropout > 0:
            raise ValueError(f"LongSpec needs target.eval(), got a target in training mode with dropout in {name!r}")
        # PEFT adapts the last `alora_offsets` tokens of a forward: all of one token, but not all nodes of a tree. Its
        # last hook counts; those of calls that raised it leaves in place.
        hooks = [getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values()]
        offsets = [keywords["alora_offsets"] for keywords in hooks if "alora_offsets" in keywords]
        if offsets and any(offsets[-1]):
            raise ValueError("LongSpec does not serve activated LoRA, got a prompt with alora_invocation_tokens")
    # peft puts its own method in the place of the target's for the time of a call
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", None)
    if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("LongSpec does not serve virtual tokens, got a target with PEFT prompt learning")


def check_prefix(layer: Any, config: Any) -> None:
    """Raises `ValueError` if a target left other keys and values in its cache than its config promised.

    layer: of the cache, the one a draft with this config attends to.
    """
    expected = (config.num_key_value_heads, config.head_dim)
    held = [states[0, :, 0].shape for states in (layer.keys, layer.values)] if layer.is_initialized else []
    if held != [expected, expected]:
        found = " and ".join(str(tuple(shape)) for shape in held) or "none"
        raise ValueError(f"LongSpec needs cached keys and values of (heads, dimension) {expected}, got {found}")
