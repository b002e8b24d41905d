"""Which class of transformers a checkpoint is loaded as, also under other names: its published layouts.

A repository under other names brings Python code of its own, for one release of transformers, whose
arithmetic is that of a class which transformers has, but that each token sees all others. So it is loaded as
that class: its settings are translated, its tensors renamed, and its code is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Settings that every layout has under the names that transformers gives them, if it has them.
_COMMON = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"),
    *("dtype", "torch_dtype", "initializer_range"),
)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint of some layout becomes a model of transformers.

    Attributes:
        native: model type of transformers.
        settings: names in its config.json, the first that is there counts, by those of transformers.
        optional: of the settings, those that may be missing.
        fixed: what the layout always has, and its config.json says nowhere.
        expected: settings that `native` has no word for, and their values under which it computes the same.
        keys: patterns of tensors' names and what replaces them, one after the other.
        tokenizer: class of transformers that its own class of tokenizer is.
        shifted: whether the logits at a token are of its successor.
    """

    native: str
    settings: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]
    expected: Mapping[str, tuple[Any, ...]]
    keys: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    tokenizer: str | None = None
    shifted: bool = False

    def config(self, content: Mapping[str, Any], where: Path) -> PretrainedConfig:
        """The configuration of the class of transformers.

        Args:
            content: of the checkpoint's config.json.
            where: that file, for errors.

        Raises:
            AtlasError: a setting is missing, or has a value with which that class would compute something
                else.
        """
        from transformers import AutoConfig

        for key, values in self.expected.items():
            if key in content and content[key] not in values:
                raise AtlasError(
                    f"{where}: {key}: found {json.dumps(content[key])}, expected "
                    f"{json.dumps(values[0])}: with another, it is no {self.native} of transformers"
                )
        found = {name: content[name] for name in _COMMON if content.get(name) is not None}
        for name, keys in self.settings.items():
            value = next((content[key] for key in keys if content.get(key) is not None), None)
            if value is not None:
                found[name] = value
            elif name not in self.optional:
                raise AtlasError(f"{where}: {keys[0]}: missing")
        return AutoConfig.for_model(self.native, **found, **self.fixed, is_causal=False)

    def rename(self, name: str) -> str:
        """What the class of transformers calls a tensor."""
        for pattern, by in self.keys.items():
            name = re.sub(pattern, by, name)
        return name


_QWEN2 = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "tie_word_embeddings"),
)
# By the model type that config.json states.
LAYOUTS = {
    # arXiv 2502.09992: the modules of OLMo's `llama` block.
    "llada": Layout(
        native="llama",
        settings={
            "vocab_size": ("embedding_size", "vocab_size"),
            "hidden_size": ("d_model",),
            "intermediate_size": ("mlp_hidden_size",),
            "num_hidden_layers": ("n_layers",),
            "num_attention_heads": ("n_heads",),
            "num_key_value_heads": ("n_kv_heads", "n_heads"),
            "max_position_embeddings": ("max_sequence_length",),
            "rms_norm_eps": ("rms_norm_eps",),
            "rope_theta": ("rope_theta",),
            "tie_word_embeddings": ("weight_tying",),
        },
        fixed={"hidden_act": "silu"},
        expected={
            "block_type": ("llama",),
            "block_group_size": (1,),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "rope": (True,),
            "rope_full_precision": (True,),
            "multi_query_attention": (None, False),
            "clip_qkv": (None,),
            **dict.fromkeys(("alibi", "attention_layer_norm", "input_emb_norm"), (False, None)),
            **dict.fromkeys(("include_bias", "include_qkv_bias", "scale_logits"), (False, None)),
        },
        keys={
            r"^model\.transformer\.blocks\.": "model.layers.",
            r"\.attn_norm\.": ".input_layernorm.",
            r"\.ff_norm\.": ".post_attention_layernorm.",
            r"\.(q|k|v)_proj\.": r".self_attn.\1_proj.",
            r"\.attn_out\.": ".self_attn.o_proj.",
            r"\.ff_proj\.": ".mlp.gate_proj.",
            r"\.up_proj\.": ".mlp.up_proj.",
            r"^model\.transformer\.ff_out\.": "lm_head.",
            r"\.ff_out\.": ".mlp.down_proj.",
            r"^model\.transformer\.wte\.": "model.embed_tokens.",
            r"^model\.transformer\.ln_f\.": "model.norm.",
        },
    ),
    # arXiv 2508.15487, made of a Qwen2, whose names it kept; DiffuCoder has the same.
    "Dream": Layout(
        native="qwen2",
        settings={name: (name,) for name in _QWEN2},
        optional=frozenset({"tie_word_embeddings"}),
        fixed={},
        expected={
            "rope_scaling": (None,),
            **dict.fromkeys(("use_mrope", "use_sliding_window"), (False, None)),
        },
        keys={},
        tokenizer="Qwen2Tokenizer",
        shifted=True,
    ),
}


def layout_of(content: Any) -> Layout | None:
    """The layout of a checkpoint by its config.json; None if it is one of transformers' own, or unknown."""
    kind = content.get("model_type") if isinstance(content, dict) else None
    return LAYOUTS.get(kind) if isinstance(kind, str) else None


def layout_in(folder: Path) -> Layout | None:
    """The layout of a model's folder; None also where its config.json cannot be read."""
    try:
        return layout_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def tokenizer_class(folder: Path) -> Any:
    """What loads a folder's tokenizer: transformers' choice, or the class that its own code is a copy of."""
    import transformers

    layout, path = layout_in(folder), folder / "tokenizer_config.json"
    if layout is None or layout.tokenizer is None or not path.is_file():
        return transformers.AutoTokenizer
    own_code = "auto_map" in read_json(path)
    return getattr(transformers, layout.tokenizer) if own_code else transformers.AutoTokenizer


def auto_class(config: Any) -> Any:
    """What makes a model of a configuration and reads text by it.

    A checkpoint for images or sound is loaded whole, and given text alone.

    Raises:
        ValueError: it is an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    # Code of its own says what it is by itself.
    own = getattr(config, "auto_map", None) or {}
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own
    text = config.get_text_config()
    both = any(getattr(one, "is_encoder_decoder", False) for one in (config, text))
    # Of BART and its kin there are decoders that were saved alone, and say so.
    alone = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    if both and not (decoder and (alone or own)):
        raise ValueError("it is an encoder-decoder, and only decoders can be evaluated")
    multimodal = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and not decoder
    return AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM
