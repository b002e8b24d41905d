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
