"""Fields by family that the common rules of `tiny_models` do not get right."""

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
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
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
