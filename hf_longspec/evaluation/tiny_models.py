"""A tiny random model of any family of transformers, made from the defaults of the family's config.

Every size of a config, and of the configs inside of it, is cut by its field's name, in such a way that the family
keeps its peculiarities: kinds of layers mixed, windows shorter than a prompt, a few experts, keys wider than values.
What the defaults lack and released models have comes from `tiny_overrides`. Knows no draft.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .tiny_overrides import OVERRIDES, RELEASED

VOCAB, HIDDEN, LAYERS, HEADS, WINDOW = 13, 32, 4, 4, 6
LARGEST_MODEL = 100_000_000  # parameters; a model that stays larger was not cut where it had to be
# The first pattern that matches a field's name gives the value; other whole numbers are cut to `HIDDEN`.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size", VOCAB),
    (
        r"max_position|n_positions|max_seq_len$|n_ctx|model_max_length|context_length|max_target_pos|max_source_pos",
        256,
    ),
    (r"^(num_)?((hidden|encoder|decoder)_)?layers$|^n_layers?$|^depth$|^num_blocks$|_hidden_layers$", LAYERS),
    (r"num_kv_shared_layers", 2),
    (r"(key_value|kv|key)_heads$|num_query_groups", 2),
    (r"qk_head_dim", 24),
    (r"qk_nope_head_dim", 8),
    (r"index_head_dim", 24),
    (r"v_head_dim", 12),
    (r"head_dim|headdim|(^|_)d_head$|^d_kv$|kv_channels|head_size", 16),
    (r"(^|_)n?_?(attention_|mamba_|value_)?heads?$|^num_heads$", HEADS),
    (r"^sliding_window$|^sliding_window_size$|attention_window_size|^local_attention$|attention_chunk_size", WINDOW),
    (r"pattern$|period$|interval$|max_window_layers", 2),
    (r"n_groups?$|num_expert_group|topk_groups?$|first_k_dense|offset$", 1),
    (r"experts_per_tok|^moe_k$|topk$|top_k$|(^|_)topk_|n_shared_experts", 2),
    (r"experts$", 4),
    (r"rotary_dim", 4),
    (r"intermediate|ffn|feed_forward|^d_ff$|^dff$|mlp_dim", 48),
    (r"rank", 16),
)
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MEDIA_TOKEN = (
    r"(image|video|vision|audio|boi|eoi|boa|eoa|frame|patch|im_).*(token|start|end|patch|newline)_(id|index)$"
)
ABSENT = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "n_routed_experts": 4,
}  # fields that some defaults leave open
KEPT = ("chunk_size_feed_forward", "transformers_version", "rms_norm_eps")


# The errors of a family's code on a model that it does not fit. Any other error is the machine's fault, or our own.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StopIteration,
    StrictDataclassError,
    TypeError,
    ValueError,
)


class NotBuildable(Exception):
    """The error for a family of which no tiny model could be made; the message says why."""


def families() -> list[str]:
    """Return every `model_type` that `AutoModelForCausalLM` or `AutoModelForImageTextToText` loads."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))


def auto_class(family: str) -> Any:
    """Return the Auto class that loads a family: `AutoModelForCausalLM` where it can."""
    return AutoModelForCausalLM if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


def tiny_config(family: str, release: str = "") -> PreTrainedConfig:
    """Return the config of a family (`model_type`), everything in it tiny; release: a name in `RELEASED[family]`."""
    config_class = CONFIG_MAPPING[family]
    overrides = _merged(OVERRIDES.get(family, {}), RELEASED[family][release] if release else {})
    try:
        defaults = config_class()
    except StrictDataclassError:  # the class refuses its own defaults
        defaults = config_class(**overrides)
    return config_class(**_merged(tiny_fields(defaults), overrides))


