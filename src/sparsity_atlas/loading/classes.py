"""Which of transformers' auto classes makes a model: for text alone, or for more."""

from __future__ import annotations

from typing import Any


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
    named = getattr(config, "auto_map", None) or {}
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in named:
        return AutoModelForCausalLM
    text = config.get_text_config()
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, text)):
        raise ValueError("it is an encoder-decoder, and only decoders can be evaluated")
    multimodal = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM
