"""The published LongSpec checkpoints and their targets, written down apart from our classes to check the classes.

`TARGETS` are the `config.json` files of the targets, as far as a draft depends on them, in the words of the Hub's
files. The source of the numbers stands beside each.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HUB_CONFIGS = Path(__file__).parents[1] / "hub_configs"

# Numbers of LLaMA (1) and Llama 2 at 7B and 13B, 32,000 tokens: the Llama papers, and litgpt's config.py.
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
# Qwen2.5 from litgpt's config.py, which cites the files on the Hub.
QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def linear(factor: float) -> dict:
    return {"rope_scaling": {"factor": factor, "type": "linear"}}


TARGETS = {
    # the config.json of the folder that `hf_longspec.demo.weights` builds
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    # litgpt, "Qwen2.5-Coder-0.5B" and "-1.5B"
    "qwen2.5-coder-0.5b-instruct": QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
    },
    "qwen2.5-coder-1.5b-instruct": QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
    },
    # the whole file as HKUDS/UrbanGPT quotes it; litgpt agrees (condensed by 4)
    "vicuna-7b-v1.5-16k": LLAMA_7B
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "pad_token_id": 0, **linear(4.0)},
    # litgpt, condensed by 4 to 16,384
    "vicuna-13b-v1.5-16k": LLAMA_13B | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, **linear(4.0)},
    # Llama 2 7B, 32,768 = 8 × 4,096 tokens by linear scaling; no copy of the file was at hand
    "longchat-7b-v1.5-32k": LLAMA_7B | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, **linear(8.0)},
    # LLaMA (1): the numbers from litgpt; the scaling, and 2,048, from vLLM's test_rope_customization: under another
    # factor of 2 the test finds 4,096 tokens
    "longchat-13b-16k": LLAMA_13B | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-06, **linear(8.0)},
    # the whole file as a test of scaleapi/llm-engine quotes it
    "llama-3-8b-instruct-262k": LLAMA_7B
    | {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-05,
        "rope_theta": 283461213.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    # litgpt, and tinygrad's example of this model
    "qwq-32b-preview": QWEN2
    | {
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "use_sliding_window": False,
    },
}

# The published drafts, from the tables of the reference's README: repository, target, folder of `hub_configs/`.
DRAFTS = {
    "vicuna-7b-v1.5-16k": ("sail/longspec-vicuna-7b-v1.5-16k", "lmsys/vicuna-7b-v1.5-16k"),
    "vicuna-13b-v1.5-16k": ("sail/longspec-vicuna-13b-v1.5-16k", "lmsys/vicuna-13b-v1.5-16k"),
    "longchat-7b-v1.5-32k": ("sail/longspec-longchat-7b-v1.5-32k", "lmsys/longchat-7b-v1.5-32k"),
    "longchat-13b-16k": ("sail/longspec-longchat-13b-16k", "lmsys/longchat-13b-16k"),
    "llama-3-8b-instruct-262k": (
        "sail/longspec-Llama-3-8B-Instruct-262k",
        "gradientai/Llama-3-8B-Instruct-262k",
    ),
    "qwq-32b-preview": ("sail/longspec-QwQ-32B-Preview", "Qwen/QwQ-32B-Preview"),
}
UNUSED = {f"cross_attn.{name}_proj.{kind}" for name in "kv" for kind in ("weight", "bias")}


def published_shapes(target: dict) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published checkpoint for this target; the rows of a matrix are its outputs."""
    hidden, inner, heads = target["hidden_size"], target["intermediate_size"], target["num_attention_heads"]
    keys = hidden // heads * target["num_key_value_heads"]  # head dimension × key/value heads
    shapes: dict[str, tuple[int, ...]] = {}
    for attention in ("self_attn", "cross_attn"):
        for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
            shapes[f"{attention}.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{attention}.{name}_proj.bias"] = (rows,)
        shapes[f"{attention}.o_proj.weight"] = (hidden, hidden)
    for name in ("gate", "up"):
        shapes[f"mlp.{name}_proj.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    for norm in ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm"):
        shapes[f"{norm}.weight"] = (hidden,)
    return shapes


def tiny(target: dict) -> dict:
    """Shrink a target to one 64th of its width, two layers and 101 tokens; groups of heads and RoPE stay."""
    group = target["num_attention_heads"] // target["num_key_value_heads"]
    heads = 2 * group if group > 1 else 4
    small = {
        "hidden_size": 8 * heads,
        "intermediate_size": target["intermediate_size"] // 64,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "num_hidden_layers": 2,
        "vocab_size": 101,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {name: value for name, value in target.items() if name not in ("head_dim", "pad_token_id")} | small


def random_weights(target: dict, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make a checkpoint of random numbers; norms are around one, biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(target).items():
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.3
        weights[name] = (torch.randn(shape, generator=generator) * scale + ("norm" in name)).to(dtype)
    return weights


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(
    folder: Path, config: dict, weights: dict[str, torch.Tensor], *, pickled: bool = False, shards: int = 1
) -> Path:
    """Write a folder as the reference's `PreTrainedModel.save_pretrained` leaves it."""
    write_config(folder, config)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    save = torch.save if pickled else save_file
    if shards == 1:
        save(weights, folder / f"{stem}.{suffix}")
        return folder
    names = [f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}" for number in range(shards)]
    places = {name: names[index % shards] for index, name in enumerate(weights)}
    for file in names:
        save({name: tensor for name, tensor in weights.items() if places[name] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
