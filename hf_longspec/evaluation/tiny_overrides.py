"""Fields that the common rules of `tiny_models` do not get right, by family."""

from __future__ import annotations

from typing import Any


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section, **more}}


_QWEN_VL = {"text_config": _mrope(1, 1, 2)}  # its heads are hidden_size / heads = 8 wide
_GLM_V = {"text_config": {"head_dim": 16, **_mrope(1, 1, 2, partial_rotary_factor=0.5)}}

OVERRIDES: dict[str, dict[str, Any]] = {
    "blenderbot": {"encoder_layers": 4},
    "chameleon": {"vocabulary_map": {"<image>": 12}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    },
    "ernie4_5_vl_moe": {"text_config": _mrope(3, 3, 2)},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm46v": _GLM_V,
    "glm4v": _GLM_V,
    "glm4v_moe": _GLM_V,
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_ocr": _GLM_V,
    "glmga": _GLM_V,
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]},
    "helium": {"head_dim": 8},
    "hunyuan_vl": {"text_config": _mrope(2, 2, 2, 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mistral4": {"text_config": {"head_dim": 24}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _mrope(2, 3, 3)},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 20, "text_config": _mrope(1, 1, 2)},
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_vl": _QWEN_VL,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "local_num_chunks_after": 0,
    },
    "step3p7": {"text_config": {"sliding_window": 6}},
    "xlm": {"n_langs": 1, "mask_token_id": 2},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4},
}
