"""Models of known shapes with random weights, and caches filled with random keys and values.

All are made on the device that uses them, so that a model of 8 billion parameters takes seconds. Such models write
noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from ..modeling.configuration_longspec import LongSpecConfig, kv_shape
from ..modeling.modeling_longspec import LongSpecForCausalLM


def _shape(
    family: str, layers: int, hidden: int, inner: int, heads: tuple[int, int, int], vocab: int, tied: bool
) -> dict[str, Any]:
    """Return the fields of a model's config. heads: query heads, key/value heads, head dimension."""
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": _shape("llama", 2, 32, 48, (4, 2, 16), 101, False),
    "smollm2-135m": _shape("llama", 30, 576, 1536, (9, 3, 64), 49_152, True),
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 4864, (14, 2, 64), 151_936, True),
    "llama-1b": _shape("llama", 16, 2048, 8192, (32, 8, 64), 128_256, True),
    "qwen2.5-1.5b": _shape("qwen2", 28, 1536, 8960, (12, 2, 128), 151_936, True),
    "llama-8b": _shape("llama", 32, 4096, 14_336, (32, 8, 128), 128_256, False),
}


def random_pair(
    shape: str, device: torch.device, dtype: torch.dtype, longest: int, **options: Any
) -> tuple[PreTrainedModel, LongSpecForCausalLM]:
    """Return a target of one of `SHAPES` for texts of up to `longest` tokens, and a draft for it with these `options`.

    Raises `ValueError` for another name and for options that a draft cannot have.
    """
    if shape not in SHAPES:
        raise ValueError(f"expected a shape among {', '.join(SHAPES)}, got {shape!r}")
    ends = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=longest, **ends)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
        draft = LongSpecForCausalLM(LongSpecConfig.from_target(config, **options)).to(dtype)
    return target.eval(), draft.eval()


def fill(cache: Cache, target: PreTrainedModel, tokens: int) -> None:
    """Append random keys and values of `tokens` tokens to each layer of a cache."""
    heads, dim = kv_shape(target.config)
    for layer in range(target.config.num_hidden_layers):
        key, value = (torch.randn(1, heads, tokens, dim, device=target.device, dtype=target.dtype) for _ in range(2))
        cache.update(key, value, layer)


def filled(target: PreTrainedModel, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=target.config)
    fill(cache, target, tokens)
    return cache


def cut(cache: Cache, tokens: int) -> None:
    """Cut a cache back to its first `tokens` tokens."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "cumulative_length", None), Tensor):  # a static layer
            layer.cumulative_length.fill_(tokens)
        else:
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]


def kv_bytes(target: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the keys and values of `tokens` tokens in one layer."""
    heads, dim = kv_shape(target.config)
    return 2 * heads * dim * tokens * target.dtype.itemsize


def read_bytes(target: PreTrainedModel) -> int:
    """Return the bytes of the weights that a forward reads, without an embedding that is not the LM head as well.

    Of such an embedding a forward reads only a few rows.
    """
    rows, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    weights = sum(parameter.nbytes for parameter in target.parameters())  # a shared parameter counts once
    return weights if rows is head else weights - rows.nbytes