def tiny_fields(defaults: PreTrainedConfig, inner: bool = False) -> dict[str, Any]:
    """Return the fields of a config like `defaults`, cut to size, as the config's class takes them.

    inner: whether the config lies inside of another, whose defaults may differ from the defaults of its class.
    """
    fields: dict[str, Any] = {}
    depth = getattr(defaults, "num_hidden_layers", None) or 0
    for name, value in vars(defaults).items():
        if name.startswith("_") or name in KEPT:
            continue
        if isinstance(value, PreTrainedConfig):
            fields[name] = {"model_type": value.model_type} | tiny_fields(value, inner=True)
        elif name in SPECIAL_TOKENS:
            fields[name] = SPECIAL_TOKENS[name]
        elif re.search(MEDIA_TOKEN, name):
            # no text may hold a picture by accident: a picture's tokens lie behind the vocabulary
            fields[name] = VOCAB + len(fields)
        elif re.search(r"token_id$|token_index$", name):
            fields[name] = None if "forced" in name else 2
        elif isinstance(value, int) and not isinstance(value, bool) and not (name in ABSENT and value == 0):
            if (size := tiny_size(name, value)) != value or inner:
                fields[name] = size
        elif isinstance(value, (list, tuple)) and value:
            if (cut := tiny_list(name, list(value), depth)) is not None:
                fields[name] = cut
        elif name in ABSENT and not value:
            fields[name] = ABSENT[name]
        elif name in ("use_sliding_window", "is_decoder"):
            fields[name] = True
        elif name == "tie_word_embeddings":
            fields[name] = False  # a model whose head is its embedding repeats its last token
        elif isinstance(value, dict) and "mrope_section" in value:
            fields[name] = value | {"mrope_section": [2, 3, 3]}
    if fields.get("sliding_window") and set(fields.get("layer_types", ())) == {"full_attention"}:
        fields["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)  # the window is off by default
    if set(fields.get("mlp_layer_types", ())) == {"sparse"}:
        fields["mlp_layer_types"] = ["dense"] + ["sparse"] * (LAYERS - 1)
    if "kv_lora_rank" in fields:  # latent attention expands to one K/V head a query head
        fields["num_key_value_heads"] = HEADS
    return fields


def tiny_size(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(size, value) if value > 0 else value
    return min(value, HIDDEN)


def tiny_list(name: str, values: list, depth: int) -> list | None:
    """Return a list of values per layer, or of layers, cut to `LAYERS` layers.

    None if the list has nothing to do with layers.
    """
    if not isinstance(values[0], (str, int, float)) or depth <= LAYERS:
        return None
    if len(values) == depth:
        if values == list(range(depth)):
            return values[:LAYERS]
        kinds = list(dict.fromkeys(values))
        if isinstance(values[0], int) and not isinstance(values[0], bool):
            kinds = [tiny_size(name, kind) for kind in kinds]
        if name == "layer_types":
            return [kinds[index % len(kinds)] for index in range(LAYERS)]  # kinds alternate
        return [kinds[index * len(kinds) // LAYERS % len(kinds)] for index in range(LAYERS)]  # kinds in runs
    if re.search(r"layers|idx|indexes|indices|_ids$", name) and all(isinstance(value, int) for value in values):
        return [value for value in values if value < LAYERS] or [1]
    return None


def tiny_model(family: str, seed: int = 0, release: str = "") -> PreTrainedModel:
    """Return a float32 model of a family in eval mode whose text depends on its context; release: as of `tiny_config`.

    Raises `NotBuildable`.
    """
    try:
        auto, config = auto_class(family), tiny_config(family, release)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        if size > LARGEST_MODEL:
            raise NotBuildable(f"{size / 1e6:.0f} million parameters are left")
        model = randomized(lambda: auto.from_config(config, dtype=torch.float32), seed)
    except NotBuildable:
        raise
    except FAILURES as error:
        raise NotBuildable(one_line(error)) from error
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def randomized(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Return the model of `build` in eval mode, with weights so large that no text settles on one token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def one_line(error: Exception) -> str:
    """Return an error as one line: the first of its message, or the last where that names the error inside."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[-1] if re.match(r"\w+Error: ", lines[-1]) else lines[0]
    return line if line.startswith("LongSpec") else f"{type(error).__name__}: {line}".removesuffix(": ")


def _merged(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = fields | overrides
    for name in set(fields) & set(overrides):
        if isinstance(fields[name], dict) and isinstance(overrides[name], dict):
            merged[name] = _merged(fields[name], overrides[name])
    return merged
