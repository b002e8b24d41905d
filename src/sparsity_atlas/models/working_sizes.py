"""What the memory of a pass depends on beside the sizes of a model's FFNs, as its configuration names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsity_atlas.models.layer_settings import in_layers
from sparsity_atlas.models.logits.head import able, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What configurations call the number of a token's residual streams: AltUp (Gemma 3n), hyper-connections
# (DeepSeek V4, GLM 5, Hunyuan 4; Qwen 4).
STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")
# And the width of what each layer has of a token by itself (Gemma 3n, Gemma 4).
LAYER_INPUTS = "hidden_size_per_layer_input"
LINEAR = "linear_attention"


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """As a manifest has it under `memory`; see `memory.Sizes`."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None) or 0
    heads = [one or 0 for one in in_layers(config, "num_attention_heads")]
    keys = in_layers(config, "num_key_value_heads")
    sizes = in_layers(config, "head_dim")
    linear = [kind == LINEAR for kind in in_layers(config, "layer_types")]
    cached = (
        0 if no_keys else (key or head) * (size or (hidden // head if head else 0))
        for head, key, size, no_keys in zip(heads, keys, sizes, linear, strict=True)
    )
    own = {
        "streams": streams(config),
        "layer_inputs": sum(one or 0 for one in in_layers(config, LAYER_INPUTS)),
        **(_linear(config, sum(linear)) if any(linear) else {}),
    }
    return {
        "vocabulary": vocabulary(model),
        "pieces": able(model),
        "heads": max(heads, default=0) if config._attn_implementation == "eager" else 0,
        "capped": bool(getattr(config, "final_logit_softcapping", None)),
        "cache": 2 * sum(cached),
        **{name: size for name, size in own.items() if size},
    }


def streams(config: Any) -> int:
    """Parallel residual streams of a decoder's tokens; 0 where there is one."""
    found = max(getattr(config, name, None) or 0 for name in STREAMS)
    return found if found > 1 else 0


def _linear(config: Any, layers: int) -> dict[str, int]:
    """Sizes of layers of linear attention with heads of keys and of values, as Qwen3-Next has them."""
    shape = [
        getattr(config, f"linear_{name}", None) or 0
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    ]
    groups, heads, key, value = shape
    pairs = heads
    if not all(shape):
        # Heads of one kind and width, and a decay for each channel (Kimi Linear, GLM 5).
        groups = heads = getattr(config, "linear_num_heads", None) or 0
        key = value = getattr(config, "linear_head_dim", None) or 0
        pairs = heads * key
    return {
        "linear": heads * (key + value),
        "linear_pairs": pairs,
        # Queries, keys and values, as they are projected with a gate and behind their convolution.
        "linear_inputs": 4 * groups * key + 3 * heads * value,
        "state": heads * key * value,
        "linear_layers": layers,
    }
