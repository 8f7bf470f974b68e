"""Checks: what LongSpec cannot serve of a call is refused here, in one clear `ValueError`, before any work is done.

A part refuses beside its code what that part cannot serve: a draft's config, a target that does not fit, an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from packaging import version
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerationMode

from .call_longspec import probe
from .interface_longspec import CACHE, is_stateful, is_user_defined

# What `cache_implementation` may be: names of the ways in which plain `generate` would keep its cache on the device.
CACHES = (None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window")


@contextmanager
def ended_on_error(streamer: Any) -> Iterator[None]:
    """Tell the streamer the end if what runs within raises: the reader of an iterator waits for the end."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


def check_inputs(input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for inputs of a call that LongSpec cannot serve."""
    past = model_kwargs.get(CACHE)
    if not model_kwargs.get("use_cache", True):
        check_without_cache(generation_config, model_kwargs)
        return
    if isinstance(past, StaticCache):
        if is_user_defined(past):
            raise ValueError(
                f"LongSpec keeps its own cache in place; expected {CACHE}=DynamicCache, got a StaticCache"
            )
        return
    if past is None or type(past) is not DynamicCache or past.offloading:
        raise ValueError(f"LongSpec needs a plain DynamicCache, got {past!r}")
    check_reading(input_ids, generation_config.prefill_chunk_size, model_kwargs)
    held = past.layers[0].keys if past.get_seq_length() > 0 else input_ids
    if held is not None and held.shape[0] != input_ids.shape[0]:
        raise ValueError(f"expected {CACHE} of the prompts' batch size {input_ids.shape[0]}, got {held.shape[0]}")


def check_without_cache(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` where plain `generate` without a cache fails, or writes what it would not write with one."""
    past, mask, positions = (model_kwargs.get(name) for name in (CACHE, "attention_mask", "position_ids"))
    if past is not None or generation_config.prefill_chunk_size is not None:
        raise ValueError("expected use_cache=True beside a cache or prefill_chunk_size, got use_cache=False")
    if mask is None and positions is not None and positions.dim() == 2 and bool((positions.diff() != 1).any()):
        # without cache and mask transformers takes positions (B, L) that jump for several texts in a row
        raise ValueError("expected use_cache=True beside position_ids that jump, got use_cache=False")


def check_reading(input_ids: Tensor, chunk: int | None, model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` where transformers itself reads a prompt twice, and plain `generate` writes nonsense."""
    past, mask = model_kwargs[CACHE], model_kwargs.get("attention_mask")
    held = past.get_seq_length()
    if chunk is not None and model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("transformers splits token ids only, got inputs_embeds beside prefill_chunk_size")
    if chunk is not None and held and version.parse(transformers.__version__) < version.parse("5.21"):
        raise ValueError(
            f"transformers {transformers.__version__} reads all of a prompt again behind a filled cache with "
            f"prefill_chunk_size={chunk}; expected transformers 5.21, an empty cache or prefill_chunk_size=None"
        )
    if mask is not None and held >= input_ids.shape[1] == mask.shape[1]:
        raise ValueError(
            f"expected {CACHE} that hold less than the prompt of {mask.shape[1]} tokens, got {held} tokens"
        )


def check_generation(
    draft: Any,
    target: PreTrainedModel,
    mode: GenerationMode,
    generation_config: GenerationConfig,
    mode_kwargs: dict[str, Any],
) -> None:
    """Raise `ValueError`, before anything is allocated, for what plain `generate` serves and LongSpec cannot."""
    with ended_on_error(mode_kwargs.get("streamer")):
        draft.config.check()
        check_draft(draft)
        check_target(target)
        check_options(target, mode, generation_config, mode_kwargs)
        bound = draft.bind(target)
        tree = draft.config.tree_on(bound.device)
        draft.config.check_tree(tree, getattr(bound.head, "out_features", None))
        if tree:
            draft.head_rows(bound)
        draft.check_engine(target, bound.device, bool(mode_kwargs.get("synced_gpus")))
        probe(draft, target, bound)


def check_draft(draft: Any) -> None:
    """Raise `ValueError` for a draft that cannot follow its target to another device or format."""
    devices = set((getattr(draft, "hf_device_map", None) or {}).values())
    hooked = (part for part in draft.modules() if hasattr(part, "_hf_hook"))  # accelerate's, which bring weights there
    if len(devices) > 1 or any(weight.is_meta for part in hooked for weight in part.parameters()):
        got = "one that accelerate offloads or spreads over devices; load it without device_map"
    elif getattr(draft, "quantization_method", None) == "bitsandbytes":
        got = "one that bitsandbytes quantized; load it without quantization_config"
    else:
        return
    raise ValueError(f"LongSpec moves a draft to its target's device and number format, got {got}")


def check_target(target: PreTrainedModel) -> None:
    """Raise `ValueError` for a target that LongSpec cannot serve, whatever the draft."""
    if target.config.is_encoder_decoder:
        raise ValueError(f"LongSpec needs a decoder-only target, got the encoder–decoder {type(target).__name__}")
    if is_stateful(target):
        raise ValueError(f"LongSpec needs a target with key/value caches, got the stateful {type(target).__name__}")
    if (ranks := getattr(target, "tp_size", None) or 1) > 1:
        raise ValueError(f"LongSpec does not serve tensor-parallel targets, got tp_size={ranks}")
    check_steadiness(target)


def check_options(
    target: PreTrainedModel, mode: GenerationMode, generation_config: GenerationConfig, mode_kwargs: dict[str, Any]
) -> None:
    """Raise `ValueError` for options of `generate` that LongSpec cannot serve."""

    def origin(name: str, instead: Any) -> str:  # a call takes from the target what it leaves open
        own = getattr(target.generation_config, name, None) == getattr(generation_config, name)
        return f", as target.generation_config has it: set {name} = {instead} there" if own else ""

    if (beams := generation_config.num_beams) != 1:
        raise ValueError(f"LongSpec needs num_beams=1, got num_beams={beams}{origin('num_beams', 1)}")
    if generation_config.output_attentions:
        where = origin("output_attentions", False)
        raise ValueError(f"LongSpec's attention makes no attention weights, got output_attentions=True{where}")
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "dola_layers"):
        value = getattr(generation_config, name, None)
        if value is not None and value is not False:
            raise ValueError(f"expected a LongSpec draft or {name}, got both, {name}={value!r}{origin(name, None)}")
    if (kind := generation_config.cache_implementation) not in CACHES:
        raise ValueError(
            f"LongSpec keeps its own cache in place, on the target's device; expected cache_implementation None, "
            f"{', '.join(map(repr, CACHES[1:]))}, got {kind!r}{origin('cache_implementation', None)}"
        )
    if mode is not GenerationMode.ASSISTED_GENERATION:
        raise ValueError(f"LongSpec serves greedy decoding and sampling, got generation mode {mode.value!r}")
    if mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError("a LongSpec draft shares the target's tokenizer, got assistant_tokenizer")


def check_steadiness(target: PreTrainedModel) -> None:
    """Raise `ValueError` for a target that draws at random or sees tokens unknown to us."""
    for name, module in target.named_modules():
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
