"""Small values for the fields of transformers' configs, by what they measure."""

from __future__ import annotations

from typing import Any

_BY_VALUE: list[tuple[Any, str]] = [
    (
        128,
        """vocab_size vocab_size_per_layer_input n_positions n_ctx max_position_embeddings
        max_seq_len max_seq_length
        unpadded_vocab_size""",
    ),
    (
        64,
        """intermediate_size d_ff d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_feedforward
        ffn_hidden_size n_inner dim_ff mamba_d_ssm ffn_hidden_dim dense_intermediate_size
        mlp_intermediate_size intermediate_size_mlp audio_vocab_size""",
    ),
    (
        32,
        """hidden_size d_model n_embd emb_dim moe_intermediate_size embedding_size embedding_dim
        word_embed_proj_dim d_embed shared_expert_intermediate_size shared_intermediate_size
        input_embedding_size output_embedding_size attention_hidden_size lru_width projection_dim
        expert_ffn_hidden_size dim_model moe_shared_expert_intermediate_size hidden_dim
        expert_hidden_size projector_hidden_size embed_dim expert_intermediate_size
        moe_ffn_hidden_size ffn_dim_expert""",
    ),
    (
        16,
        """kv_lora_rank q_lora_rank qk_head_dim image_size sliding_window index_head_dim
        attention_window_size router_hidden_size""",
    ),
    (
        8,
        """head_dim hidden_size_per_layer_input d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim
        linear_key_head_dim linear_value_head_dim rotary_dim mamba_n_heads mamba_d_head
        mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size mamba_num_heads
        mamba_head_dim global_head_dim patch_size laurel_rank attention_head_dim block_size
        swa_head_dim swa_v_head_dim o_lora_rank mamba_headdim adapter_rank block_multiple_of""",
    ),
    (
        4,
        """num_attention_heads n_head decoder_attention_heads encoder_attention_heads n_heads
        num_heads num_experts num_local_experts n_routed_experts moe_num_experts
        linear_num_value_heads index_topk swa_num_attention_heads time_step_rank mamba_dt_rank
        linear_conv_kernel_dim""",
    ),
    (3, "num_channels conv_L_cache"),
    (
        2,
        """num_hidden_layers num_key_value_heads n_layer decoder_layers encoder_layers num_layers
        n_layers num_experts_per_tok moe_k linear_num_key_heads num_global_key_value_heads
        index_n_heads decoder_start_token_id num_kv_heads moe_topk num_codebooks mamba_expand
        eos_token_id altup_num_inputs num_blocks num_experts_per_token top_k
        swa_num_key_value_heads depth hc_mult q_group o_groups n_mamba_heads""",
    ),
    (
        1,
        """n_shared_experts n_group topk_group bos_token_id mamba_n_groups n_groups
        first_k_dense_replace num_shared_experts zero_expert_num num_hash_layers num_mem_blocks
        mamba_ngroups num_expert_group n_input_layers n_recurrent_layers n_output_layers""",
    ),
    (
        0,
        """num_nextn_predict_layers pad_token_id moe_layers_start_index num_kv_shared_layers
        max_window_layers""",
    ),
    (0.5, "qk_dim_factor"),
    (1.0, "block_ffn_dim_multiplier"),
    (False, "block_auto_adjust_ff_dim"),
    (None, "moe_latent_size mlp_layer_types"),
]
SMALL: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}

# needed to make a config at all, by model type
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}
# the part of a composite config that the causal model is made of
PARTS = {("causal", "musicgen"): "decoder", ("causal", "musicgen_melody"): "decoder"}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 128, "hc_lowrank": 8,
}  # fmt: skip
_GLOBAL = {"hidden_size_global": 32}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SECTIONED = {"text_config": {"rope_parameters": _SECTIONS}}
_OMNI = {"vision_start_token_id": 7, "audio_start_token_id": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# by model type; for a config below the config a dict of its own
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v4": {"output_router_logits": False},  # its two layers have no router
    "diffllama": {"attention_dropout": 0.0},
    "dory": {
        "use_cache": False, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "flint": {"mlp_only_layers": []},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "hybrid_layer_ids": [0],
        "n_mamba_heads": 8,
        "layers_block_type": ["hybrid", "linear_attention"],
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "use_cache": False, "chunk_size": 4},
    "blt": {
        "use_cache": False, "encoder_hash_byte_group_vocab": 128, "encoder_config": _GLOBAL,
        "decoder_config": _GLOBAL, "global_config": _GLOBAL,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"per_layer_config": {1: {}}, "head_dim": 16}},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "gemma3n_text": {"intermediate_size": 64},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_embds": False,
        "num_buckets": 2,
        "feed_forward_size": 32,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "glm46v": _SECTIONED, "glm4v": _SECTIONED, "glm_ocr": _SECTIONED, "glmga": _SECTIONED,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 0]}}},
    "paddleocr_vl": _SECTIONED, "qwen2_vl": _SECTIONED, "qwen2_5_vl": _SECTIONED,
    "qwen2_5_omni_thinker": {**_SECTIONED, **_OMNI}, "qwen3_omni_moe_thinker": _OMNI,
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "glm5_next": {
        "text_config": {
            "index_kpool": 2, "qk_rope_head_dim": 0, "output_router_logits": False,
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "blip-2": {"image_token_index": 5, "image_token_id": 5},
    "vision-encoder-decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
