"""Fields by family that the common rules of `tiny_models` do not get right: its own sizes, and what is released."""

from __future__ import annotations

from typing import Any


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section, **more}}


_QWEN_VL = {"text_config": _mrope(1, 1, 2)}  # heads are hidden_size / heads = 8 wide
_GLM_V = {"text_config": {"head_dim": 16, "hidden_size": 64, **_mrope(1, 1, 2, partial_rotary_factor=0.5)}}

_COMPASS = {
    "rope_parameters": {
        "full_attention": None,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
    }
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SIGLIP = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_kv_lora_rank": 16,
    "swa_q_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA4 = {"global_head_dim": 32}  # full layers have wider heads
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_MINIMAX_M3 = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4}
_FOUR = [32, 32, 32, 32]
_NO_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 4},
    "chameleon": {"vocabulary_map": {"<image>": 12}},
    "cohere": {"logit_scale": 1.0},  # at the default of a sixteenth, all tokens are about equally likely
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    },
    "ernie4_5_vl_moe": {"text_config": _mrope(1, 1, 2)},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fast_vlm": _SIGLIP,
    "florence2": {"vision_config": {"embed_dim": _FOUR, "depths": [1, 1, 1, 1]}},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_assistant": {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 4, **_NO_PER_LAYER_INPUT}},
    "glm46v": _GLM_V,
    "glm4v": _GLM_V,
    "glm4v_moe": _GLM_V,
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_ocr": _GLM_V,
    "glmga": _GLM_V,
    "granite_docling": {"text_config": {"logits_scaling": 1.0}},
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "helium": {"head_dim": 8},
    "hunyuan_vl": {"text_config": _mrope(2, 2, 2, 2)},
    "lfm2": _CONV,  # by default it is without, but no released one is
    "lfm2_moe": _CONV,
    "lfm2_vl": {"text_config": _CONV},
    "minimax_m3_vl": {"text_config": _MINIMAX_M3},
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mistral4": {"qk_nope_head_dim": 16, "head_dim": 32, "qk_head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "muse_spark": {"audio_config": {"hidden_sizes": _FOUR}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _mrope(2, 3, 3)},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 20, "text_config": _mrope(1, 1, 2)},
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_vl": _QWEN_VL,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "local_num_chunks_after": 0,
    },
    "step3p7": {"text_config": {"sliding_window": 6}},
    "xlm": {"n_langs": 1, "mask_token_id": 2},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4},
}

_NO_WINDOW = {"sliding_window": None}
_GEMMA4_WITHOUT_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
_GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_GEMMA4_SHARED = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0}


def _scaled_rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    common = {"rope_type": rope_type, "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": common | parameters}


_YARN = _scaled_rope("yarn", factor=4.0)
# the frequencies change within a text
_LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
_LONGROPE = {**_scaled_rope("longrope", **_LONG), "original_max_position_embeddings": 16, **_NO_WINDOW}

# Released models, by family, that have what the family's tiny model has not. Each is tried beside it.
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "cohere": {"c4ai-command-r-plus": {"use_qk_norm": True}},
    "exaone4": {"EXAONE-4.0-1.2B": {"layer_types": ["full_attention"] * 4, **_NO_WINDOW}},  # turns in all layers
    "gemma4": {"gemma-4-31B": {"text_config": _GEMMA4_WITHOUT_VALUES}, "gemma-4-E2B": {"text_config": _GEMMA4_SHARED}},
    "gemma4_text": {
        "gemma-4-31B": _GEMMA4_WITHOUT_VALUES,
        "gemma-4-26B-A4B": _GEMMA4_WITHOUT_VALUES | _GEMMA4_EXPERTS,
        "gemma-4-E2B": _GEMMA4_SHARED,
    },
    "gemma3_text": {
        "gemma-3-4b": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        }
    },
    "glm4_moe": {"GLM-4.5": {"use_qk_norm": True}},
    "gpt2": {"stanford-gpt2-small-a": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}},
    "idefics2": {"idefics2-8b": {"text_config": _NO_WINDOW}},
    "llama": {"Llama-3.1-8B": _scaled_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)},
    "ministral": {"full layers": {"layer_types": ["sliding_attention", "full_attention"] * 2}},
    "ministral3": {"Ministral-3-8B": _NO_WINDOW},
    "mistral": {"Mistral-7B-v0.3": _NO_WINDOW},
    "mistral3": {"Mistral-Small-3.1-24B": {"text_config": _NO_WINDOW}},
    "mixtral": {"Mixtral-8x7B": _NO_WINDOW},
    "olmo": {"OLMo-7B-0424": {"clip_qkv": 0.5}},
    "opt": {"opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16}},
    "phi3": {"Phi-3-mini-128k": _LONGROPE},
    "phi4_multimodal": {"Phi-4-multimodal": _LONGROPE},
    "phimoe": {"Phi-3.5-MoE": _scaled_rope("longrope", **_LONG, short_mscale=1.25, long_mscale=1.25) | _NO_WINDOW},
    "qwen2": {"Qwen2.5 with YaRN": _YARN},
    "qwen3_moe": {"Qwen3-30B-A3B": _NO_WINDOW},
    "qwen3_omni_moe_thinker": {"Qwen3-Omni-30B-A3B": {"text_config": _NO_WINDOW}},
    "qwen3_vl_moe": {"Qwen3-VL-30B-A3B": {"text_config": _NO_WINDOW}},
    "stablelm": {"stablelm-2-12b": {"qk_layernorm": True, "use_parallel_residual": True}},
    "starcoder2": {"without a window": _NO_WINDOW},
}
