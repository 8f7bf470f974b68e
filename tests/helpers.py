"""Tiny models for the tests: any family by its `model_type`, with random weights, and a draft for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.evaluation.tiny_models import randomized
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.interface_longspec import CACHE as CACHE  # what this transformers calls the cache's argument

VOCAB = 13
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
# Fields that a family needs beside the common shape to show its peculiarities at this size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": {},
    "phi": {},
    "olmo2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 6},
    "smollm3": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "glm4": {},
    "gpt_oss": {
        "sliding_window": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "stablelm": {"head_dim": 8},
    "starcoder2": {},
    "gpt_neox": {"head_dim": 8, "num_key_value_heads": 4},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
    "mixtral": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tiny_target(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a float32 model of a family (`model_type`) in eval mode; `overrides` are fields of its config.

    Weights are large enough that the text depends on the context instead of settling on one token.
    """
    config = AutoConfig.for_model(family, **(SHAPE | FAMILIES.get(family, {}) | overrides))
    return randomized(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def tiny_draft(target: PreTrainedModel, *, seed: int = 1, **fields: Any) -> LongSpecForCausalLM:
    """Make a float32 draft in eval mode for `target`; `fields` are fields of its `LongSpecConfig`."""
    config = LongSpecConfig.from_target(target.config, **({"window": 8, "tree_shape": (4, 8, 8)} | fields))
    return randomized(lambda: LongSpecForCausalLM(config), seed)


def quick_or_slow(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Return a test's parameters: `values`, of which all that are not in `quick` are marked `slow`."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


def commit(cache: SpeculativeCache, path: torch.Tensor, counts: torch.Tensor, emitted: list[int]) -> None:
    """Commit accepted paths on the device and the host, as a round does in the end; emitted: `counts` on the host."""
    cache.commit(path, counts)
    cache.end_round(emitted)


def interprets_triton() -> bool:
    """Return whether to try kernels on the CPU: triton 3.6's interpreter fails with numpy 2.4, and a GPU runs them."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return Version(importlib.metadata.version("triton")) >= Version("3.7")


interpreted = pytest.mark.skipif(not interprets_triton(), reason="needs Triton 3.7 and no CUDA device")


def is_one_line(stderr: str) -> bool:
    """Return whether a command wrote just one line; packages such as torchao may add lines at their first import."""
    ours = [line for line in stderr.splitlines() if line.startswith("hf-longspec: ")]
    return len(ours) == 1 and stderr.endswith(ours[0] + "\n") and "Traceback" not in stderr
