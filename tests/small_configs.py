"""Configurations of transformers' model types, made small by one table of what they call their sizes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

HIDDEN, WIDTH, LAYERS, HEADS, HEAD, VOCABULARY = 32, 48, 2, 4, 8, 96
_SIZES = (
    (
        HIDDEN,
        "hidden_size d_model n_embd word_embed_proj_dim attention_hidden_size lru_width embedding_size "
        "dim embed_dim projection_dim",
    ),
    (
        WIDTH,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff "
        "intermediate_size_mlp mlp_hidden_size d_inner",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth"),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_key_heads time_step_rank "
        "mamba_dt_rank laurel_rank rotary_dim conv_kernel num_experts num_local_experts n_routed_experts "
        "moe_num_experts",
    ),
    (
        HEAD,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim kv_channels state_size mamba_d_state ssm_state_size "
        "mamba_head_dim hidden_size_per_layer_input",
    ),
    (2, "num_key_value_heads num_experts_per_tok moe_k index_n_heads mamba_expand expand"),
    (1, "n_group topk_group n_groups mamba_n_groups n_shared_experts first_k_dense_replace"),
    (
        0,
        "num_kv_shared_layers num_nextn_predict_layers zero_expert_num oe_vocab_size_ratio pad_token_id",
    ),
    # Where Gemma 4 sees everything its heads are wider.
    (16, "kv_lora_rank q_lora_rank mamba_d_head global_head_dim"),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size",
    ),
    (64, "max_position_embeddings n_positions"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
)
_SIZE = {name: size for size, names in _SIZES for name in names.split()}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_types", "block_types")


# What types need beside: values that have no default, or that must fit each other.
_OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "max_position_embeddings": 64},
    "blt_local_encoder": {"hidden_size_global": 2 * HIDDEN},
    "blt_local_decoder": {"hidden_size_global": 2 * HIDDEN},
    "blt_global_transformer": {"hidden_size": 2 * HIDDEN, "head_dim": 2 * HEAD},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": WIDTH},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4},
    "granitemoehybrid": {
        **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS},
        "layer_types": ["linear_attention", "full_attention"],
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4},
    },
    "lfm2_moe": {
        **{"num_hidden_layers": LAYERS, "layer_types": ["conv", "full_attention"]},
        "num_dense_layers": 1,
    },
    "longcat_flash": {"qk_head_dim": 2 * HEAD},
    "mamba2": {
        **{"hidden_size": HIDDEN, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
        "time_step_rank": 4,
    },
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4, "head_dim": HEAD},
    },
    "reformer": {
        **{"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
        **{"local_attn_chunk_length": 4, "attention_head_size": 8, "feed_forward_size": WIDTH},
    },
    "xlstm": {"embedding_dim": HIDDEN, "num_blocks": LAYERS, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        **{"num_hidden_layers": 4, "attention_head_dim": 16, "attention_hidden_size": 64},
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"hidden_size": HIDDEN, "num_attention_heads": HEADS},
        **{"num_hidden_layers": 4, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
        **{"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 4},
        **{"attention_head_dim": 16, "num_key_value_heads": HEADS, "adapter_rank": 4},
        "attention_hidden_size": 2 * HIDDEN,
        "use_mamba_kernels": False,
    },
}


def small_config(kind: str, **sizes: int) -> PretrainedConfig:
    """The default configuration of a model type, with two layers and a width of 32."""
    own = _OWN.get(kind, {})
    config = _shrunk(AutoConfig.for_model(kind, **own), sizes)
    _give(config, own)
    found: PretrainedConfig = config
    return found


def _shrunk(config: Any, sizes: dict[str, int]) -> Any:
    for name, size in {**_SIZE, **_TOKENS, **sizes}.items():
        known = name in vars(config) or name in getattr(type(config), "attribute_map", {})
        now = _get(config, name) if known else None
        if now is None and not (known and name == "head_dim"):
            continue
        _set(config, name, [size] * LAYERS if isinstance(now, list | tuple) else size)
    for name in _KINDS:
        listed = getattr(config, name, None)
        if isinstance(listed, list) and len(listed) > LAYERS:
            kinds = list(dict.fromkeys(listed))
            count = max(LAYERS, len(kinds))
            _set(config, name, (kinds + kinds)[:count])
            _set(config, "num_hidden_layers", count)
    for part in vars(config).values():
        if isinstance(part, dict):
            part |= {name: size for name, size in _SIZE.items() if isinstance(part.get(name), int)}
    # Latent attention has one key for each head, and axes of an image share a head's rotations.
    if _get(config, "kv_lora_rank"):
        _set(config, "num_key_value_heads", HEADS)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and not any(isinstance(one, dict) for one in rope.values()):
        rope["mrope_section"] = [2, 1, 1]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            _shrunk(part, sizes)
            _give(part, _OWN.get(part.model_type, {}))
    return config


def _give(config: Any, own: dict[str, Any]) -> None:
    for name, value in own.items():
        # What is a configuration by now stays one.
        if not hasattr(_get(config, name), "to_dict"):
            _set(config, name, value)


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 (one that differs from layer to layer has no value of its own)
        return None


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError):  # a property of its class
        return
