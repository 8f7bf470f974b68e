"""The conversion of a Llama GGUF file into a Hugging Face folder: weights, config, tokenizer, chat template.

Quantised weights are dequantised exactly, in float32, and rounded once to bfloat16. Knows the GGUF names of Llama and
the byte-level tokenizer of SmolLM2; does not know where the file comes from.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Token types of the GGUF format (llama.cpp's `llama_token_type`).
CONTROL, USER_DEFINED = 3, 4


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the Hugging Face folder of `gguf_file` (architecture llama, tied embeddings, SmolLM2's tokenizer)."""
    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(fields)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(llama_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only the owner can read
    config.save_pretrained(folder)
    smollm2_tokenizer(fields).save_pretrained(folder)
    ends = [config.eos_token_id, fields["tokenizer.ggml.tokens"].index("<|endoftext|>")]
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def llama_config(fields: dict[str, Any]) -> LlamaConfig:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position_embeddings=fields["llama.context_length"],
        # the file stores float32: the value is 1e-05 and not 9.999999747378752e-06
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def llama_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith("attn_q.weight"):
            weight = halves_from_pairs(weight, config.num_attention_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = halves_from_pairs(weight, config.num_key_value_heads)
        weights[hf_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return weights


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key weight from llama.cpp's rotation to transformers' rotation.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), …; transformers rotates row i with row i + head_dim/2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def hf_name(gguf_name: str) -> str:
    """Return the name in transformers: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    stem, kind = gguf_name.rsplit(".", 1)
    if stem in TOP_LEVEL:
        return f"{TOP_LEVEL[stem]}.{kind}"
    _, layer, name = stem.split(".")
    return f"model.layers.{layer}.{IN_LAYER[name]}.{kind}"


def smollm2_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE tokenizer of SmolLM2, which first splits numbers into single digits.

    A GGUF file only names this splitting ("smollm").
    """
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token="<|endoftext|>",
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )
