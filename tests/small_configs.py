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
        "linear_value_head_dim global_head_dim kv_channels state_size mamba_d_state ssm_state_size "
        "mamba_head_dim hidden_size_per_layer_input",
    ),
    (2, "num_key_value_heads num_experts_per_tok moe_k index_n_heads mamba_expand expand"),
    (1, "n_group topk_group n_groups mamba_n_groups n_shared_experts first_k_dense_replace"),
    (
        0,
        "num_kv_shared_layers num_nextn_predict_layers zero_expert_num oe_vocab_size_ratio pad_token_id",
    ),
    (16, "kv_lora_rank q_lora_rank mamba_d_head"),
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


def small_config(kind: str, **sizes: int) -> PretrainedConfig:
    """The default configuration of a model type, with two layers and a width of 32."""
    return _shrunk(AutoConfig.for_model(kind), sizes)


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
    if getattr(config, "kv_lora_rank", None):
        _set(config, "num_key_value_heads", HEADS)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and not any(isinstance(one, dict) for one in rope.values()):
        rope["mrope_section"] = [2, 1, 1]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            _shrunk(part, sizes)
    return config


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
